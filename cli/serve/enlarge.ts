// A1111's upscaling of extras, to the pixel: both sides come to multiples of 8 below what is asked for, whatever enlarges, and where a
// size is asked for what lies past it may be cut off, with black where there is too little.
import { UserError } from '../../io/errors.ts';
import { lay, type Picture } from '../../io/pixels.ts';
import { pngText } from '../../io/png.ts';
import { resize } from '../../io/resize.ts';
import type { Upscaler } from '../../models/upscaler/upscaler.ts';
import { upscalerName } from '../sample/a1111_write.ts';
import type { Sides } from '../sample/hires_options.ts';
import type { Enlarging } from './messages.ts';
import { mostSide } from './served.ts';

/** Of pictures on the way to one, or of all that are answered at once. */
export const mostPixels = 4 * mostSide ** 2;

type OnTile = (done: number, all: number) => void;

/** A picture enlarged, with what A1111 tells of it. @throws UserError that calls it `name`, where it is too large, or nothing is left of it */
export function enlarged(
  picture: Picture,
  name: string,
  { upscalers, visibility, size }: Enlarging,
  networkOf: (upscaler: string) => Upscaler | undefined,
  onTile: OnTile,
): { picture: Picture; told: string } {
  const [first, second] = upscalers;
  if (first === 'None') return { picture, told: '' };
  const made = (upscaler: string) =>
    cropped(by(picture, name, size, [upscaler, networkOf(upscaler)], onTile), size);
  const isBlended = second !== undefined && second !== 'None' && visibility > 0;
  const result = isBlended ? blend(made(first), made(second), visibility) : made(first);
  return { picture: result, told: textOf(size, [first, ...(isBlended ? [second] : [])]) };
}

/** Enlarged by one upscaler: a network up to three times, and then resized. */
function by(
  picture: Picture,
  name: string,
  size: Enlarging['size'],
  [upscaler, network]: readonly [string, Upscaler | undefined],
  onTile: OnTile,
): Picture {
  const scale = 'by' in size ? size.by : Math.max(size.width / picture.width, size.height / picture.height);
  const floored = (side: number) => Math.floor((side * scale) / 8) * 8;
  const to = { width: floored(picture.width), height: floored(picture.height) };
  check(to, name);
  const times = network?.scale ?? scale;
  let made = picture;
  for (let i = 0; i < 3; i++) {
    const { width, height } = made;
    if (width >= to.width && height >= to.height && (i > 0 || scale !== 1)) break;
    const next = { width: Math.trunc(width * times), height: Math.trunc(height * times) };
    if (next.width * next.height > mostPixels)
      throw new UserError(
        `${name} would be enlarged by way of ${next.width}x${next.height} pixels; send a smaller one`,
      );
    made = network
      ? network.enlarge(made, { onTile })
      : resize(made, next.width, next.height, upscaler === 'Nearest' ? 'nearest' : 'lanczos');
    if (made.width === width && made.height === height) break;
  }
  return resize(made, to.width, to.height, 'lanczos');
}

function check({ width, height }: Sides, name: string): void {
  if (Math.max(width, height) > mostSide)
    throw new UserError(
      `${name} would be ${width}x${height} pixels, and ${mostSide} a side are the most; ask for less`,
    );
  if (Math.min(width, height) < 8)
    throw new UserError(
      `${name} would be ${width}x${height} pixels, as sides are cut to multiples of 8; ask for more`,
    );
}

function cropped(picture: Picture, size: Enlarging['size']): Picture {
  if ('by' in size || !size.crop) return picture;
  const { width, height } = size;
  const out: Picture = { width, height, channels: 3, data: new Uint8Array(3 * width * height) };
  const half = (side: number) => Math.floor(side / 2);
  lay(out, picture, half(width) - half(picture.width), half(height) - half(picture.height));
  return out;
}

/** As Pillow's, in float32 and cut to whole levels. */
function blend(first: Picture, second: Picture, visibility: number): Picture {
  const share = Math.fround(visibility);
  const data = first.data.map((level, i) =>
    Math.fround(level + Math.fround(share * (second.data[i] - level))),
  );
  return { ...first, data };
}

/** A number as Python writes it. */
const decimal = (value: number): string => (Number.isInteger(value) ? `${value}.0` : `${value}`);

const textOf = (size: Enlarging['size'], [first, second]: readonly string[]): string =>
  [
    'by' in size
      ? `Postprocess upscale by: ${decimal(size.by)}`
      : `Postprocess upscale to: ${size.width}x${size.height}`,
    ...('by' in size || !size.crop ? [] : [`Postprocess crop to: ${size.width}x${size.height}`]),
    `Postprocess upscaler: ${upscalerName(first)}`,
    ...(second === undefined ? [] : [`Postprocess upscaler 2: ${upscalerName(second)}`]),
  ].join(', ');

/** The settings in a file of a picture that is made larger, which are still those that it was drawn with. */
export function keptText(file: Uint8Array, name: string): Record<string, string> {
  const bytes = Buffer.from(file.buffer, file.byteOffset, file.byteLength);
  if (bytes.toString('latin1', 1, 4) !== 'PNG') return {};
  const { parameters, sdxl } = pngText(bytes, name);
  return { ...(parameters !== undefined && { parameters }), ...(sdxl !== undefined && { sdxl }) };
}
