// Plans of the matrix products (gemm.cu): which tile, how k is split, and the launch that joins split sums. The large tile (128 x 128)
// needs operands whose rows are whole 16-byte chunks. Of both tiles and all splits the one is taken whose busiest multiprocessor is
// done first, by a model: 160 large tiles on 128 multiprocessors take as long as 256, and 640 small ones as 640. Its numbers are
// reasoned, not measured.
import {
  divideUp,
  FLOAT,
  type KernelLaunch,
  type LaunchArgument,
  type LaunchArguments,
  PACK,
  type Plan,
  type PlanContext,
  THREADS,
  walking,
} from './plan.ts';
import { type Halves, isDense, splitPays, splitSlabs, splitSteps } from './plan_float32_sm90.ts';
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

export const GEGLU = 4;
const GEGLU_BLOCK = 32;
const STAGES = 3;
const SLAB_BYTES = 16 * 72 * 4; // gemm.cuh: 16 rows of SLAB_STRIDE floats

interface Tile {
  readonly name: 'large' | 'small';
  readonly side: number;
  readonly shared: number;
  /** The part of the tensor cores' rate that it reaches where multiprocessors have blocks enough. */
  readonly rate: number;
}

/** gemm.cuh's shapes: four warps each; a step along k is 64 bytes. The stages also hold the slabs of the epilogue. */
const large: Tile = {
  ...{ name: 'large', side: 128, rate: 1 },
  shared: Math.max(STAGES * 2 * 128 * 64, 8 * SLAB_BYTES),
};
const small: Tile = {
  ...{ name: 'small', side: 64, rate: 0.85 },
  shared: Math.max(STAGES * 2 * 64 * 64, 4 * SLAB_BYTES),
};
export const TILE_THREADS = 128;

export interface Size {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly batch: number;
}

export interface Choice {
  readonly tile: Tile;
  readonly splits: number;
  readonly kPart: number;
}

/** k is split into 16 parts at most, of 16 steps or more. */
const [MOST_SPLITS, LEAST_STEPS] = [16, 16];
/** In cycles: what a step waits for copies and fragments, which other blocks of the multiprocessor fill; and a launch more. */
const [WAIT, LAUNCH] = [150, 5000];
/** What memory brings a multiprocessor in a cycle. */
const BYTES = 5;

/** Products of a multiprocessor in a cycle. Tensor cores of data centres' GPUs, which have more shared memory, make four times as many. */
const productsPerCycle = ({ elementBytes, sharedBytes }: PlanContext): number =>
  elementBytes === FLOAT ? 128 : sharedBytes > 99 * 1024 ? 1024 : 256;

/** Clock cycles until the busiest multiprocessor is done, roughly; with split k until the sums are joined. */
function cycles({ m, n, batch }: Size, { tile, splits, kPart }: Choice, context: PlanContext): number {
  const { multiprocessors, elementBytes } = context;
  const blocks = divideUp(m, tile.side) * divideUp(n, tile.side) * batch * splits;
  const step = 64 / elementBytes;
  const products = (tile.side ** 2 * step) / productsPerCycle(context);
  const busiest = (divideUp(blocks, multiprocessors) * products) / tile.rate;
  const time = (kPart / step) * Math.max(busiest, products + WAIT);
  if (splits === 1) return time;
  return time + LAUNCH + (m * n * (2 * FLOAT * splits + elementBytes)) / (BYTES * multiprocessors);
}

/** What tests have choose in the model's place. Plans that were made before are out of date once the version is another (plan_sm90.ts). */
export const forced: { choose?(size: Size, choices: readonly Choice[]): Choice | undefined } = {};

export function choose(size: Size, whole: number, canSplit: boolean, context: PlanContext): Choice {
  const { m, n, k } = size;
  const step = 64 / context.elementBytes;
  const fits = context.elementBytes === 2 && whole === 3 && m > 64 && n > 64;
  const most = canSplit ? Math.max(1, Math.min(MOST_SPLITS, Math.floor(k / (LEAST_STEPS * step)))) : 1;
  const choices = (fits ? [large, small] : [small]).flatMap((tile) =>
    Array.from({ length: most }, (_, i): Choice => {
      const kPart = Math.max(step, divideUp(divideUp(k, i + 1), step) * step);
      return { tile, splits: Math.max(1, divideUp(k, kPart)), kPart };
    }),
  );
  const [first, ...others] = choices.map((choice) => ({ choice, time: cycles(size, choice, context) }));
  const fastest = others.reduce((best, other) => (other.time < best.time ? other : best), first);
  return forced.choose?.(size, choices) ?? fastest.choice;
}

interface Product extends Size {
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

/** Whether every row of an operand is whole chunks, given what must be a multiple of a chunk. */
export const isWhole = (lengths: readonly number[], { elementBytes }: PlanContext): boolean =>
  lengths.every((length) => length % (16 / elementBytes) === 0);

export function join(
  y: LaunchArgument,
  partial: bigint,
  extras: readonly LaunchArgument[],
  [m, n, rowsPerShift, activation, splits]: readonly number[],
  context: PlanContext,
): KernelLaunch {
  const args = [y, partial, ...extras, m, n, rowsPerShift, activation, splits];
  return walking('gemm', 'gemm_join', m * divideUp(n, PACK), THREADS, args, context);
}

/** One stride from batch to batch, where there is one. */
function slabStride(p: Product, [outer, inner]: readonly [number, number] = [0, 0]): number {
  const { batch, innerBatches = 1 } = p;
  return innerBatches === 1 ? outer : innerBatches === batch ? inner : 0;
}

/** The launches on Hopper's own instructions, where the tensors allow it. */
function onHopper(p: Product, context: PlanContext): KernelLaunch[] | undefined {
  const { layout, m, n, k, batch: slabs, activation = 0, sums } = p;
  const halved = context.dtype === 'float32' && layout !== 'tn' && activation !== GEGLU;
  const wide = p.sumsRow ? divideUp(n, 8) * 8 : n;
  if (halved ? wide % 8 : !hopperTakes(m, wide, context)) return undefined;
  const [half, stride] = [activation === GEGLU, p.yStride ?? n];
  const [bias, residual] = [p.bias ?? 0n, p.residual ?? 0n].map(BigInt);
  const tensor = (
    address: bigint,
    rows: number,
    columns: number,
    stride: number,
    batch = p.yBatch,
  ): Slabs => ({
    ...{ address, rows, columns, slabs, stride, slabStride: slabStride(p, batch) },
  });
  const [aAlong, bAlong, h] = [layout[0] === 'n', layout[1] === 't', half ? 2 * n : n];
  const a = tensor(p.a, aAlong ? m : k, aAlong ? k : m, p.aStride, p.aBatch);
  const b = tensor(p.b, bAlong ? h : k, bAlong ? k : h, p.bStride, p.bBatch);
  const y = tensor(p.y, m, n, stride);
  const walked = sums === undefined ? [a, b, y, { ...y, address: residual }] : [a, b];
  if (!walked.every(isWalkable) || bias % (halved ? 8n : 4n) !== 0n || (residual && stride !== n))
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
      a: aAlong ? along(left.tensor) : across(left.tensor),
      b: bAlong ? along(right.tensor, 2) : across(right.tensor), // two boxes: values and gates, or halves
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

export type Pointers = readonly bigint[];

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

function projections(calls: readonly Pointers[], context: PlanContext): KernelLaunch[] | undefined {
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
