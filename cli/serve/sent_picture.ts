// What is made of a picture that a request sends before it is used: each of A1111's clients sends what its own program had to do with it,
// so a mask may be an alpha channel, and a ControlNet's picture one to be preprocessed.
import { canny } from '../../io/canny.ts';
import { decodeAlpha, decodePicture } from '../../io/image.ts';
import type { Mask, Picture } from '../../io/pixels.ts';
import type { Made } from './messages.ts';
import { mostSide } from './served.ts';

/** A picture from its file, of which messages say `name`. @throws UserError */
export async function readSent(file: Uint8Array, name: string, made: Made | undefined): Promise<Picture> {
  const bounds = { mostPixels: mostSide ** 2 };
  if (made?.by === 'alpha') {
    const alpha = await decodeAlpha(file, name, bounds);
    if (alpha.data.some((opacity) => opacity < 255)) return blackAndWhite(alpha);
  }
  const onWhite = made?.by === 'white' || made?.by === 'invert';
  const picture = await decodePicture(file, name, { ...bounds, onWhite });
  if (made?.by === 'canny') return canny(picture, made.thresholds);
  return made?.by === 'invert' ? { ...picture, data: picture.data.map((level) => 255 - level) } : picture;
}

function blackAndWhite({ data: alpha, ...size }: Mask): Picture {
  const data = Uint8Array.from({ length: 3 * alpha.length }, (_, i) =>
    alpha[Math.floor(i / 3)] > 128 ? 255 : 0,
  );
  return { ...size, channels: 3, data };
}
