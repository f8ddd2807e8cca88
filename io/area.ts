// A picture made smaller by areas, to the byte as OpenCV's INTER_AREA, whose products and sums are float32: each pixel is the mean of what
// it covers, in which a pixel that is half covered counts half. (Pillow's box filter, which knows no halves, is another.)
import type { Picture } from './pixels.ts';

/** The pixels that one of the result covers, with their shares. */
interface Span {
  first: number;
  shares: Float32Array;
}

/** Shares add up to one, or where `isWhole` are ones. */
function spansOf(from: number, to: number, isWhole: boolean): Span[] {
  const scale = from / to;
  return Array.from({ length: to }, (_, i) => {
    const [begin, end] = [i * scale, Math.min(from, (i + 1) * scale)];
    const first = Math.floor(begin + 1e-3); // as there, a share below a thousandth is none
    const last = Math.min(from, Math.ceil(end - 1e-3));
    const covered = (at: number): number => Math.min(at + 1, end) - Math.max(at, begin);
    const all = isWhole ? 1 : end - begin;
    const shares = Float32Array.from({ length: last - first }, (_, j) => covered(first + j) / all);
    return { first, shares };
  });
}

/** The nearest whole number, or the even one of two. */
const evenly = (value: number): number => {
  const floor = Math.floor(value);
  const up = value - floor > 0.5 || (value - floor === 0.5 && floor % 2 === 1);
  return floor + Number(up);
};

/**
 * `picture` in `width` x `height` pixels, neither more than it has. Where both sides are whole times as long, levels are added up and divided
 * at the end, and means of four rounded up; all others are weighed, and rounded to even.
 */
export function shrinkByArea(picture: Picture, width: number, height: number): Picture {
  const isWhole = picture.width % width === 0 && picture.height % height === 0;
  const area = isWhole ? (picture.width / width) * (picture.height / height) : 1;
  const isHalf = picture.width === 2 * width && picture.height === 2 * height;
  const rounded = isHalf ? (value: number) => Math.floor(value + 0.5) : evenly;
  const across = spansOf(picture.width, width, isWhole);
  const data = new Uint8Array(3 * width * height);
  const row = new Float32Array(3 * width);
  const sums = new Float32Array(3 * width);
  for (const [y, { first, shares }] of spansOf(picture.height, height, isWhole).entries()) {
    sums.fill(0);
    for (const [i, share] of shares.entries()) {
      addColumns(picture, first + i, across, row);
      for (let k = 0; k < row.length; k++) sums[k] += Math.fround(share * row[k]);
    }
    for (let k = 0; k < sums.length; k++)
      data[y * sums.length + k] = rounded(Math.fround(sums[k] * Math.fround(1 / area)));
  }
  return { width, height, channels: 3, data };
}

/** Row `y` of the picture, each pixel of the result a mean over what it covers of that. */
function addColumns({ width, data }: Picture, y: number, across: readonly Span[], row: Float32Array): void {
  row.fill(0);
  for (const [x, { first, shares }] of across.entries())
    for (const [j, share] of shares.entries())
      for (let c = 0; c < 3; c++)
        row[3 * x + c] += Math.fround(share * data[3 * (y * width + first + j) + c]);
}
