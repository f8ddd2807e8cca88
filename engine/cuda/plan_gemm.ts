// Tiles of matrix products (gemm.cu): which one, how k is split, and the launch that joins split sums. The large tile (128 x 128)
// needs operands whose rows are whole 16-byte chunks. Of both tiles and all splits the one is taken whose busiest multiprocessor is
// done first, by a model: 160 large tiles on 128 multiprocessors take as long as 256, and 640 small ones as 640. Its numbers are
// reasoned, not measured.
import {
  divideUp,
  FLOAT,
  type KernelLaunch,
  type LaunchArgument,
  PACK,
  type PlanContext,
  THREADS,
  walking,
} from './plan.ts';

export const GEGLU = 4;
export const GEGLU_BLOCK = 32;
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
