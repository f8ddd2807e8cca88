// One picture on its way to the VAE: resized to cover its bucket, cropped, perhaps mirrored, and scaled to [-1, 1]; or its alpha, or
// the conditioning image beside it, done the same to, but in [0, 1]. What is done is decided first, as numbers (Geometry): they go
// into the time ids and into the cache's keys, so that the model is always told of the crop it sees. Resizing and rounding follow
// torchvision on Pillow pictures.
import { decodeAlpha, decodePicture } from '../../io/image.ts';
import type { Pixels } from '../../io/pixels.ts';
import { type ResizeFilter, resize } from '../../io/resize.ts';
import { type Size, timeIds } from '../../models/text/conditioning.ts';
import { draws } from '../data/draws.ts';

export interface Geometry {
  /** Of the source, upright. */
  original: Size;
  resized: Size;
  /** Where the crop begins in the resized picture, [top, left], before mirroring. */
  crop: readonly [top: number, left: number];
  target: Size;
  flip: boolean;
}

/**
 * The geometry of a picture's `variant`-th crop, mirrored or not. A run takes the epoch modulo `dataset.crops` for the variant, and draws
 * for each epoch whether it mirrors (pictures.ts).
 */
export function geometryOf(
  original: Size,
  target: Size,
  /** Crop at the centre rather than at random. */
  { center_crop }: { center_crop: boolean },
  { seed, key, variant, flip }: { seed: number; key: number; variant: number; flip: boolean },
): Geometry {
  const resized = coveringSize(original, target);
  const room = [resized[0] - target[0], resized[1] - target[1]];
  const place = draws(seed, variant, key, 'crop');
  const begin = (side: number) => (center_crop ? halfOf(side) : place.integer(side + 1));
  const crop = [begin(room[0]), begin(room[1])] as const;
  return { original, resized, crop, target, flip };
}

/** The smallest size of `original`'s shape that covers `target`; the longer side is cut to whole pixels. */
function coveringSize([height, width]: Size, [targetHeight, targetWidth]: Size): Size {
  // Compared as products: exact, where quotients are not.
  if (width * targetHeight >= height * targetWidth) {
    return [targetHeight, Math.max(targetWidth, Math.trunc((targetHeight * width) / height))];
  }
  return [Math.max(targetHeight, Math.trunc((targetWidth * height) / width)), targetWidth];
}

/** Half of `side`, halves to even, as Python's round. */
const halfOf = (side: number): number => (side % 4 === 3 ? (side + 1) / 2 : Math.floor(side / 2));

type Range = readonly [low: number, high: number];

interface Kind {
  decode(file: Uint8Array, name: string): Promise<Pixels>;
  range: Range;
}

/** What may be read of a file. */
const readings = {
  /** What is transparent lies on white. */
  picture: { decode: (file, name) => decodePicture(file, name, { onWhite: true }), range: [-1, 1] },
  /** The colours that are stored beneath show, as in kohya's trainer: where alpha is the loss's mask. */
  colours: { decode: decodePicture, range: [-1, 1] },
  /** The same in the range of a ControlNet or T2I-Adapter, as `sdxl sample` reads it, and of a mask. */
  conditioning: { decode: decodePicture, range: [0, 1] },
  /** How opaque it is, [h, w, 1]. */
  alpha: { decode: decodeAlpha, range: [0, 1] },
} as const satisfies Record<string, Kind>;

export type Reading = keyof typeof readings;

/** A file's picture, or what else is read of it, after `geometry`: [h, w, channels]. @throws UserError */
export async function readPixels(
  file: Uint8Array,
  name: string,
  geometry: Geometry,
  interpolation: ResizeFilter,
  reading: Reading = 'picture',
): Promise<Float32Array> {
  const { decode, range } = readings[reading];
  return preparePicture(await decode(file, name), geometry, interpolation, range);
}

/** The picture after `geometry`: [h, w, channels] in that range. */
export function preparePicture(
  picture: Pixels,
  geometry: Geometry,
  interpolation: ResizeFilter,
  [low, high]: Range = [-1, 1],
): Float32Array {
  const { resized, crop, target, flip } = geometry;
  const [height, width] = target;
  const window = { top: crop[0], left: crop[1], height, width };
  const { data, channels } = resize(picture, resized[1], resized[0], interpolation, window);
  const out = new Float32Array(height * width * channels);
  let at = 0;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const from = (y * width + (flip ? width - 1 - x : x)) * channels;
      for (let c = 0; c < channels; c++) out[at++] = (high - low) * Math.fround(data[from + c] / 255) + low;
    }
  }
  return out;
}

/**
 * What the UNet is told: original h, w, crop top, left, target h, w; for a model that wants an aesthetic score, that score
 * in place of the target. A mirrored crop counts from the other side, as if the picture had been mirrored first.
 */
export function timeIdsOf(
  { original, resized, crop, target, flip }: Geometry,
  aestheticScore?: number,
): number[] {
  const left = flip ? resized[1] - crop[1] - target[1] : crop[1];
  const [row] = timeIds(
    {
      original_size: original,
      crops_coords_top_left: [crop[0], left],
      aesthetic_score: aestheticScore,
    },
    target,
    { aesthetic: aestheticScore !== undefined, guided: false, images: 1, interleaved: false },
  );
  return row;
}
