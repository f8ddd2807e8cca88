// Plans of convolutions with so few channels in or out that a tap's are no 16 bytes, as plain matrix products beside im2col and
// col2im (im2col.cu). With 4 channels in, the taps of a pixel are laid out as a row of 36, and padded to 40; with 4 out, the
// product makes 36 columns of each pixel of x, and a pixel of y sums nine of them. The large image is read once either way.
import {
  divideUp,
  type KernelLaunch,
  type LaunchArgument,
  type PlanContext,
  type Pointers,
  THREADS,
  walking,
} from './plan.ts';
import { product, productSums } from './plan_matrix.ts';

/** Channels out that are few, and columns that are too many to lay out. */
const FEW = 16;
const MOST_COLUMNS = 256;

/** What im2col.cu calls so: an image, and the grid of pixels whose taps see it. */
interface Geometry {
  readonly n: number;
  /** h, w, channels. */
  readonly image: readonly [number, number, number];
  /** Height and width. */
  readonly grid: readonly [number, number];
  /** kh, kw, stride, top, left, turned. */
  readonly taps: readonly [number, number, number, number, number, 0 | 1];
}
const numbersOf = ({ image, grid, taps }: Geometry): number[] => [...image, ...grid, ...taps];
const pixelsOf = ({ n, grid: [height, width] }: Geometry): number => n * height * width;

interface Columns {
  readonly launches: readonly KernelLaunch[];
  readonly at: bigint;
  /** Of a row, in whole 16 bytes, the last ones zeros. */
  readonly padded: number;
}

function columnsOf(from: bigint, g: Geometry, context: PlanContext): Columns {
  const [kh, kw] = g.taps;
  const wide = 16 / context.elementBytes;
  const across = divideUp(kh * kw * g.image[2], wide);
  const pixels = pixelsOf(g);
  const at = context.workspace(pixels * across * 16);
  // A thread has 8 bytes.
  const args = [at, from, pixels, ...numbersOf(g), 2 * across];
  const launches = [walking('im2col', 'im2col', pixels * 2 * across, THREADS, args, context)];
  return { at, padded: across * wide, launches };
}

/** The rows of a matrix, padded with zeros. */
function paddedRows(from: bigint, rows: number, length: number, context: PlanContext): Columns {
  if (length % (16 / context.elementBytes) === 0) return { launches: [], at: from, padded: length };
  return columnsOf(from, { n: rows, image: [1, 1, length], grid: [1, 1], taps: [1, 1, 1, 0, 0, 0] }, context);
}

interface Sums {
  readonly y: bigint;
  readonly sums: bigint;
  /** Columns of a row of sums. */
  readonly row: number;
  /** bias, shift, residual. */
  readonly extras?: readonly LaunchArgument[];
}

function summed(
  { y, sums, row, extras = [0n, 0n, 0n] }: Sums,
  g: Geometry,
  context: PlanContext,
): KernelLaunch {
  const args = [y, sums, ...extras, pixelsOf(g), ...numbersOf(g), row];
  return walking('im2col', 'col2im', pixelsOf(g) * g.image[2], THREADS, args, context);
}

/** A convolution's call: n h w c, oh ow o, kh kw, stride, top, left. */
interface Call {
  readonly symbol: string;
  readonly pointers: Pointers;
  readonly geometry: readonly number[];
}

/** The launches under a convolution's symbol; undefined where its channels are not few. */
export function convolutionByColumns(
  symbol: string,
  pointers: Pointers,
  geometry: readonly number[],
  context: PlanContext,
): KernelLaunch[] | undefined {
  const [n, h, w, c, oh, ow, o, kh, kw, stride, , , own = c] = geometry;
  const [columns, wide] = [kh * kw * c, 16 / context.elementBytes];
  if (kh * kw === 1 || own !== c) return undefined;
  const fewIn = c % wide !== 0 && columns <= MOST_COLUMNS;
  const fewOut = c % wide === 0 && o < FEW && stride === 1;
  const elements = n * Math.max(h * w, oh * ow) * Math.max(fewIn ? columns : 0, fewOut ? kh * kw * o : 0);
  if (!(fewIn || fewOut) || elements >= 2 ** 30) return undefined;
  return (fewOut ? ofFewOutputs : ofFewInputs)({ symbol, pointers, geometry }, context);
}

function ofFewOutputs({ symbol, pointers, geometry }: Call, context: PlanContext): KernelLaunch[] {
  const [n, h, w, c, oh, ow, o, kh, kw, stride, top, left] = geometry;
  const [y, first, second, bias = 0n, shift = 0n, residual = 0n] = pointers;
  const [m, width] = [n * h * w, kh * kw * o];
  if (symbol === 'conv2d_forward') {
    const size = { batch: 1, m, n: width, k: c, aStride: c, bStride: c };
    const { launches, sums, row } = productSums({ layout: 'nt', a: first, b: second, ...size }, context);
    const g: Geometry = { n, image: [h, w, o], grid: [oh, ow], taps: [kh, kw, stride, top, left, 0] };
    return [...launches, summed({ y, sums, row, extras: [bias, shift, residual] }, g, context)];
  }
  const g: Geometry = { n, image: [oh, ow, o], grid: [h, w], taps: [kh, kw, stride, top, left, 1] };
  const a = columnsOf(first, g, context);
  const operands = { batch: 1, a: a.at, b: second, y, aStride: a.padded, bStride: c, aPadded: true };
  const sizes =
    symbol === 'conv2d_backward_weight'
      ? ({ layout: 'tn', m: width, n: c, k: m } as const)
      : ({ layout: 'nn', m, n: c, k: width } as const);
  return [...a.launches, ...product({ ...sizes, ...operands }, context)];
}

function ofFewInputs({ symbol, pointers, geometry }: Call, context: PlanContext): KernelLaunch[] | undefined {
  const [n, h, w, c, oh, ow, o, kh, kw, stride, top, left] = geometry;
  const [y, first, second, bias = 0n, shift = 0n, residual = 0n] = pointers;
  const [columns, made] = [kh * kw * c, n * oh * ow];
  if (symbol === 'conv2d_backward_x') {
    if (stride !== 1 || o % (16 / context.elementBytes)) return undefined;
    const b = paddedRows(second, o, columns, context);
    const size = { batch: 1, m: made, n: b.padded, k: o, aStride: o, bStride: b.padded };
    const { launches, sums, row } = productSums({ layout: 'nn', a: first, b: b.at, ...size }, context);
    const g: Geometry = { n, image: [oh, ow, c], grid: [h, w], taps: [kh, kw, stride, top, left, 1] };
    return [...b.launches, ...launches, summed({ y, sums, row }, g, context)];
  }
  const seen: Geometry = { n, image: [h, w, c], grid: [oh, ow], taps: [kh, kw, stride, top, left, 0] };
  if (symbol === 'conv2d_forward') {
    if (shift) return undefined;
    const a = columnsOf(first, seen, context);
    const b = paddedRows(second, o, columns, context);
    const size = { batch: 1, m: made, n: o, k: a.padded, aStride: a.padded, bStride: b.padded };
    const last = product({ layout: 'nt', a: a.at, b: b.at, y, bias, residual, ...size }, context);
    return [...a.launches, ...b.launches, ...last];
  }
  const b = columnsOf(second, seen, context);
  const exact = b.padded === columns;
  const to = exact ? y : context.workspace(o * b.padded * context.elementBytes);
  const size = { batch: 1, m: o, n: b.padded, k: made, aStride: o, bStride: b.padded };
  const launches = [...b.launches, ...product({ layout: 'tn', a: first, b: b.at, y: to, ...size }, context)];
  const cut = [y, to, o, b.padded, 0, columns, 1];
  return exact ? launches : [...launches, walking('move', 'slice_forward', o, 1, cut, context)];
}
