// Plans of attention. Heads of up to 64, a multiple of 8, in the half types go by the flash kernels, which store no scores.
// Other heads (the VAE's 512) and float32 go by matrix products over pieces of the score matrix, bounded in memory:
// forward and dq by pieces of queries, dk and dv by pieces of keys where all does not fit at once.
import {
  divideUp,
  FLOAT,
  inTurns,
  type KernelLaunch,
  type LaunchArguments,
  type Plan,
  type PlanContext,
  THREADS,
} from './plan.ts';
import { type AttentionSizes, hopperBackward, hopperForward, isForHopper } from './plan_attention_sm90.ts';
import { product } from './plan_matrix.ts';

const FLASH_HEAD = 64;
const FLASH_THREADS = 128;
const QUERIES = 128;
const ROWS = 64;
const TILE_BYTES = ROWS * FLASH_HEAD * 2;
/** Most bytes of scores, gradients of scores and their copies, rounded or in halves, at a time. */
const PIECE_BYTES = 256 * 2 ** 20;

function sizesOf(args: LaunchArguments): AttentionSizes {
  const [n, heads, lq, lk, d, causal, scale] = args.map(Number);
  return { n, heads, lq, lk, d, causal, scale };
}

const isFlash = ({ d }: AttentionSizes, { elementBytes }: PlanContext): boolean =>
  elementBytes === 2 && d <= FLASH_HEAD && d % 8 === 0;

interface Flash {
  readonly rows: number;
  /** Of the rows, to a block. */
  readonly each: number;
  readonly shared: number;
  readonly pointers: LaunchArguments;
}

function flash(
  entry: string,
  { rows, each, shared, pointers }: Flash,
  { n, heads, lq, lk, d, causal, scale }: AttentionSizes,
): KernelLaunch {
  return {
    family: 'attention',
    entry: `attention_flash_${entry}`,
    grid: [divideUp(rows, each), n * heads, 1],
    block: FLASH_THREADS,
    shared,
    args: [...pointers, heads, lq, lk, d, causal, scale],
  };
}

/** A warp to each row. */
const byRows = (entry: string, rows: number, args: LaunchArguments): KernelLaunch => ({
  family: 'attention',
  entry,
  grid: [divideUp(rows, THREADS / 32), 1, 1],
  block: THREADS,
  shared: 0,
  args,
});

/** The products of a head with its rows of q, k, v, y and their gradients, as batches over images and heads. */
function pieces(s: AttentionSizes, context: PlanContext) {
  const { n, heads, lq, lk, d } = s;
  const turn = inTurns(context);
  const c = heads * d;
  const rowBytes = BigInt(c * context.elementBytes);
  const row = (base: bigint, at: number) => base + BigInt(at) * rowBytes;
  const batches = { batch: n * heads, innerBatches: heads, halves: { context, known: new Map() } };
  return {
    row,
    /** Float sums [n * heads, rows, keys] of rows of `a` (q, dy) times rows of `b` (k, v). */
    scores: (sums: bigint, a: bigint, rows: number, b: bigint, keys: number) =>
      product(
        {
          layout: 'nt',
          ...{ a, b, y: 0n, sums, m: rows, n: keys, k: d, aStride: c, bStride: c, ...batches },
          ...{ aBatch: [lq * c, d], bBatch: [lk * c, d] },
        },
        turn(),
      ),
    /** y (q's side) = p [n * heads, rows, stride] times the rows of b (k, v). */
    across: (y: bigint, p: bigint, rows: number, stride: number, b: bigint) =>
      product(
        {
          layout: 'nn',
          ...{ a: p, b, y, m: rows, n: d, k: lk, aStride: stride, bStride: c, aPadded: true, ...batches },
          ...{ aBatch: [heads * rows * stride, rows * stride], bBatch: [lk * c, d] },
          ...{ yBatch: [lq * c, d], yStride: c },
        },
        turn(),
      ),
    /** y (k's side, `keys` of its rows) = p^T times all rows of b (q, dy). */
    along: (y: bigint, p: bigint, keys: number, stride: number, b: bigint) =>
      product(
        {
          layout: 'tn',
          ...{ a: p, b, y, m: keys, n: d, k: lq, aStride: stride, bStride: c, aPadded: true, ...batches },
          ...{ aBatch: [heads * lq * stride, lq * stride], bBatch: [lq * c, d] },
          ...{ yBatch: [lk * c, d], yStride: c },
        },
        turn(),
      ),
  };
}

/** Bytes of a weight of attention and, where its products are of halves, theirs. */
const weightBytes = ({ dtype, elementBytes, hopper }: PlanContext): number =>
  dtype === 'float32' && hopper ? 2 * elementBytes : elementBytes;

/** Ranges [first, count] of `length` rows of which each costs `bytes`. */
function ranges(length: number, bytes: number): (readonly [first: number, count: number])[] {
  const count = divideUp(length, Math.max(1, divideUp(length * bytes, PIECE_BYTES)));
  const even = count < length ? divideUp(count, 8) * 8 : count;
  return Array.from({ length: divideUp(length, even) }, (_, i) => [
    i * even,
    Math.min(even, length - i * even),
  ]);
}

const padded = (length: number): number => divideUp(length, 8) * 8;

function forward(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [y, lse, q, k, v] = args as readonly bigint[];
  const s = sizesOf(args.slice(5));
  const { n, heads, lq, lk, causal, scale } = s;
  if (isForHopper(s, context)) return hopperForward(args, s, context);
  if (isFlash(s, context)) {
    const shared = (QUERIES / ROWS) * TILE_BYTES + 4 * TILE_BYTES;
    return [flash('forward', { rows: lq, each: QUERIES, shared, pointers: [y, lse, q, k, v] }, s)];
  }
  const { row, scores, across } = pieces(s, context);
  const [z, stride] = [n * heads, padded(lk)];
  const all = ranges(lq, z * (lk * 4 + stride * weightBytes(context)));
  const most = all[0][1];
  const sums = context.workspace(z * most * lk * FLOAT);
  const p = context.workspace(z * most * stride * context.elementBytes);
  return all.flatMap(([first, rows]) => [
    ...scores(sums, row(q, first), rows, k, lk),
    byRows('attention_softmax', z * rows, [p, lse, sums, z, rows, first, lq, lk, stride, causal, scale]),
    ...across(row(y, first), p, rows, stride, v),
  ]);
}

function backward(args: LaunchArguments, context: PlanContext): KernelLaunch[] {
  const [dq, dk, dv, dy, y, lse, q, k, v] = args as readonly bigint[];
  const s = sizesOf(args.slice(9));
  if (isForHopper(s, context)) return hopperBackward(args, s, context);
  const { n, heads, lq, lk, d, causal, scale } = s;
  const z = n * heads;
  const delta = context.workspace(z * lq * FLOAT);
  const first = byRows('attention_delta', z * lq, [delta, dy, y, heads, lq, d, z * lq]);
  if (isFlash(s, context)) {
    const inputs = [dy, lse, delta, q, k, v];
    const shared = 6 * TILE_BYTES;
    const forKeys = shared + 4 * ROWS * 4;
    return [
      first,
      flash('backward_q', { rows: lq, each: ROWS, shared, pointers: [dq, ...inputs] }, s),
      flash('backward_kv', { rows: lk, each: ROWS, shared: forKeys, pointers: [dk, dv, ...inputs] }, s),
    ];
  }
  const { row, scores, across, along } = pieces(s, context);
  const queryPieces = ranges(lq, 2 * z * (lk * 4 + padded(lk) * weightBytes(context)));
  const keyPieces = ranges(lk, 2 * z * (lq * 4 + lq * context.elementBytes));
  const cells = Math.max(queryPieces[0][1] * padded(lk), lq * padded(keyPieces[0][1]));
  const [sums, dp] = [context.workspace(z * cells * FLOAT), context.workspace(z * cells * FLOAT)];
  const p = context.workspace(z * cells * context.elementBytes);
  const ds = context.workspace(z * cells * context.elementBytes);
  /** P and dS of some queries and some keys. */
  const gradients = (query: number, rows: number, key: number, keys: number) => [
    ...scores(sums, row(q, query), rows, row(k, key), keys),
    ...scores(dp, row(dy, query), rows, row(v, key), keys),
    byRows('attention_gradients', z * rows, [
      ...[p, ds, sums, dp, lse, delta, z, rows, keys, query, key, lq, padded(keys), causal, scale],
    ]),
  ];
  const whole = queryPieces.length === 1 && keyPieces.length === 1;
  return [
    first,
    ...queryPieces.flatMap(([query, rows]) => [
      ...gradients(query, rows, 0, lk),
      ...across(row(dq, query), ds, rows, padded(lk), k),
    ]),
    ...keyPieces.flatMap(([key, keys]) => [
      ...(whole ? [] : gradients(0, lq, key, keys)),
      ...along(row(dv, key), p, keys, padded(keys), dy),
      ...along(row(dk, key), ds, keys, padded(keys), q),
    ]),
  ];
}

export const attentionPlans: readonly (readonly [string, Plan])[] = [
  ['attention_forward', { signature: 'pppppiiiiiif', launches: forward }],
  ['attention_backward', { signature: 'pppppppppiiiiiif', launches: backward }],
];
