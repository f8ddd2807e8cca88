// Matrix products on Hopper's own instructions (gemm_sm90.cu), where their tensors allow it: the half types as they are, float32 as
// halves (plan_float32_sm90.ts).
import {
  divideUp,
  FLOAT,
  type KernelLaunch,
  type LaunchArgument,
  type PlanContext,
  type Pointers,
} from './plan.ts';
import { type Halves, isDense, splitPays, splitSlabs, splitSteps } from './plan_float32_sm90.ts';
import { GEGLU, join, type Size } from './plan_gemm.ts';
import {
  across,
  along,
  chooseHopper,
  type HopperProduct,
  hopperLaunch,
  hopperTakes,
  isWalkable,
  outputMap,
  type ProductKind,
  type Slabs,
  STEP,
} from './plan_sm90.ts';

/** Layout "nt" has A as [m, k] and B as [n, k], "nn" has B as [k, n], "tn" A as [k, m] too. */
export interface Product extends Size {
  readonly layout: 'nt' | 'nn' | 'tn';
  readonly a: bigint;
  readonly b: bigint;
  readonly y: bigint;
  readonly aStride: number;
  readonly bStride: number;
  readonly bias?: LaunchArgument;
  readonly residual?: LaunchArgument;
  readonly activation?: number;
  /** Batches are outer * innerBatches + inner; elements from one to the next. */
  readonly innerBatches?: number;
  readonly aBatch?: readonly [outer: number, inner: number];
  readonly bBatch?: readonly [outer: number, inner: number];
  readonly yBatch?: readonly [outer: number, inner: number];
  readonly yStride?: number;
  /** A's rows lie on chunk boundaries, and zeros fill them up to the next one. */
  readonly aPadded?: boolean;
  /** Float sums [batch, m, n] instead of y and its epilogue; on Hopper their rows may be longer. */
  readonly sums?: bigint;
  readonly sumsRow?: number;
  /** Of a plan that multiplies several matrices by B. */
  readonly halves?: Halves;
}

/** One stride from batch to batch, where there is one. */
function slabStride(p: Product, [outer, inner]: readonly [number, number] = [0, 0]): number {
  const { batch, innerBatches = 1 } = p;
  return innerBatches === 1 ? outer : innerBatches === batch ? inner : 0;
}

/** Its operands and its result as they lie in memory. */
function matricesOf(p: Product): Record<'a' | 'b' | 'y', Slabs> {
  const { layout, m, n, k, batch: slabs } = p;
  const matrix = (
    address: bigint,
    [rows, columns]: readonly [number, number],
    stride: number,
    batch?: readonly [number, number],
  ): Slabs => ({ address, rows, columns, slabs, stride, slabStride: slabStride(p, batch) });
  const height = p.activation === GEGLU ? 2 * n : n; // values and gates
  return {
    a: matrix(p.a, layout[0] === 'n' ? [m, k] : [k, m], p.aStride, p.aBatch),
    b: matrix(p.b, layout[1] === 't' ? [height, k] : [k, height], p.bStride, p.bBatch),
    y: matrix(p.y, [m, n], p.yStride ?? n, p.yBatch),
  };
}

/** The launches on Hopper's own instructions, where the tensors allow it. */
export function onHopper(p: Product, context: PlanContext): KernelLaunch[] | undefined {
  const { layout, m, n, k, batch: slabs, activation = 0, sums } = p;
  const halved = context.dtype === 'float32' && layout !== 'tn' && activation !== GEGLU;
  const wide = p.sumsRow ? divideUp(n, 8) * 8 : n;
  if (halved ? wide % 8 : !hopperTakes(m, wide, context)) return undefined;
  const half = activation === GEGLU;
  const [bias, residual] = [p.bias ?? 0n, p.residual ?? 0n].map(BigInt);
  const { a, b, y } = matricesOf(p);
  const walked = sums === undefined ? [a, b, y, { ...y, address: residual }] : [a, b];
  if (!walked.every(isWalkable) || bias % (halved ? 8n : 4n) !== 0n || (residual && y.stride !== n))
    return undefined;
  const plain = activation ? 'activated' : layout;
  const kind: ProductKind = halved ? `split_${layout}` : half ? 'geglu' : plain;
  const size = { kind, m, n, steps: halved ? splitSteps(divideUp(k, STEP)) : divideUp(k, STEP), slabs };
  const elements = (m + n) * k * slabs;
  const pays = () => elements < 2 ** 31 && [a, b].every(isDense) && splitPays(size, k, elements, context);
  if (halved && !pays()) return undefined;
  const operand = (tensor: Slabs, halves?: Halves) =>
    halved ? splitSlabs(tensor, context, halves) : { tensor, launches: [] };
  const [left, right] = [operand(a), operand(b, p.halves)];
  return hopperLaunches(
    {
      ...{ family: 'gemm_sm90', ...size, y, bias, residual, before: [...left.launches, ...right.launches] },
      a: layout[0] === 'n' ? along(left.tensor) : across(left.tensor),
      b: layout[1] === 't' ? along(right.tensor, 2) : across(right.tensor), // two boxes: values and gates, or halves
      own: (tile) => [half ? 0 : activation, half ? n : tile.n / 2],
    },
    {
      sums,
      strides: [p.sumsRow ?? n, m * n],
      canSplit: slabs === 1 && !half,
      extras: [bias, 0n, residual],
      activation,
      inPlace: halved && (bias !== 0n || residual !== 0n || activation !== 0),
    },
    context,
  );
}

interface Joining {
  /** Float sums instead of y. */
  readonly sums?: bigint;
  /** Of partial sums, from row to row and slab to slab. */
  readonly strides: readonly [row: number, slab: number];
  readonly canSplit: boolean;
  /** Bias, shift and residual, as join() takes them. */
  readonly extras: readonly bigint[];
  readonly activation?: number;
  readonly rowsPerShift?: number;
  /** Where k is not split, that y holds the sums until they are joined there: for an epilogue that the product has not. */
  readonly inPlace?: boolean;
}

/** The launch of a product on Hopper, and the one that joins its sums if k is split. */
export function hopperLaunches(
  p: HopperProduct,
  { sums, strides: [row, slab], canSplit, extras, activation = 0, rowsPerShift = 1, inPlace }: Joining,
  context: PlanContext,
): KernelLaunch[] {
  const choice = chooseHopper(p, canSplit && sums === undefined, context.multiprocessors);
  const [m, n, splits] = [p.m, p.n * p.slabs, choice.splits];
  const address = splits > 1 ? context.workspace(splits * m * n * FLOAT) : inPlace ? p.y.address : sums;
  const partial = address === undefined ? undefined : { address, row, slab };
  const first = hopperLaunch({ ...p, partial }, choice, context);
  const { before = [] } = p;
  if (splits === 1 && !inPlace) return [...before, first];
  return [
    ...before,
    first,
    join(p.y.address, address as bigint, extras, [m, n, rowsPerShift, activation, splits], context),
  ];
}

/** Two or three linear layers of one x in a launch, where nothing rides along. */
export function projections(calls: readonly Pointers[], context: PlanContext): KernelLaunch[] | undefined {
  const [, x, , , , ...sizes] = calls[0];
  const [m, n, k] = sizes.map(Number);
  const isAlike = ([, other, , bias, residual, ...its]: Pointers) =>
    other === x && !bias && !residual && its.join() === [m, n, k, 0].join();
  if (calls.length < 2 || calls.length > 3 || !calls.every(isAlike) || !hopperTakes(m, n, context))
    return undefined;
  const matrix = (address: bigint, rows: number, columns: number): Slabs => ({
    address,
    rows,
    columns,
    stride: columns,
  });
  const a = matrix(x, m, k);
  const [weights, results] = [2, 0].map((at) =>
    calls.map((args) => (at ? matrix(args[at], n, k) : matrix(args[at], m, n))),
  );
  if (![a, ...weights, ...results].every(isWalkable)) return undefined;
  const kind = 'projections' as const;
  // A map that is not there is any other.
  const more = <V>(values: readonly V[]): V[] => [values[1], values[2] ?? values[1]];
  return hopperLaunches(
    {
      ...{ family: 'gemm_sm90', kind, m, n, steps: divideUp(k, STEP), slabs: calls.length },
      ...{ a: along(a), b: along(weights[0], 2), y: results[0], bias: 0n, residual: 0n },
      own: (tile) => [
        Buffer.concat([
          ...more(weights).map((weight) => along(weight, 2)(tile.n, context)),
          ...more(results).map((y) => outputMap(y, tile.n, context)),
        ]),
      ],
    },
    { strides: [n, m * n], canSplit: false, extras: [0n, 0n, 0n] },
    context,
  );
}
