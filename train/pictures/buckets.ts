// Aspect-ratio buckets: the sizes that pictures are cropped to. At 1024 they are the forty of SDXL (Podell et al. 2023,
// appendix I); at another resolution the same sides are scaled. A picture goes to the size nearest in aspect ratio by
// logarithm, so that wide and tall ones are treated alike.
import type { Size } from '../../models/text/conditioning.ts';

/** [height, width]. The first, 704 x 1344, is the one wide size to which the paper has no tall twin. */
const wideSizes: readonly Size[] = [
  [704, 1344],
  [512, 2048],
  [512, 1984],
  [512, 1920],
  [512, 1856],
  [576, 1792],
  [576, 1728],
  [576, 1664],
  [640, 1600],
  [640, 1536],
  [704, 1472],
  [704, 1408],
  [768, 1344],
  [768, 1280],
  [832, 1216],
  [832, 1152],
  [896, 1152],
  [896, 1088],
  [960, 1088],
  [960, 1024],
];

const sdxlSizes: readonly Size[] = [
  ...wideSizes,
  [1024, 1024],
  ...wideSizes.slice(1).map(([height, width]): Size => [width, height]),
];

/**
 * The sizes to train at, without repeats: the square alone, or with `aspectRatios` SDXL's sizes scaled from 1024 to
 * `resolution`. Sides are rounded to multiples of `step`, which is what the VAE and the UNet together divide by.
 */
export function bucketSizes(resolution: number, aspectRatios: boolean, step: number): Size[] {
  const side = (length: number) => Math.max(1, Math.round((length * resolution) / 1024 / step)) * step;
  const scaled = (aspectRatios ? sdxlSizes : [[1024, 1024] as Size]).map(
    ([height, width]): Size => [side(height), side(width)],
  );
  return [...new Map(scaled.map((size) => [size.join(), size])).values()];
}

/** The index of the bucket nearest in aspect ratio; the first of equals. */
export function nearestBucket([height, width]: Size, buckets: readonly Size[]): number {
  const distance = ([h, w]: Size) => Math.abs(Math.log(w / h) - Math.log(width / height));
  return buckets.reduce((best, size, i) => (distance(size) < distance(buckets[best]) ? i : best), 0);
}
