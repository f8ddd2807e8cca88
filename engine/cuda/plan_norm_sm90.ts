// How group norm is cut on Hopper (norm_sm90.cu): how many groups a cluster takes and how many blocks it has, so that the rows of
// each block stay in its shared memory. The half types, and where whole groups make whole packs. Of the cuts that fit, the one
// whose busiest multiprocessor reads least, in sectors of 32 bytes. Reasoned, not measured.
import {
  divideUp,
  type KernelLaunch,
  type LaunchArguments,
  PACK,
  type PlanContext,
  THREADS,
} from './plan.ts';

/** Of a block: what Hopper has is 227 KiB. */
const SHARED_BYTES = 220 * 1024;
/** Blocks of a cluster: eight are as many as every Hopper GPU takes. */
const CLUSTERS = [1, 2, 4, 8];
/** Of a cluster: as many as the virtual GPU runs together, so that every cut can be proved on it. */
const CLUSTER_THREADS = 1024;
const SECTOR = 32;

interface Cut {
  readonly slabGroups: number;
  readonly blocks: number;
  readonly threads: number;
  readonly share: number;
  readonly shared: number;
}

/** Undefined where no cut fits. */
export function groupNormCut(
  [n, hw, c, groups]: readonly number[],
  { hopper, elementBytes, multiprocessors }: PlanContext,
): Cut | undefined {
  if (!hopper || elementBytes !== 2) return undefined;
  let best: Cut | undefined;
  let least = Number.POSITIVE_INFINITY;
  for (const blocks of CLUSTERS) {
    const threads = Math.min(THREADS, CLUSTER_THREADS / blocks);
    for (let slabGroups = groups; slabGroups >= 1; slabGroups--) {
      const slab = (slabGroups * c) / groups;
      const share = divideUp(hw, blocks);
      // Two numbers and two more of each group, two packs of sums of each thread, the rows.
      const shared = 16 * slabGroups + 2 * threads * PACK * 4 + share * slab * 2;
      if (groups % slabGroups || slab % PACK || slab > threads * PACK || shared > SHARED_BYTES) continue;
      const items = n * (groups / slabGroups) * blocks;
      const read = divideUp(items, multiprocessors) * share * divideUp(2 * slab, SECTOR);
      if (read < least) [best, least] = [{ slabGroups, blocks, threads, share, shared }, read];
    }
  }
  return best;
}

/** The launch of group_norm_forward; undefined where this kernel does not take it. */
export function groupNormOnHopper(args: LaunchArguments, context: PlanContext): KernelLaunch[] | undefined {
  const [n, hw, c, own, groups, silu, eps] = args.slice(7).map(Number);
  const cut = groupNormCut([n, hw, c, groups], context);
  if (!cut) return undefined;
  const { slabGroups, blocks, threads, share, shared } = cut;
  return [
    {
      family: 'norm_sm90',
      entry: 'group_norm_cluster',
      grid: [(groups / slabGroups) * blocks, n, 1],
      block: threads,
      cluster: blocks,
      shared,
      args: [...args.slice(0, 7), hw, c, own, groups, slabGroups, blocks, share, silu, eps],
    },
  ];
}
