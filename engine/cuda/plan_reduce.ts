// Plans of sums, losses and norms: partial results per chunk of rows, then one small launch that joins them in order.
import {
  divideUp,
  FLOAT,
  type KernelLaunch,
  type LaunchArgument,
  type LaunchArguments,
  PACK,
  type Plan,
  type PlanContext,
  single,
  THREADS,
  walking,
} from './plan.ts';
import { groupNormBackwardOnHopper, groupNormOnHopper } from './plan_norm_sm90.ts';

const LOSS_CHUNK = 4096; // reduce.cu
/** norm.cu's: rows of a step of layer norm's backward, a warp to each, and columns that a block joins. */
const ROWS = THREADS / 32;
const JOIN_COLUMNS = 16;
/** What its kernel has of shared memory by itself: moments of each row. */
const STATIC_BYTES = ROWS * 8;

function block(
  family: string,
  entry: string,
  grid: readonly [number, number],
  shared: number,
  args: LaunchArguments,
): KernelLaunch {
  return { family, entry, grid: [grid[0], grid[1], 1], block: THREADS, shared, args };
}

/** A long axis with few rows to sum is cut into about 64 chunks, or more where there are fewer still. */
function rowChunks(rows: number, axis: number): number {
  const wanted = Math.min(256, Math.max(1, Math.floor(65536 / Math.max(rows * 32, 256))));
  return Math.max(1, Math.min(wanted, Math.floor(axis / 32)));
}

function sumOfRows([y, x, rows, axis]: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const length = divideUp(Number(axis), rowChunks(Number(rows), Number(axis)));
  const chunks = divideUp(Number(axis), length) || 1; // of an empty axis there is one, of nothing
  const launch = (entry: string, sums: number, args: LaunchArguments) =>
    walking('reduce', entry, sums * 32, THREADS, args, context); // a warp to each
  if (chunks === 1) return [launch('sum_rows', Number(rows), [y, x, rows, axis])];
  const partial = context.workspace(Number(rows) * chunks * FLOAT);
  return [
    launch('sum_rows_partial', Number(rows) * chunks, [partial, x, rows, axis, length, chunks]),
    launch('sum_rows_finish', Number(rows), [y, partial, rows, chunks]),
  ];
}

const AHEAD = 8; // reduce.cu
/** About four to each multiprocessor of an H200; a constant, so that a cut depends on the shape alone. */
const SUMMING_BLOCKS = 512;
const powerAbove = (x: number): number => 2 ** Math.ceil(Math.log2(Math.max(x, 1)));

/** How sum_columns takes [outer, axis, inner] of `bytes` an element: runs beside each other in a block, blocks of them, and chunks. */
function columnCut(outer: number, axis: number, inner: number, bytes: number) {
  const runs = (outer * inner) / (inner % (16 / bytes) ? 1 : 16 / bytes);
  let side = 32;
  while (side > 8 && runs % side) side /= 2;
  // A lane has four rows or more, where there are as many.
  const width = Math.max(Math.min(side, powerAbove(runs)), THREADS / Math.min(THREADS, powerAbove(axis / 4)));
  const blocks = divideUp(runs, width);
  const turn = (THREADS / width) * AHEAD; // rows that are on their way together
  // Joining costs a launch, as long as some turns more.
  if (axis <= 4 * turn) return { width, blocks, length: axis };
  const wanted = Math.min(Math.max(1, Math.floor(SUMMING_BLOCKS / blocks)), divideUp(axis, turn));
  return { width, blocks, length: divideUp(axis, wanted * turn) * turn };
}

function sumPlan(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [y, x] = args;
  const [outer, axis, inner] = args.slice(2).map(Number);
  if (inner === 1) return sumOfRows(args, context);
  if (outer * inner === 0) return [];
  const { width, blocks, length } = columnCut(outer, axis, inner, context.elementBytes);
  const chunks = divideUp(axis, Math.max(length, 1));
  const launch = (entry: string, grid: readonly [number, number], args: LaunchArguments) =>
    block('reduce', entry, grid, 0, args);
  const columns = outer * inner;
  const partial = chunks > 1 ? context.workspace(chunks * columns * FLOAT) : 0n;
  const shape = [outer, axis, inner, length, width];
  const first = launch('sum_columns', [blocks, Math.max(chunks, 1)], [y, partial, x, ...shape]);
  if (chunks <= 1) return [first];
  const last = columnCut(1, chunks, columns, FLOAT);
  return [first, launch('sum_columns_finish', [last.blocks, 1], [y, partial, chunks, columns, last.width])];
}

function lossPlan(name: string, signature: string): [string, Plan] {
  const launches = (args: LaunchArguments, context: PlanContext) => {
    const [y, prediction, target, weights, n, inner, delta = 0] = args;
    const chunks = Number(n) * divideUp(Number(inner), LOSS_CHUNK);
    const partial = context.workspace(chunks * FLOAT);
    const each = [partial, prediction, target, n, inner, delta];
    return [
      walking('reduce', `${name}_partial`, chunks, 1, each, context),
      { ...block('reduce', 'loss_finish', [1, 1], 0, [y, partial, weights, n, inner]), block: 1 },
    ];
  };
  return [`${name}_forward`, { signature, launches }];
}

/**
 * Rows of a block of [rows, c]. Memory is kept busy by many blocks; where a block's sums are joined afterwards, it has
 * twice the rows, so that joining stays small. Reasoned, not measured.
 */
const rowsToSum = (c: number): number => Math.min(128, Math.max(8, Math.floor(16384 / c)));
const rowsToWrite = (c: number): number => Math.min(64, Math.max(4, Math.floor(8192 / c)));

/** Dynamic shared memory of norm.cuh's Columns: two sums per lane and channel. */
function columnBytes(c: number): number {
  const lanes = Math.floor(THREADS / Math.min(divideUp(c, PACK), THREADS));
  return 2 * lanes * c * FLOAT;
}

function groupNormForward(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [y, mean, rstd, x, skip, weight, bias] = args;
  const [n, hw, c, own, groups, silu, eps] = args.slice(7).map(Number);
  if (own < c && own % PACK) return groupNormOfJoined(args, context);
  const hopper = groupNormOnHopper(args, context);
  if (hopper) return hopper;
  const [rows, written] = [rowsToSum(c), rowsToWrite(c)];
  const chunks = divideUp(hw, rows);
  const partial = context.workspace(n * chunks * groups * 2 * FLOAT);
  const apply = [y, mean, rstd, x, skip, weight, bias, hw, c, own, groups, silu, written];
  return [
    block('group_norm', 'group_norm_partial', [chunks, n], columnBytes(c), [
      ...[partial, x, skip, hw, c, own, groups, rows],
    ]),
    block('group_norm', 'group_norm_finish', [divideUp(n * groups * 32, THREADS), 1], 0, [
      mean,
      rstd,
      partial,
      n,
      hw,
      c,
      groups,
      rows,
      eps,
    ]),
    block('group_norm', 'group_norm_apply', [divideUp(hw, written), n], 0, apply),
  ];
}

/** Where x's channels are not whole packs, skip is laid beside it first. */
function groupNormOfJoined(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [x, skip] = args.slice(3, 5);
  const [n, hw, c, own] = args.slice(7).map(Number);
  const whole = context.workspace(n * hw * c * context.elementBytes);
  const place = (from: LaunchArgument, start: number, length: number) => {
    const jobs = n * hw * divideUp(length, 4096);
    return walking('move', 'place_forward', jobs, 1, [whole, from, n * hw, c, start, length, 1], context);
  };
  const joined = [...args.slice(0, 3), whole, 0n, ...args.slice(5, 10), c, ...args.slice(11)];
  return [place(x, 0, own), place(skip, own, c - own), ...groupNormForward(joined, context)];
}

interface Joined {
  readonly dweight: LaunchArgument;
  readonly dbias: LaunchArgument;
  /** Each image's sums, where they are wanted. */
  readonly sums?: bigint;
  /** [images, rows, 2, c], of chunks of rows. */
  readonly partial: bigint;
  readonly images?: number;
  readonly rows: number;
  readonly c: number;
}

/** The launch that joins sums to the gradients of bias and weight, those that are wanted. */
function join({ dweight, dbias, sums = 0n, partial, images = 1, rows, c }: Joined): KernelLaunch {
  const args = [dweight, dbias, sums, partial, images, rows, c];
  return block('norm', 'norm_join', [divideUp(2 * c, JOIN_COLUMNS), 1], 0, args);
}

function groupNormBackward(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [dx, dweight, dbias, ...inputs] = args.slice(0, 9);
  const [n, hw, c, groups, silu] = args.slice(9).map(Number);
  const hopper = groupNormBackwardOnHopper(args, context);
  if (hopper) {
    const { launch, partial, rows } = hopper;
    return partial ? [launch, join({ dweight, dbias, partial, rows, c })] : [launch];
  }
  const [rows, own] = [rowsToSum(c), rowsToWrite(c)];
  const chunks = divideUp(hw, rows);
  const partial = context.workspace(n * chunks * 2 * c * FLOAT);
  const sums = dx ? context.workspace(n * 2 * c * FLOAT) : 0n;
  const shape = [hw, c, groups, silu];
  const made = [
    block('group_norm', 'group_norm_backward_partial', [chunks, n], columnBytes(c), [
      partial,
      ...inputs,
      ...shape,
      rows,
    ]),
    join({ dweight, dbias, sums, partial, images: n, rows: chunks, c }),
  ];
  if (!dx) return made;
  const last = [dx, sums, ...inputs, ...shape, own];
  return [
    ...made,
    block('group_norm', 'group_norm_backward_x', [divideUp(hw, own), n], 2 * groups * FLOAT, last),
  ];
}

/**
 * Eight rows of dy and of x, the weight, and two sums of each column. Undefined where that is too much, or rows do not begin on 16
 * bytes: they are then read where they lie, twice.
 */
function stagedRows(c: number, { elementBytes, sharedBytes }: PlanContext): number | undefined {
  const shared = (2 * ROWS + 1) * c * elementBytes + 2 * c * FLOAT;
  return (c * elementBytes) % 16 === 0 && shared + STATIC_BYTES <= sharedBytes ? shared : undefined;
}

/** Blocks of whole steps of eight rows, up to four of them to a multiprocessor: each hides the others' waits. */
function layerNormBackward(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [dx, dweight, dbias, ...inputs] = args.slice(0, 8);
  const [total, c] = args.slice(8).map(Number);
  const share = ROWS * divideUp(total, ROWS * 4 * context.multiprocessors);
  const blocks = divideUp(total, share);
  const partial = dweight || dbias ? context.workspace(blocks * 2 * c * FLOAT) : 0n;
  const staged = stagedRows(c, context);
  const entry = staged ? 'layer_norm_backward_staged' : 'layer_norm_backward_rows';
  const last = [dx, partial, ...inputs, total, c, share];
  const rows = block('norm', entry, [blocks, 1], staged ?? 2 * c * FLOAT, last);
  return partial ? [rows, join({ dweight, dbias, partial, rows: blocks, c })] : [rows];
}

/** A warp to each row. */
const ownRow = (
  family: string,
  entry: string,
  args: LaunchArguments,
  rows: number,
  shared = 0,
): KernelLaunch => block(family, entry, [divideUp(rows, ROWS), 1], shared, args);

/** The weight and the bias lie in shared memory where a lane holds its share of a row. */
function layerNormForward(args: LaunchArguments, { elementBytes, hopper }: PlanContext): KernelLaunch[] {
  const [rows, c] = args.slice(6).map(Number);
  const holds = (c * elementBytes) % 16 === 0 && c <= 1280;
  const [family, entry] =
    hopper && elementBytes === 2
      ? ['layer_norm_sm90', 'layer_norm_sm90_forward']
      : ['norm', 'layer_norm_forward'];
  return [ownRow(family, entry, args, rows, holds ? 2 * c * elementBytes : 0)];
}

const ofRows = (symbol: string, rowsAt: number): [string, Plan] => [
  symbol,
  { launches: (args) => [ownRow('norm', symbol, args, Number(args[rowsAt]))] },
];

export const reducePlans: readonly (readonly [string, Plan])[] = [
  ['sum_forward', { signature: 'ppiii', launches: sumPlan }],
  single('reduce', 'broadcast_forward', ([, , o, a, inner]) => o * a * divideUp(inner, PACK), THREADS),
  lossPlan('mse', 'ppppii'),
  lossPlan('huber', 'ppppiif'),
  single('reduce', 'mse_backward', (a) => a[5] * divideUp(a[6], PACK), THREADS),
  single('reduce', 'huber_backward', (a) => a[5] * divideUp(a[6], PACK), THREADS),
  ['group_norm_forward', { signature: 'pppppppiiiiiif', launches: groupNormForward }],
  ['group_norm_backward', { signature: 'pppppppppiiiii', launches: groupNormBackward }],
  ['layer_norm_forward', { launches: layerNormForward }],
  ['layer_norm_backward', { signature: 'ppppppppii', launches: layerNormBackward }],
  ofRows('softmax_forward', 2),
  ofRows('softmax_backward', 3),
];
