// Plans of attention on Hopper: heads 64 wide in the half types, whose tiles TMA brings by maps over [n, l, heads * 64].
import { TensorMapDataType, TensorMapSwizzle } from './api.ts';
import {
  divideUp,
  FLOAT,
  type KernelLaunch,
  type LaunchArgument,
  type PlanContext,
  THREADS,
} from './plan.ts';

const HEAD = 64;
/** Rows of a warpgroup, of a tile of two, and of a warp, which stores on its own. */
const ROWS = 64;
const TILE = 128;
const WARP_ROWS = 16;
const TILE_BYTES = TILE * HEAD * 2;
const HALF_TILE_BYTES = TILE_BYTES / 2;
const WARP = 32;
const WARPGROUP = 4 * WARP;
/** What a block of shared memory may lack of the swizzle's alignment. */
const ALIGNMENT = 1024;

/** Queries [n, lq, heads * d], keys and values [n, lk, heads * d]. */
export interface AttentionSizes {
  readonly n: number;
  readonly heads: number;
  readonly lq: number;
  readonly lk: number;
  readonly d: number;
  readonly causal: number;
  readonly scale: number;
}

export const isForHopper = ({ d }: AttentionSizes, { hopper, elementBytes }: PlanContext): boolean =>
  hopper && elementBytes === 2 && d === HEAD;

/** Boxes of `rows` rows of one head of [n, l, heads * 64]. */
const mapOf =
  ({ n, heads }: AttentionSizes, context: PlanContext) =>
  (address: LaunchArgument, l: number, rows: number): Uint8Array =>
    context.tiledMap({
      dataType: context.dtype === 'float16' ? TensorMapDataType.FLOAT16 : TensorMapDataType.BFLOAT16,
      globalAddress: address as bigint,
      globalDim: [heads * HEAD, l, n],
      globalStrides: [heads * HEAD * 2, l * heads * HEAD * 2],
      elementStrides: [1, 1, 1],
      boxDim: [HEAD, rows, 1],
      swizzle: TensorMapSwizzle.B128,
    });

/** Warpgroups of forward, each with 64 rows of queries. */
const GROUPS = 3;
const GROUPS_BYTES = GROUPS * HALF_TILE_BYTES;

const KEY_STAGES = 4;
/** Queries twice, rings of keys and values, results on their way out, and what one warpgroup hands to another. */
const FORWARD_SHARED =
  ALIGNMENT + 2 * GROUPS_BYTES + 2 * KEY_STAGES * TILE_BYTES + GROUPS_BYTES + 36 * WARPGROUP * 4;

/** So many keys, or fewer, are all kept: the text's 77. Three warpgroups and a warp share two heads' keys and values. */
const FEW_KEYS = 80;
const FEW_QUERY_STAGES = 9;
const FEW_SHARED = ALIGNMENT + FEW_QUERY_STAGES * HALF_TILE_BYTES + 4 * FEW_KEYS * HEAD * 2 + GROUPS_BYTES;

export function hopperForward(
  [y, lse, q, k, v]: readonly LaunchArgument[],
  s: AttentionSizes,
  context: PlanContext,
): KernelLaunch[] {
  const { n, heads, lq, lk, causal, scale } = s;
  const map = mapOf(s, context);
  const isFew = lk <= FEW_KEYS;
  const keys = isFew ? FEW_KEYS : TILE;
  const perHead = divideUp(lq, ROWS);
  const units = n * heads * perHead;
  return [
    {
      family: 'attention_sm90',
      entry: isFew ? 'attention_hopper_few_forward' : 'attention_hopper_forward',
      grid: [Math.min(units, context.multiprocessors), 1, 1],
      block: GROUPS * WARPGROUP + (isFew ? WARP : WARPGROUP),
      shared: isFew ? FEW_SHARED : FORWARD_SHARED,
      args: [
        ...[map(q, lq, ROWS), map(k, lk, keys), map(v, lk, keys), map(y, lq, WARP_ROWS), lse],
        ...[heads, lq, lk, causal, scale, units, perHead],
      ],
    },
  ];
}

const BACKWARD_STAGES = 3;
/** Floats of a tile's rows: log-sum-exp and delta. */
const ROW_FLOATS = 2 * TILE;
/** Own tiles, a ring of the other side's and of its rows, and two gradients on their way out. */
const BACKWARD_SHARED =
  ALIGNMENT + (2 + 2 * BACKWARD_STAGES + 2) * TILE_BYTES + BACKWARD_STAGES * ROW_FLOATS * 4;

export function hopperBackward(
  [dq, dk, dv, dy, y, lse, q, k, v]: readonly LaunchArgument[],
  s: AttentionSizes,
  context: PlanContext,
): KernelLaunch[] {
  const { n, heads, lq, lk, causal, scale } = s;
  const map = mapOf(s, context);
  const z = n * heads;
  const [keyBlocks, queryBlocks] = [divideUp(lk, TILE), divideUp(lq, TILE)];
  const rows = context.workspace(z * queryBlocks * ROW_FLOATS * FLOAT);
  return [
    {
      family: 'attention_backward_sm90',
      entry: 'attention_hopper_rows',
      grid: [divideUp(z * queryBlocks * TILE * 8, THREADS), 1, 1],
      block: THREADS,
      shared: 0,
      args: [rows, dy, y, lse, heads, lq, queryBlocks, n],
    },
    {
      family: 'attention_backward_sm90',
      entry: 'attention_hopper_backward',
      grid: [z * (keyBlocks + queryBlocks), 1, 1],
      block: 3 * WARPGROUP,
      shared: BACKWARD_SHARED,
      args: [
        ...[map(q, lq, TILE), map(k, lk, TILE), map(v, lk, TILE), map(dy, lq, TILE)],
        ...[map(dq, lq, WARP_ROWS), map(dk, lk, WARP_ROWS), map(dv, lk, WARP_ROWS), rows],
        ...[z, heads, lq, lk, causal, scale, keyBlocks, queryBlocks],
      ],
    },
  ];
}
