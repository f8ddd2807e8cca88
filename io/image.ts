// Pictures between files, 8-bit pixels and the model's floats. Decoding (sharp) gives what Pillow gives after
// exif_transpose and convert('RGB'): alpha dropped, colour profiles ignored, 16 bits cut to 8. The float
// conversions are diffusers' VaeImageProcessor (image_processor.py) and transformers' CLIPImageProcessor, in
// float32 step by step so that they agree to the bit.
import type { Sharp } from 'sharp';
import { UserError } from './errors.ts';
import { readBytes, writeFileAtomic } from './files.ts';
import type { Mask, Picture, Pixels } from './pixels.ts';
import { encodePng } from './png.ts';
import { resize } from './resize.ts';

const formats: readonly (string | undefined)[] = ['png', 'jpeg', 'webp'];

/** Decodes a PNG, JPEG or WebP file. @throws UserError when it is missing, damaged or another format */
export async function readPicture(path: string): Promise<Picture> {
  return decodePicture(readBytes(path), path);
}

/**
 * As `readPicture`, from the bytes of a file; `name` is what error messages call it. With `onWhite` what is transparent
 * lies on white instead of showing the colours that were stored beneath it. A picture of more than `mostPixels` is refused unread.
 */
export async function decodePicture(
  file: Uint8Array,
  name: string,
  { onWhite = false, mostPixels }: { onWhite?: boolean; mostPixels?: number } = {},
): Promise<Picture> {
  return decoded(file, name, mostPixels, async (image, inks) => {
    const opaque = onWhite && !inks ? image.flatten({ background: '#ffffff' }) : image.removeAlpha();
    const { width, height, data } = inks
      ? await pixelsOf(opaque.pipelineColourspace('cmyk'), 'cmyk', 4)
      : await pixelsOf(opaque, 'srgb', 3);
    return { width, height, channels: 3, data: inks ? withoutInks(data) : data };
  });
}

/** How opaque a picture is, as `decodePicture` reads it and Pillow's convert('RGBA') tells: 255 all over where it has no alpha. */
export async function decodeAlpha(
  file: Uint8Array,
  name: string,
  { mostPixels }: { mostPixels?: number } = {},
): Promise<Mask> {
  return decoded(file, name, mostPixels, async (image) => {
    const { width, height, data } = await pixelsOf(image.ensureAlpha(), 'srgb', 4);
    const alpha = new Uint8Array(width * height);
    for (let i = 0; i < alpha.length; i++) alpha[i] = data[4 * i + 3];
    return { width, height, channels: 1, data: alpha };
  });
}

/** What `make` makes of a file's picture, upright; `inks` tells that it is CMYK. @throws UserError */
async function decoded<P extends Pixels>(
  file: Uint8Array,
  name: string,
  mostPixels: number | undefined,
  make: (image: Sharp, inks: boolean) => Promise<P>,
): Promise<P> {
  // Imported late: most commands never decode a picture.
  const { default: sharp } = await import('sharp');
  try {
    const image = sharp(file, {
      ...{ ignoreIcc: true, failOn: 'error', autoOrient: true },
      limitInputPixels: mostPixels,
    });
    const { format, space } = await image.metadata();
    if (!formats.includes(format)) throw new Error(`the format is ${format}`);
    return await make(image, space === 'cmyk');
  } catch (error) {
    const told = (error as Error).message.trim().replace(/\s+/g, ' ');
    // libvips keeps its errors for all threads together: where several decode, the words of this one may be gone.
    const reason = told === 'Unknown error' ? 'its bytes are damaged' : told;
    throw new UserError(
      `${name} cannot be read as a picture (${reason}): give a sound PNG, JPEG or WebP file`,
    );
  }
}

async function pixelsOf(image: Sharp, space: 'srgb' | 'cmyk', wanted: number) {
  const { data, info } = await image
    .toColourspace(space)
    .raw({ depth: 'uchar' })
    .toBuffer({ resolveWithObject: true });
  const { width, height, channels } = info;
  if (channels !== wanted) throw new Error(`the picture has ${channels} channels`);
  return { width, height, data: new Uint8Array(data) };
}

/** Pillow's way from CMYK to RGB, by no colour profile: what is left of white under each ink and black. */
function withoutInks(cmyk: Uint8Array): Uint8Array {
  const rgb = new Uint8Array((cmyk.length / 4) * 3);
  for (let i = 0, at = 0; i < cmyk.length; i += 4) {
    const light = 255 - cmyk[i + 3];
    for (let c = 0; c < 3; c++) rgb[at++] = light - Math.round((cmyk[i + c] * light) / 255);
  }
  return rgb;
}

/** Decodes a picture as grey levels. @throws UserError as `readPicture` */
export async function readMask(path: string): Promise<Mask> {
  return toGrey(await readPicture(path));
}

/** Pillow's convert('L'): ITU-R 601 luma in 16-bit fixed point, rounded. */
export function toGrey({ width, height, data: rgb }: Picture): Mask {
  const data = new Uint8Array(width * height);
  for (let i = 0; i < data.length; i++) {
    data[i] = (rgb[3 * i] * 19595 + rgb[3 * i + 1] * 38470 + rgb[3 * i + 2] * 7471 + 0x8000) >> 16;
  }
  return { width, height, channels: 1, data };
}

/** Writes `picture` as PNG, all or nothing; `text` holds metadata such as the prompt. @throws UserError */
export function writePng(path: string, picture: Pixels, text: Readonly<Record<string, string>> = {}): void {
  writeFileAtomic(path, encodePng(picture, text));
}

/**
 * The VAE shrinks pictures by 8, so their sides are cut down to multiples of 8 unless the caller says
 * otherwise.
 */
const vaeSide = (side: number): number => side - (side % 8);

/** @throws UserError for what no reader of pictures gives, such as a path, or a promise of one: JavaScript has no types */
function assertPixels(picture: Pixels): void {
  if (!(picture?.data instanceof Uint8Array))
    throw new UserError('what is to be preprocessed is no picture: give what await readPicture(PATH) gives');
}

/** One picture as a ControlNet takes it: [1, 3, h, w] in [0, 1], resized by Lanczos to `width` x `height`. */
export function preprocessControl(
  picture: Picture,
  width: number = vaeSide(picture?.width),
  height: number = vaeSide(picture?.height),
): { data: Float32Array; shape: [1, 3, number, number] } {
  assertPixels(picture);
  return { data: inUnit(picture, width, height), shape: [1, 3, height, width] };
}

/** The same as a T2I-Adapter takes it, in colour or as grey levels, [1, 1 or 3, h, w]. */
export function preprocessAdapter(
  picture: Picture,
  channels: Pixels['channels'],
  width: number,
  height: number,
): { data: Float32Array; shape: [1, 1 | 3, number, number] } {
  const seen = channels === 1 ? toGrey(picture) : picture;
  return { data: inUnit(seen, width, height), shape: [1, channels, height, width] };
}

/** Pixels in [0, 1], channel by channel, resized. */
function inUnit(picture: Pixels, width: number, height: number): Float32Array {
  const { data: pixels, channels } = resize(picture, width, height, 'lanczos');
  const area = width * height;
  const data = new Float32Array(channels * area);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < channels; c++) data[c * area + i] = pixels[channels * i + c] / 255;
  }
  return data;
}

/** One picture as the VAE takes it: the same in [-1, 1]. */
export function preprocess(
  picture: Picture,
  width?: number,
  height?: number,
): { data: Float32Array; shape: [1, 3, number, number] } {
  const { data, shape } = preprocessControl(picture, width, height);
  for (let i = 0; i < data.length; i++) data[i] = 2 * data[i] - 1;
  return { data, shape };
}

/** The mean and standard deviation of each channel that CLIP's pictures are normalised by (OPENAI_CLIP_MEAN, _STD). */
const clipMean = Float32Array.of(0.48145466, 0.4578275, 0.40821073);
const clipStd = Float32Array.of(0.26862954, 0.26130258, 0.27577711);

/**
 * One picture as CLIP's vision encoder takes it (transformers' CLIPImageProcessor): the shorter side resized to `size` pixels by
 * bicubic, the middle `size` x `size` of that, [1, 3, size, size], normalised.
 */
export function preprocessClip(
  picture: Picture,
  size: number,
): { data: Float32Array; shape: [1, 3, number, number] } {
  const shorter = Math.min(picture.width, picture.height);
  const [width, height] = [picture.width, picture.height].map((side) =>
    side === shorter ? size : Math.trunc((size * side) / shorter),
  );
  const [left, top] = [width, height].map((side) => Math.floor((side - size) / 2));
  const window = { left, top, width: size, height: size };
  const { data: pixels } = resize(picture, width, height, 'bicubic', window);
  const data = new Float32Array(3 * size * size);
  for (let i = 0; i < size * size; i++) {
    for (let c = 0; c < 3; c++) {
      const centred = Math.fround(Math.fround(pixels[3 * i + c] * (1 / 255)) - clipMean[c]);
      data[c * size * size + i] = centred / clipStd[c];
    }
  }
  return { data, shape: [1, 3, size, size] };
}

/**
 * A mask as inpainting takes it: [1, 1, h, w], 1 where its grey level is at least one half. Resized before
 * greying.
 */
export function preprocessMask(
  mask: Picture | Mask,
  width: number = vaeSide(mask?.width),
  height: number = vaeSide(mask?.height),
): { data: Float32Array; shape: [1, 1, number, number] } {
  assertPixels(mask);
  const resized = resize(mask, width, height, 'lanczos');
  const { data: grey } = resized.channels === 3 ? toGrey(resized) : resized;
  return {
    data: Float32Array.from(grey, (value) => (value / 255 >= 0.5 ? 1 : 0)),
    shape: [1, 1, height, width],
  };
}

/** Decoded values [n, 3, h, w] as n pictures: 255 (z / 2 + 0.5), in float32 step by step, clamped and rounded half to even. */
export function toPictures(z: Float32Array, [n, channels, height, width]: readonly number[]): Picture[] {
  if (channels !== 3) throw new Error(`a picture has 3 channels, not ${channels}`);
  const area = height * width;
  const size = 3 * area;
  // Filling a clamped array rounds halves to even, as numpy does.
  const bytes = new Uint8ClampedArray(z.length);
  for (let plane = 0; plane < 3 * n; plane++) {
    const first = Math.floor(plane / 3) * size + (plane % 3);
    for (let i = 0; i < area; i++) {
      const value = Math.fround(z[plane * area + i] * 0.5 + 0.5);
      bytes[first + 3 * i] = Math.fround(255 * Math.min(1, Math.max(0, value)));
    }
  }
  return Array.from({ length: n }, (_, image) => ({
    width,
    height,
    channels: 3,
    data: new Uint8Array(bytes.buffer, image * size, size),
  }));
}
