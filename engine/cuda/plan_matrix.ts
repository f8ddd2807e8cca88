// Plans of the matrix products: a launch that reads B once where A has few rows (gemv.cu), Hopper's where it takes them, and else gemm.cu's.
import {
  divideUp,
  FLOAT,
  type KernelLaunch,
  type LaunchArguments,
  type Plan,
  type PlanContext,
  type Pointers,
  walking,
} from './plan.ts';
import { choose, GEGLU, GEGLU_BLOCK, isWhole, join, TILE_THREADS } from './plan_gemm.ts';
import { onHopper, type Product, projections } from './plan_matrix_sm90.ts';

const FEW_ROWS = 16;
const ROWS_TOGETHER = 4; // gemv.cu

/** A launch that reads B once, where A has a few rows, all of whole chunks. */
function byRows(p: Product, context: PlanContext): KernelLaunch | undefined {
  const { layout, m, n, k, batch, a, b, activation = 0 } = p;
  if (layout !== 'nt' || m > FEW_ROWS || batch !== 1 || activation === GEGLU || p.yStride) return undefined;
  if (p.aStride !== k || p.bStride !== k || !isWhole([k], context) || (a | b) % 16n !== 0n) return undefined;
  return {
    ...{ family: 'gemv', entry: 'gemv', block: 128, shared: 0 },
    grid: [n, divideUp(m, ROWS_TOGETHER), 1],
    args: [p.y, p.sums ?? 0n, a, b, p.bias ?? 0n, p.residual ?? 0n, m, n, k, activation],
  };
}

/** The launches of one product, or of a batch of them. */
export function product(p: Product, context: PlanContext): KernelLaunch[] {
  const few = byRows(p, context);
  if (few) return [few];
  const hopper = onHopper(p, context);
  if (hopper) return hopper;
  const { layout, m, k, batch, bias = 0n, residual = 0n, activation = 0, sums } = p;
  const [along, bAlong] = [layout[0] === 'n', layout[1] === 't'];
  const half = activation === GEGLU ? p.n : 0;
  const n = half ? divideUp(p.n, GEGLU_BLOCK) * 2 * GEGLU_BLOCK : p.n;
  const [aBatch, bBatch, yBatch] = [p.aBatch ?? [0, 0], p.bBatch ?? [0, 0], p.yBatch ?? [0, 0]];
  const aWhole = isWhole([p.aPadded ? 0 : along ? k : m, p.aStride, ...aBatch], context);
  const bWhole = isWhole([bAlong ? k : n, p.bStride, ...bBatch], context);
  const whole = Number(aWhole) + 2 * Number(bWhole);
  const canSplit = batch === 1 && !half && sums === undefined;
  const choice = choose({ m, n, k, batch }, whole, canSplit, context);
  const { tile, splits, kPart } = choice;
  const partial = sums ?? (splits > 1 ? context.workspace(splits * m * n * FLOAT) : 0n);
  const first: KernelLaunch = {
    family: 'gemm',
    entry: `gemm_${layout}_${tile.name}`,
    grid: [divideUp(m, tile.side) * divideUp(n, tile.side), 1, batch * splits],
    block: TILE_THREADS,
    shared: tile.shared,
    args: [
      ...[p.y, partial, p.a, p.b, bias, 0n, residual, m, n, k, p.aStride, p.bStride, p.n, p.yStride ?? p.n],
      ...[p.innerBatches ?? 1, ...aBatch, ...bBatch, ...yBatch, 1, activation, half, splits, kPart, whole],
    ],
  };
  if (splits === 1) return [first];
  return [first, join(p.y, partial, [bias, 0n, residual], [m, n, 1, activation, splits], context)];
}

/** The float sums of a product alone, [m][row]. On Hopper they leave two at a time, so that `row` is even there. */
export function productSums(
  p: Omit<Product, 'y'>,
  context: PlanContext,
): { readonly launches: KernelLaunch[]; readonly sums: bigint; readonly row: number } {
  const sumsRow = p.n + (p.n % 2);
  const sums = context.workspace(p.m * sumsRow * FLOAT);
  const hopper = onHopper({ ...p, y: 0n, sums, sumsRow }, context);
  if (hopper) return { launches: hopper, sums, row: sumsRow };
  return { launches: product({ ...p, y: 0n, sums }, context), sums, row: p.n };
}

export function linearForward(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [y, a, b, bias, residual] = args as Pointers;
  const [m, n, k, activation] = args.slice(5).map(Number);
  const size = { m, n, k, batch: 1, aStride: k, bStride: k };
  return product({ layout: 'nt', a, b, y, bias, residual, activation, ...size }, context);
}

/** Linear layers of one x, two or three of them, are one launch on Hopper where nothing rides along; others follow each other. */
function linearsTogether(calls: readonly LaunchArguments[], context: PlanContext): KernelLaunch[] {
  return (
    projections(calls as readonly Pointers[], context) ??
    calls.flatMap((args) => linearForward(args, context))
  );
}

function linearBackwardX(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [y, a, b] = args as Pointers;
  const [m, n, k] = args.slice(3).map(Number);
  return product({ layout: 'nn', a, b, y, m, n: k, k: n, batch: 1, aStride: n, bStride: k }, context);
}

function linearBackwardWeight(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [y, a, b] = args as Pointers;
  const [m, n, k] = args.slice(3).map(Number);
  return product({ layout: 'tn', a, b, y, m: n, n: k, k: m, batch: 1, aStride: n, bStride: k }, context);
}

function matmulForward(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [y, a, b] = args as Pointers;
  const [batch, m, n, k, transA, transB] = args.slice(3).map(Number);
  const shape = { a, y, m, n, k, batch, aStride: transA ? m : k };
  const batches = { aBatch: [m * k, 0], bBatch: [k * n, 0], yBatch: [m * n, 0] } as const;
  if (!transA) {
    const layout = transB ? 'nt' : 'nn';
    return product({ layout, b, bStride: transB ? k : n, ...shape, ...batches }, context);
  }
  if (!transB) return product({ layout: 'tn', b, bStride: n, ...shape, ...batches }, context);
  // Both turned: rare enough that B is turned back first.
  const turned = context.workspace(batch * k * n * context.elementBytes);
  const jobs = batch * divideUp(k, 32) * divideUp(n, 32);
  const permuted = [turned, b, 1, batch, k, n, 0, n * k, 1, k];
  return [
    walking('move', 'permute_forward', jobs, 1, permuted, context),
    ...product({ layout: 'tn', b: turned, bStride: n, ...shape, ...batches }, context),
  ];
}

export const matrixPlans: readonly (readonly [string, Plan])[] = [
  ['linear_forward', { signature: 'pppppiiii', launches: linearForward, together: linearsTogether }],
  ['linear_backward_x', { signature: 'pppiii', launches: linearBackwardX }],
  ['linear_backward_weight', { signature: 'pppiii', launches: linearBackwardWeight }],
  ['matmul_forward', { signature: 'pppiiiiii', launches: matmulForward }],
];
