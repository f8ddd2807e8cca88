// Aspect-ratio buckets: the sizes that pictures are cropped to. At 1024 they are the forty of SDXL (Podell et al. 2023,
// appendix I); at another resolution the same sides are scaled. A picture goes to the size nearest in aspect ratio by
// logarithm, so that wide and tall ones are treated alike. One that would be enlarged may have a size of its own.
import type { Size } from '../../models/text/conditioning.ts';
import type { Run } from '../run/run.ts';

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

/** The size nearest in aspect ratio; the first of equals. */
export function nearestSize([height, width]: Size, sizes: readonly Size[]): Size {
  const distance = ([h, w]: Size) => Math.abs(Math.log(w / h) - Math.log(width / height));
  return sizes.reduce((best, size) => (distance(size) < distance(best) ? size : best));
}

/**
 * A picture's own size, cut to multiples of `step`: for one that its bucket would enlarge. Where that is more than the area of
 * `resolution`, as of a narrow one, it is shrunk to it first, as kohya's trainer does. A side shorter than `step` becomes that.
 */
function ownSize([height, width]: Size, resolution: number, step: number): Size {
  const scale = Math.min(1, resolution / Math.sqrt(height * width));
  const side = (length: number) => Math.max(1, Math.floor((length * scale) / step)) * step;
  return [side(height), side(width)];
}

/** What a dataset says of sizes. */
type Sizing = Pick<Run['dataset'], 'resolution' | 'aspect_ratio_buckets' | 'bucket_no_upscale'>;

/** The resolutions of a dataset that names one or several. */
export const resolutionsOf = ({ resolution }: Pick<Sizing, 'resolution'>): readonly number[] =>
  [resolution].flat();

/** All sizes that pictures may be cropped to, and of a picture those that it is: one for each resolution, but none twice. */
export function openBuckets(sizing: Sizing, step: number) {
  const { aspect_ratio_buckets, bucket_no_upscale } = sizing;
  const levels = resolutionsOf(sizing).map((resolution) => ({
    resolution,
    sizes: bucketSizes(resolution, aspect_ratio_buckets, step),
  }));
  const buckets: Size[] = [];
  const places = new Map<string, number>();
  const placeOf = (size: Size): number => {
    const place = places.get(size.join()) ?? buckets.push(size) - 1;
    places.set(size.join(), place);
    return place;
  };
  for (const { sizes } of levels) sizes.forEach(placeOf);
  const bucketsOf = (size: Size): number[] => {
    const found = levels.map(({ resolution, sizes }) => {
      const nearest = nearestSize(size, sizes);
      const enlarges = nearest[0] > size[0] || nearest[1] > size[1];
      return placeOf(bucket_no_upscale && enlarges ? ownSize(size, resolution, step) : nearest);
    });
    return [...new Set(found)];
  };
  return { buckets, bucketsOf };
}
