// What is made of a picture that a request sends before it is used: each of A1111's clients sends what its own program had to do with it,
// so a mask may be an alpha channel, and a ControlNet's picture one to be preprocessed.
import { UserError } from '../../io/errors.ts';
import { decodeAlpha, decodePicture } from '../../io/image.ts';
import { lay, type Mask, type Picture } from '../../io/pixels.ts';
import type { Sides } from '../sample/hires_options.ts';
import type { Fit, Made, Settings } from './messages.ts';
import { preprocessed } from './preprocessors.ts';
import { mostSide } from './served.ts';

/** A picture from its file, of which messages say `name`. @throws UserError */
export async function readSent(file: Uint8Array, name: string, made: Made | undefined): Promise<Picture> {
  const bounds = { mostPixels: mostSide ** 2 };
  if (made?.by === 'alpha') {
    const alpha = await decodeAlpha(file, name, bounds);
    if (alpha.data.some((opacity) => opacity < 255)) return blackAndWhite(alpha);
  }
  const onWhite = made !== undefined && made.by !== 'alpha';
  const picture = await decodePicture(file, name, { ...bounds, onWhite });
  return made ? preprocessed(picture, made) : picture;
}

function blackAndWhite({ data: alpha, ...size }: Mask): Picture {
  const data = Uint8Array.from({ length: 3 * alpha.length }, (_, i) =>
    alpha[Math.floor(i / 3)] > 128 ? 255 : 0,
  );
  return { ...size, channels: 3, data };
}

/** Pixels of a picture that is filled up: a line of them in a shape that lies across it would take all memory. */
const mostFilled = 4 * mostSide ** 2;

/**
 * A picture in the shape of what is drawn, cut or filled up as A1111 and sd-webui-controlnet do, but before it is resized: a second pass is
 * larger. What is drawn in a part (--padding-mask-crop) is cut elsewhere. @throws UserError for one that would be too large
 */
export function fitted(
  picture: Picture,
  fit: Fit | undefined,
  { width, height, paddingMaskCrop }: Sides & Pick<Settings, 'paddingMaskCrop'>,
): Picture {
  if (!fit || paddingMaskCrop !== undefined) return picture;
  const scales = [picture.width / width, picture.height / height];
  const scale = fit === 'crop' ? Math.min(...scales) : Math.max(...scales);
  const [w, h] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  if (w === picture.width && h === picture.height) return picture;
  if (w * h > mostFilled)
    throw new UserError(
      `a ControlNet unit's picture is ${picture.width}x${picture.height}, which resize_mode "Resize and Fill" brings to the shape of ${width}x${height} by ${w}x${h} pixels: send one that is nearer to it in shape`,
    );
  const background = fit === 'crop' ? [0, 0, 0] : edgeColour(picture);
  const data = Uint8Array.from({ length: 3 * w * h }, (_, i) => background[i % 3]);
  const out: Picture = { width: w, height: h, channels: 3, data };
  lay(out, picture, Math.trunc((w - picture.width) / 2), Math.trunc((h - picture.height) / 2));
  return out;
}

/** The median of the four edges, by channel, as numpy's cut to whole numbers. */
function edgeColour({ width, height, data }: Picture): number[] {
  const at = (x: number, y: number): number => 3 * (y * width + x);
  const places = [
    ...Array.from({ length: width }, (_, x) => [at(x, 0), at(x, height - 1)]),
    ...Array.from({ length: height }, (_, y) => [at(0, y), at(width - 1, y)]),
  ].flat();
  return [0, 1, 2].map((c) => {
    const levels = places.map((place) => data[place + c]).sort((a, b) => a - b);
    const middle = levels.length / 2; // there are two of each
    return Math.floor((levels[middle - 1] + levels[middle]) / 2);
  });
}
