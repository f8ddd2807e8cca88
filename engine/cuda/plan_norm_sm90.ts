// How group norm is cut on Hopper (norm_sm90.cu): how many groups a cluster takes, how many blocks it has, and how many of a block's
// rows stay in its shared memory; the others are read twice. The half types, and where whole groups make whole packs of eight.
// Of the cuts the one is taken that a small model of the time finds fastest. Reasoned, not measured.
import { divideUp, FLOAT, type KernelLaunch, type LaunchArguments, PACK, type PlanContext } from './plan.ts';

/** Blocks of a cluster: eight are as many as every Hopper GPU takes. */
const CLUSTERS = [1, 2, 4, 8];
/**
 * The multiprocessors of a GPC that clusters of more than two blocks fill: some have eighteen. One of an H200's has fewer, so that 15
 * clusters of eight run there at a time, not the 16 that are reckoned with here (docs/gpu.md).
 */
const GPC = 16;
/** norm_sm90.cu's. */
const SLAB_THREADS = 512;
const WIDE = 2 * PACK;
const BATCHES = 4;
const SECTOR = 32;
/** Shared memory of a multiprocessor, and what each block takes of it for the system. */
const MULTIPROCESSOR_BYTES = 228 * 1024;
const BLOCK_BYTES = 1024;

/** Bytes a cycle: of the memory (4.3 TB/s at 1.755 GHz), and of one multiprocessor at most. */
const MEMORY_RATE = 2450;
const BLOCK_RATE = 40;
/** Of what is read again, the share that L2 no longer has. */
const FORGOTTEN = 0.5;
/** Where less of a block's rows would stay, three launches of many blocks are taken for as good. */
const LEAST_KEPT = 1 / 8;
/** Cycles of a block in which memory rests: the first rows' latency, the sums of its threads, the cluster's barrier. */
const REST = 3000;

interface Direction {
  /** Tensors that are read and written. */
  readonly reads: number;
  readonly writes: number;
  /** What a block needs besides its rows, without what it needs of each group. */
  readonly fixed: number;
  readonly residents: number;
  /** Instructions of an element, forth and back. */
  readonly slots: number;
}
const FORWARD: Direction = { reads: 1, writes: 1, fixed: SLAB_THREADS * 16, residents: 2, slots: 16 };
const BACKWARD: Direction = { reads: 2, writes: 1, fixed: SLAB_THREADS * WIDE * 4, residents: 1, slots: 38 };

interface Cut {
  readonly slabGroups: number;
  readonly blocks: number;
  readonly share: number;
  readonly kept: number;
  readonly shared: number;
}

function cyclesOf(
  { share, kept, shared, blocks }: Cut,
  slab: number,
  items: number,
  multiprocessors: number,
  { reads, writes, residents, slots }: Direction,
): number {
  const usable =
    blocks > 2 && multiprocessors > GPC ? Math.floor(multiprocessors / GPC) * GPC : multiprocessors;
  const resident = Math.min(residents, Math.floor(MULTIPROCESSOR_BYTES / (shared + BLOCK_BYTES)));
  const busiest = divideUp(items, usable);
  const row = SECTOR * divideUp(2 * slab, SECTOR);
  const bytes = share * (reads * row + writes * 2 * slab) + (share - kept) * reads * row * FORGOTTEN;
  const moved = bytes / Math.min(BLOCK_RATE, MEMORY_RATE / Math.min(items, usable));
  const issued = (share * slab * slots) / 128;
  return busiest * Math.max(moved, issued) + divideUp(busiest, resident) * REST;
}

/** Undefined where the kernel does not take the shape. */
function cutOf(
  [n, hw, c, groups]: readonly number[],
  { hopper, elementBytes, multiprocessors, sharedBytes }: PlanContext,
  direction: Direction,
): Cut | undefined {
  const width = c / groups;
  // A pack of eight lies in two groups at most.
  if (!hopper || elementBytes !== 2 || (width < WIDE && width !== PACK)) return undefined;
  let best: Cut | undefined;
  let least = Number.POSITIVE_INFINITY;
  for (const blocks of CLUSTERS) {
    for (let slabGroups = groups; slabGroups >= 1; slabGroups--) {
      const slab = slabGroups * width;
      if (groups % slabGroups || slab % WIDE || slab > SLAB_THREADS) continue;
      const share = divideUp(hw, blocks);
      const fixed = direction.fixed + 16 * slabGroups * (blocks + 1);
      const rowBytes = direction.reads * slab * elementBytes;
      const kept = Math.min(share, Math.floor((sharedBytes - fixed) / rowBytes));
      if (kept < share * LEAST_KEPT) continue;
      const cut = { slabGroups, blocks, share, kept, shared: fixed + kept * rowBytes };
      const items = n * (groups / slabGroups) * blocks;
      const cycles = cyclesOf(cut, slab, items, multiprocessors, direction);
      if (cycles < least) [best, least] = [cut, cycles];
    }
  }
  return best;
}

function launchOf(
  entry: string,
  { slabGroups, blocks, share, kept, shared }: Cut,
  tensors: LaunchArguments,
  [n, c, groups]: readonly number[],
  sizes: readonly number[],
  attributes: readonly number[],
): KernelLaunch {
  const width = c / groups;
  const lanes = Math.floor((SLAB_THREADS * WIDE) / (slabGroups * width));
  const part = lanes * divideUp(kept, BATCHES * lanes);
  return {
    ...{ family: 'norm_sm90', entry, grid: [blocks, groups / slabGroups, n], block: SLAB_THREADS },
    ...{ cluster: blocks, shared },
    args: [...tensors, ...sizes, groups, width, slabGroups, lanes, share, kept, part, ...attributes],
  };
}

/** The launch of group_norm_forward; undefined where this kernel does not take it. */
export function groupNormOnHopper(args: LaunchArguments, context: PlanContext): KernelLaunch[] | undefined {
  const [n, hw, c, own, groups, silu, eps] = args.slice(7).map(Number);
  const cut = own % WIDE ? undefined : cutOf([n, hw, c, groups], context, FORWARD);
  if (!cut) return undefined;
  return [launchOf('group_norm_cluster', cut, args.slice(0, 7), [n, c, groups], [hw, c, own], [silu, eps])];
}

/**
 * Of group_norm_backward: the launch that writes dx and leaves `rows` rows of sums [2, c] for the gradients of weight and bias,
 * where those are wanted.
 */
export function groupNormBackwardOnHopper(
  args: LaunchArguments,
  context: PlanContext,
): { launch: KernelLaunch; partial: bigint; rows: number } | undefined {
  const [dx, dweight, dbias, ...inputs] = args.slice(0, 9);
  const [n, hw, c, groups, silu] = args.slice(9).map(Number);
  const cut = cutOf([n, hw, c, groups], context, BACKWARD);
  if (!cut) return undefined;
  const rows = n * cut.blocks;
  const partial = dweight || dbias ? context.workspace(rows * 2 * c * FLOAT) : 0n;
  const tensors = [dx, partial, ...inputs];
  const launch = launchOf('group_norm_backward_cluster', cut, tensors, [n, c, groups], [hw, c], [silu]);
  return { launch, partial, rows };
}
