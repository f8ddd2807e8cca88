// Clusters: blocks that run together and reach each other's shared memory. Each has a memory and a race detector of its own,
// put in place when one of its warps runs; all their warps and asynchronous copies are agents of one happens-before order. A
// shared::cluster address is the offset in shared memory, with one more than the block's rank in its upper bits where mapa
// made it; without them it is the running block's own. A block may be reached only after it is known to have begun, and may
// end only when it has seen whatever reaches it.
import { agents, makeKey, mostWarps } from './agents.ts';
import { joinAcquired, joinClock } from './grid_order.ts';
import {
  type BlockState,
  type Cluster,
  type Machine,
  sharedBytes,
  type VectorClock,
  type Warp,
} from './machine.ts';
import { newMemory } from './memory.ts';
import { newRaceDetector } from './races.ts';
import { fail, GpuReport, quote, threadName } from './report.ts';
import { eachLane, isWhole, type Outcome, releaseClock, type WarpCall } from './warp_ops.ts';

const RANK_SHIFT = 24;
/** Before an agent's first clock. */
const BEGUN = 1;

/** From here on it is this block of the cluster that runs. */
export function enterBlock(m: Machine, block: BlockState): void {
  m.block = block;
  m.ctaid.set(block.ctaid);
  const { race } = m.ranks[0];
  m.ranks[block.rank] ??= { shared: newMemory(sharedBytes), race: newRaceDetector(m, race.globals) };
  Object.assign(m, m.ranks[block.rank]);
}

/** Runs `body` as if it were the block's turn. */
export function inBlock<T>(m: Machine, block: BlockState, body: () => T): T {
  const before = m.block;
  if (before === block) return body();
  enterBlock(m, block);
  try {
    return body();
  } finally {
    enterBlock(m, before);
  }
}

/** The block that the running warp means by an address, and the offset in its shared memory. */
export function blockAt(m: Machine, address: number, lane: number, site: number) {
  const rank = (address >>> RANK_SHIFT) - 1;
  const own = m.warp.block;
  const block = rank < 0 ? own : own.cluster.blocks[rank];
  if (!block)
    fail(
      m,
      'cluster',
      `no block ${rank} in a cluster of ${own.cluster.blocks.length}, or no address of mapa`,
      lane,
      site,
    );
  return { block, offset: address & ((1 << RANK_SHIFT) - 1) };
}

/** The running warp, or an asynchronous operation that it began, reaches another block's shared memory. */
export function noteReach(m: Machine, block: BlockState, lane: number, site: number, copy?: number): void {
  const { warp } = m;
  if (block === warp.block) return;
  if (!block.warps.some(({ agent }) => warp.seen[agent] > 0))
    fail(m, 'cluster', `block ${block.rank} of the cluster is not known to have begun`, lane, site);
  const agent = copy ?? warp.agent;
  block.reached[agent] = block.clocks[agent];
  block.reachedAt[agent] = site;
}

/** Reports what still reaches a block's shared memory when all its threads may have ended. */
export function checkReached(m: Machine, { cluster, rank, warps, reached, reachedAt }: BlockState): void {
  if (!m.detectRaces) return;
  for (let agent = 0; agent < agents; agent++) {
    if (warps.some(({ seen }) => seen[agent] >= reached[agent])) continue;
    const who = agent < mostWarps ? threadName(m, makeKey(0, agent, 0)) : 'an asynchronous copy';
    const where = quote(m.kernel.source.instructions[reachedAt[agent]]);
    const name = `kernel ${m.kernel.source.name} block ${rank} of a cluster of ${cluster.blocks.length}`;
    throw new GpuReport('cluster', `${name} may end while ${who} reaches its shared memory at ${where}`);
  }
}

/** What generated code calls for shared::cluster addresses. */
export const clusterFunctions = (m: Machine) => ({
  mapa(lane: number, address: number, rank: number, site: number): number {
    const { blocks } = m.block.cluster;
    if (rank < 0 || rank >= blocks.length)
      fail(m, 'cluster', `mapa to block ${rank} of a cluster of ${blocks.length}`, lane, site);
    return blockAt(m, address, lane, site).offset | ((rank + 1) << RANK_SHIFT);
  },
  /** The memory that an address names, as generated code knows it. */
  reach(lane: number, address: number, site: number) {
    const { block, offset } = blockAt(m, address, lane, site);
    noteReach(m, block, lane, site);
    const { shared, race } = m.ranks[block.rank];
    const S: typeof m.fault.S = (...fault) => inBlock(m, block, () => m.fault.S(...fault));
    return {
      ...{ SI: shared.i32, SF: shared.f32, SH: shared.u16, SB: shared.u8 },
      ...{ SS32: shared.shadow32, SS16: shared.shadow16, SS8: shared.shadow8 },
      ...{ race, fault: { ...m.fault, S }, offset },
    };
  },
});

/** What those that came to a barrier had seen, as they came. */
interface Gathered {
  readonly seen: VectorClock;
  readonly proxyFenced: VectorClock;
  readonly gpuFenced: VectorClock;
  readonly acquired: Map<number, VectorClock>;
}

interface ClusterBarrier {
  phase: number;
  /** Lanes that have come in this phase, and the phase in which each lane came that has not waited since. */
  readonly here: Map<Warp, number>;
  readonly came: Map<Warp, Int32Array>;
  gathering: Gathered;
  done: Gathered;
}

const newGathered = (): Gathered => ({
  ...{ seen: new Int32Array(agents), proxyFenced: new Int32Array(agents) },
  ...{ gpuFenced: new Int32Array(agents), acquired: new Map() },
});

function join(target: Gathered, source: Gathered): void {
  joinClock(target.seen, source.seen);
  joinClock(target.proxyFenced, source.proxyFenced);
  joinClock(target.gpuFenced, source.gpuFenced);
  joinAcquired(target.acquired, source.acquired);
}

function barrierOf(cluster: Cluster): ClusterBarrier {
  cluster.barrier ??= {
    ...{ phase: 0, here: new Map(), came: new Map(), gathering: newGathered(), done: newGathered() },
  };
  return cluster.barrier as ClusterBarrier;
}

/** barrier.cluster.arrive and .wait, by whichever lanes run it; without .aligned they need not be a whole warp. */
export function clusterBarrier(call: WarpCall): Outcome {
  const { m, i } = call;
  const { cluster } = m.block;
  const words = i.modifiers;
  if (words.includes('aligned') && !isWhole(call)) return 'park';
  const b = barrierOf(cluster);
  const came = b.came.get(m.warp) ?? new Int32Array(32).fill(-1);
  b.came.set(m.warp, came);
  if (words.includes('arrive')) {
    eachLane(call, (lane) => {
      if (came[lane] >= 0) fail(m, 'barrier', 'barrier.cluster.arrive twice without a wait', lane, i);
      came[lane] = b.phase;
    });
    b.here.set(m.warp, (b.here.get(m.warp) ?? 0) | call.active);
    // Whoever arrives has begun, if it hands on no more than that.
    if (words.includes('relaxed')) b.gathering.seen[m.warp.agent] ||= BEGUN;
    else join(b.gathering, { ...m.warp, seen: releaseClock(m, m.warp) });
    m.block.progress++;
    return 'next';
  }
  settle(cluster, b);
  let passes = true;
  eachLane(call, (lane) => {
    if (came[lane] < 0) fail(m, 'barrier', 'barrier.cluster.wait without an arrive', lane, i);
    passes &&= came[lane] < b.phase;
  });
  if (!passes) return 'again';
  eachLane(call, (lane) => {
    came[lane] = -1;
  });
  join(m.warp, b.done);
  m.block.progress++;
  return 'next';
}

/** The phase ends when every thread that has not ended has come. */
function settle({ blocks }: Cluster, b: ClusterBarrier): void {
  const all = blocks.flatMap(({ warps }) => warps);
  if (all.some((w) => (w.live & ~(b.here.get(w) ?? 0)) !== 0)) return;
  b.phase++;
  b.here.clear();
  b.done = b.gathering;
  b.gathering = newGathered();
}
