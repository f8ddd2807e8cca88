// Plans of conv2d's products: implicit ones over the image (conv2d.cu, on Hopper conv2d_sm90.cu), or where channels are few, plain
// ones beside im2col (plan_im2col.ts).
import {
  divideUp,
  FLOAT,
  type KernelLaunch,
  type LaunchArguments,
  type Plan,
  type PlanContext,
  type Pointers,
  THREADS,
  walking,
} from './plan.ts';
import { convolutionOfHalves } from './plan_conv2d_float32.ts';
import { hopperConvolution } from './plan_conv2d_sm90.ts';
import { choose, isWhole, join, type Size, TILE_THREADS } from './plan_gemm.ts';
import { convolutionByColumns } from './plan_im2col.ts';
import { hopperLaunches } from './plan_matrix_sm90.ts';

interface Convolution extends Size {
  readonly entry: string;
  readonly whole: boolean;
  readonly pointers: Pointers;
  /** Bias, shift and residual, as join() takes them. */
  readonly extras: Pointers;
  readonly rowsPerShift: number;
}

/** The launches on Hopper's own instructions, where the tensors allow it. */
function convolutionOnHopper(
  c: Convolution,
  geometry: readonly number[],
  context: PlanContext,
): KernelLaunch[] | undefined {
  if (context.dtype === 'float32')
    return c.entry === 'conv2d_forward' ? convolutionOfHalves(c.pointers, geometry, context) : undefined;
  const p = hopperConvolution(c.entry, c.pointers, geometry, context);
  if (!p) return undefined;
  const strides = [p.n * p.slabs, p.n] as const;
  const { extras, rowsPerShift } = c;
  return hopperLaunches(p, { strides, canSplit: true, extras, rowsPerShift }, context);
}

/**
 * The gradient of a strided convolution's input there: TMA cannot see the holes that strides leave, so dy is spread with zeros
 * between its pixels first. That is stride ** 2 times the products, which take a fraction of the other loop's time all the same.
 */
function spreadOnHopper(
  c: Convolution,
  geometry: readonly number[],
  context: PlanContext,
): KernelLaunch[] | undefined {
  const [n, h, w, channels, oh, ow, o, kh, kw, stride, ...padding] = geometry;
  if (c.entry !== 'conv2d_backward_x' || stride === 1 || !c.whole) return undefined;
  const [height, width] = [(oh - 1) * stride + 1, (ow - 1) * stride + 1];
  const elements = n * height * width * o;
  if (!context.hopper || context.dtype === 'float32' || elements >= 2 ** 31) return undefined;
  const [dx, dy, weight] = c.pointers;
  const to = context.workspace(elements * context.elementBytes);
  const dense = { ...c, pointers: [dx, to, weight] };
  const launches = convolutionOnHopper(
    dense,
    [n, h, w, channels, height, width, o, kh, kw, 1, ...padding],
    context,
  );
  const jobs = (elements * context.elementBytes) / 16;
  const first = walking('im2col', 'spread', jobs, THREADS, [to, dy, n, oh, ow, o, stride], context);
  return launches && [first, ...launches];
}

/** `pointers` begin with the output; the kernel takes the partial sums right after it. */
function convolution(c: Convolution, geometry: readonly number[], context: PlanContext): KernelLaunch[] {
  const hopper = convolutionOnHopper(c, geometry, context) ?? spreadOnHopper(c, geometry, context);
  if (hopper) return hopper;
  const whole = c.whole ? 3 : 0;
  const { tile, splits, kPart } = choose(c, whole, true, context);
  const partial = splits > 1 ? context.workspace(splits * c.m * c.n * FLOAT) : 0n;
  const [y, ...inputs] = c.pointers;
  const first: KernelLaunch = {
    family: 'conv2d',
    entry: `${c.entry}_${tile.name}`,
    grid: [divideUp(c.m, tile.side) * divideUp(c.n, tile.side), 1, splits],
    block: TILE_THREADS,
    shared: tile.shared,
    args: [y, partial, ...inputs, ...geometry, splits, kPart, whole],
  };
  if (splits === 1) return [first];
  return [first, join(y, partial, c.extras, [c.m, c.n, c.rowsPerShift, 0, splits], context)];
}

function convPlan(
  symbol: string,
  pointerCount: number,
  integerCount: number,
  sizes: (geometry: readonly number[]) => readonly [m: number, n: number, k: number],
): [string, Plan] {
  const launches = (args: LaunchArguments, context: PlanContext) => {
    const pointers = args.slice(0, pointerCount) as Pointers;
    const geometry = args.slice(pointerCount).map(Number);
    const narrow = convolutionByColumns(symbol, pointers, geometry, context);
    if (narrow) return narrow;
    const [m, n, k] = sizes(geometry);
    const [, , , c, oh, ow, o] = geometry;
    const own = geometry[12] ?? c; // of x's channels, before skip's
    const [, , , bias = 0n, shift = 0n, residual = 0n] = pointers;
    // Forward reads no row of o elements: only y has them.
    const whole = isWhole(symbol === 'conv2d_forward' ? [c, own] : [c, o], context);
    const size = { m, n, k, batch: 1, whole, pointers, rowsPerShift: oh * ow };
    return convolution({ entry: symbol, ...size, extras: [bias, shift, residual] }, geometry, context);
  };
  return [symbol, { signature: 'p'.repeat(pointerCount) + 'i'.repeat(integerCount), launches }];
}

export const convolutionPlans: readonly (readonly [string, Plan])[] = [
  convPlan('conv2d_forward', 7, 13, ([n, , , c, oh, ow, o, kh, kw]) => [n * oh * ow, o, kh * kw * c]),
  convPlan('conv2d_backward_x', 3, 12, ([n, h, w, c, , , o, kh, kw]) => [n * h * w, c, kh * kw * o]),
  convPlan('conv2d_backward_weight', 3, 12, ([n, , , c, oh, ow, o, kh, kw]) => [o, kh * kw * c, n * oh * ow]),
];
