// Plans of sums, losses and norms: partial results per chunk of rows, then one small launch that joins them in order.
import {
  divideUp,
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
import { groupNormOnHopper } from './plan_norm_sm90.ts';

const LOSS_CHUNK = 4096; // reduce.cu
const FLOAT = 4;

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
  const chunks = Math.max(1, divideUp(Number(axis), length));
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
  const shape = [outer, axis, inner, length, width];
  if (chunks <= 1) return [block('reduce', 'sum_columns', [blocks, 1], 0, [y, x, ...shape])];
  const columns = outer * inner;
  const partial = context.workspace(chunks * columns * FLOAT);
  const last = columnCut(1, chunks, columns, FLOAT);
  return [
    block('reduce', 'sum_columns_partial', [blocks, chunks], 0, [partial, x, ...shape]),
    block('reduce', 'sum_columns_finish', [last.blocks, 1], 0, [
      y,
      partial,
      1,
      chunks,
      columns,
      chunks,
      last.width,
    ]),
  ];
}

function lossPlan(name: string, signature: string): [string, Plan] {
  const launches = (args: LaunchArguments, context: PlanContext) => {
    const [y, prediction, target, weights, n, inner, delta = 0] = args;
    const chunks = Number(n) * divideUp(Number(inner), LOSS_CHUNK);
    const partial = context.workspace(Math.max(chunks, 1) * FLOAT);
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

/** The launches that join per-chunk sums [images, chunks, 2, c] and write the gradients of weight and bias. */
function weightGradients(
  sums: bigint,
  partial: bigint,
  [dweight, dbias]: readonly LaunchArgument[],
  images: number,
  chunks: number,
  c: number,
): KernelLaunch[] {
  const join = block('norm', 'norm_sum_chunks', [divideUp(images * 2 * c, THREADS), 1], 0, [
    sums,
    partial,
    images,
    chunks,
    2 * c,
  ]);
  if (!dweight && !dbias) return [join];
  const finish = [dweight, dbias, sums, images, c];
  return [join, block('norm', 'norm_backward_weight', [divideUp(c, THREADS), 1], 0, finish)];
}

function groupNormBackward(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [dx, dweight, dbias, ...inputs] = args.slice(0, 9);
  const [n, hw, c, groups, silu] = args.slice(9).map(Number);
  const [rows, own] = [rowsToSum(c), rowsToWrite(c)];
  const chunks = divideUp(hw, rows);
  const partial = context.workspace(n * chunks * 2 * c * FLOAT);
  const sums = context.workspace(n * 2 * c * FLOAT);
  const shape = [hw, c, groups, silu];
  const made = [
    block('group_norm', 'group_norm_backward_partial', [chunks, n], columnBytes(c), [
      partial,
      ...inputs,
      ...shape,
      rows,
    ]),
    ...weightGradients(sums, partial, [dweight, dbias], n, chunks, c),
  ];
  if (!dx) return made;
  const last = [dx, sums, ...inputs, ...shape, own];
  return [
    ...made,
    block('group_norm', 'group_norm_backward_x', [divideUp(hw, own), n], 2 * groups * FLOAT, last),
  ];
}

function layerNormBackward(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [dx, dweight, dbias, dy, x, weight, mean, rstd] = args;
  const [total, c] = args.slice(8).map(Number);
  const made: KernelLaunch[] = [];
  if (dx) made.push(ownRow('layer_norm_backward_x', [dx, dy, x, weight, mean, rstd, total, c], total));
  if (!dweight && !dbias) return made;
  const rows = Math.max(16, divideUp(total, 128));
  const chunks = divideUp(total, rows);
  const partial = context.workspace(chunks * 2 * c * FLOAT);
  const sums = context.workspace(2 * c * FLOAT);
  const first = [partial, dy, x, mean, rstd, total, c, rows];
  return [
    ...made,
    block('norm', 'layer_norm_backward_partial', [chunks, 1], columnBytes(c), first),
    ...weightGradients(sums, partial, [dweight, dbias], 1, chunks, c),
  ];
}

/** A warp to each row. */
const ownRow = (entry: string, args: LaunchArguments, rows: number): KernelLaunch =>
  block('norm', entry, [divideUp(rows, THREADS / 32), 1], 0, args);

const ofRows = (symbol: string, rowsAt: number): [string, Plan] => [
  symbol,
  { launches: (args) => [ownRow(symbol, args, Number(args[rowsAt]))] },
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
  ofRows('layer_norm_forward', 6),
  ['layer_norm_backward', { signature: 'ppppppppii', launches: layerNormBackward }],
  ofRows('softmax_forward', 2),
  ofRows('softmax_backward', 3),
];
