// How group norm is cut on Hopper (norm_sm90.cu): how many groups a cluster takes, how many blocks it has, and how many of a block's
// rows stay in its shared memory; the others are read twice. The half types, and where whole groups make whole packs of eight.
// Of the cuts the one is taken that a small model of the time finds fastest, of those about as fast the one with the most blocks. The
// model's numbers are fitted to what an H200 took for the base UNet's norms (bench/results/h200-kernels.md), by cuts that a model
// before it chose: 16 of 19 come out within 13 %, gradients where 2 us are added to each.
import { divideUp, FLOAT, type KernelLaunch, type LaunchArguments, PACK, type PlanContext } from './plan.ts';

/** Blocks of a cluster: eight are as many as every Hopper GPU takes. */
const CLUSTERS = [8, 4, 2, 1];
/** A cut with fewer blocks must be so much faster by the model: no measurement has shown that few multiprocessors are enough. */
const LESS = 0.9;
/** Multiprocessors that clusters of four and eight leave over, as GPCs have unlike numbers: an H200 runs 31 and 15 of them at a time. */
const LEFT_OVER = 8;
/** norm_sm90.cu's. */
const SLAB_THREADS = 512;
const WIDE = 2 * PACK;
const BATCHES = 4;
const SECTOR = 32;
/** Shared memory of a multiprocessor, and what each block takes of it for the system. */
const MULTIPROCESSOR_BYTES = 228 * 1024;
const BLOCK_BYTES = 1024;

/** Bytes a cycle, at 1.9 GHz: of the memory, and of one block or of two that share a multiprocessor. */
const MEMORY_RATE = 1675;
const BLOCK_RATE = 26;
/** Of what is read again, the share that it costs of reading it once: L2 mostly has it. */
const AGAIN = 0.25;
/** Where less of a block's rows would stay, three launches of many blocks are taken for as good. */
const LEAST_KEPT = 1 / 8;
/**
 * Bytes of x beyond which three launches of many blocks are faster, as L2 has nothing of what is read again: an H200 took 597 us in
 * clusters for 512 x 512 pixels of 512 channels, 361 for 256, and by three launches 456 for as many bytes as the first have.
 */
const MOST_BYTES = 1e8;
/** Cycles in which memory rests: the launch, the first rows' latency, the sums of the threads, the clusters' barriers. */
const REST = 11_000;

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
const FORWARD: Direction = { reads: 1, writes: 1, fixed: SLAB_THREADS * 16, residents: 2, slots: 15 };
const BACKWARD: Direction = { reads: 2, writes: 1, fixed: SLAB_THREADS * WIDE * 4, residents: 1, slots: 38 };

interface Cut {
  readonly slabGroups: number;
  readonly blocks: number;
  readonly share: number;
  readonly kept: number;
  readonly shared: number;
}

/**
 * Waves of clusters; in each, blocks first read and then write, one phase after the other, as all of a wave begin together. The
 * busiest multiprocessor has `together` blocks, which is what limits a wave where memory as a whole does not.
 */
function cyclesOf(
  { share, kept, shared, blocks }: Cut,
  slab: number,
  clusters: number,
  multiprocessors: number,
  { reads, writes, residents, slots }: Direction,
): number {
  const usable = blocks > 2 && multiprocessors > LEFT_OVER ? multiprocessors - LEFT_OVER : multiprocessors;
  const abreast = Math.max(1, Math.floor(usable / blocks));
  const resident = Math.min(residents, Math.floor(MULTIPROCESSOR_BYTES / (shared + BLOCK_BYTES)));
  const together = Math.min(resident, divideUp(clusters, abreast));
  const waves = divideUp(clusters, abreast * together);
  const row = reads * SECTOR * divideUp(2 * slab, SECTOR);
  const running = Math.min(clusters, abreast * together) * blocks;
  const moved = (bytes: number) => bytes * Math.max(running / MEMORY_RATE, together / BLOCK_RATE);
  const again = (share - kept) * row * AGAIN;
  const issued = (together * share * slab * slots) / 128;
  return REST + waves * (moved(share * row) + Math.max(moved(share * writes * 2 * slab + again), issued));
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
  for (const blocks of CLUSTERS.filter((blocks) => blocks <= multiprocessors)) {
    for (let slabGroups = 1; slabGroups <= groups; slabGroups++) {
      const slab = slabGroups * width;
      if (groups % slabGroups || slab % WIDE || slab > SLAB_THREADS) continue;
      const share = divideUp(hw, blocks);
      const fixed = direction.fixed + 16 * slabGroups * (blocks + 1);
      const rowBytes = direction.reads * slab * elementBytes;
      // With fewer rows kept two blocks find room on a multiprocessor, and no wave is left for a few.
      for (let resident = direction.residents; resident >= 1; resident--) {
        const room = Math.min(sharedBytes, Math.floor(MULTIPROCESSOR_BYTES / resident) - BLOCK_BYTES);
        const kept = Math.min(share, Math.floor((room - fixed) / rowBytes));
        if (kept < share * LEAST_KEPT) continue;
        const cut = { slabGroups, blocks, share, kept, shared: fixed + kept * rowBytes };
        const clusters = n * (groups / slabGroups);
        const cycles = cyclesOf(cut, slab, clusters, multiprocessors, direction);
        if (cycles < LESS * least) [best, least] = [cut, cycles];
      }
    }
  }
  return best;
}

/** A launch's arguments, around those that the cut gives it. */
interface Given {
  readonly of: readonly [n: number, c: number, groups: number];
  readonly first: LaunchArguments;
  readonly last: LaunchArguments;
}

function launchOf(
  entry: string,
  { slabGroups, blocks, share, kept, shared }: Cut,
  { of: [n, c, groups], first, last }: Given,
): KernelLaunch {
  const width = c / groups;
  const lanes = Math.floor((SLAB_THREADS * WIDE) / (slabGroups * width));
  const part = lanes * divideUp(kept, BATCHES * lanes);
  return {
    ...{ family: 'norm_sm90', entry, grid: [blocks, groups / slabGroups, n], block: SLAB_THREADS },
    ...{ cluster: blocks, shared },
    args: [...first, groups, width, slabGroups, lanes, share, kept, part, ...last],
  };
}

/** The launch of group_norm_forward; undefined where this kernel does not take it. */
export function groupNormOnHopper(args: LaunchArguments, context: PlanContext): KernelLaunch[] | undefined {
  const [n, hw, c, own, groups, silu, eps] = args.slice(7).map(Number);
  const large = n * hw * c * context.elementBytes > MOST_BYTES;
  const cut = own % WIDE || large ? undefined : cutOf([n, hw, c, groups], context, FORWARD);
  if (!cut) return undefined;
  const first = [...args.slice(0, 7), hw, c, own];
  return [launchOf('group_norm_cluster', cut, { of: [n, c, groups], first, last: [silu, eps] })];
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
  const first = [dx, partial, ...inputs, hw, c];
  const launch = launchOf('group_norm_backward_cluster', cut, { of: [n, c, groups], first, last: [silu] });
  return { launch, partial, rows };
}
