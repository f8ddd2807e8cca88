// mbarrier objects of shared memory: pending arrivals, expected bytes of asynchronous copies, and a phase that ends when
// both are spent. Arriving releases what the warp has done, a wait that succeeds acquires what all arrivals of the phase
// released. Their state is kept beside shared memory, by address; a kernel that looks inside one is a bug anyway.
import { agents } from './agents.ts';
import { blockAt, noteReach } from './cluster.ts';
import { landForBarrier } from './copy_async.ts';
import { joinClock } from './grid_order.ts';
import type { BlockState, Machine, VectorClock } from './machine.ts';
import type { Operand } from './ptx.ts';
import { fail } from './report.ts';
import { eachLane, laneValue, type Outcome, releaseClock, setLane, type WarpCall } from './warp_ops.ts';

export interface Mbarrier {
  /** In whose shared memory it is. */
  readonly block: BlockState;
  readonly address: number;
  readonly count: number;
  pending: number;
  /** Bytes that asynchronous copies have yet to bring. */
  bytes: number;
  phase: number;
  /** What arrivals of this phase released, and those of the phase before, which a wait acquires. */
  seen: VectorClock;
  fenced: VectorClock;
  doneSeen: VectorClock;
  doneFenced: VectorClock;
  /** Who initialised it, and when. */
  readonly initWarp: number;
  readonly initLane: number;
  readonly initClock: number;
  /** When that warp fenced it by fence.mbarrier_init, towards whoever is ordered after that. */
  fencedClock: number;
}

/** Arrivals and bytes of a phase that an mbarrier can count. */
const COUNTS = 2 ** 20 - 1;

function mbarriers(block: BlockState): Map<number, Mbarrier> {
  const known = block.extra.get('mbarriers') as Map<number, Mbarrier> | undefined;
  if (known) return known;
  const made = new Map<number, Mbarrier>();
  block.extra.set('mbarriers', made);
  return made;
}

/** The initialised object at an offset in the block's shared memory; only those may use it who have seen its initialisation. */
export function findMbarrier(call: WarpCall, block: BlockState, address: number, lane: number): Mbarrier {
  const { m, i } = call;
  const found = mbarriers(block).get(address);
  const name = `mbarrier at shared+0x${(address >>> 0).toString(16)}`;
  if (!found) return fail(m, 'mbarrier', `the ${name} was never initialised`, lane, i);
  const own = found.initWarp === m.warp.agent && found.initLane === lane;
  if (!own && found.initClock > m.warp.seen[found.initWarp]) {
    fail(m, 'race', `the ${name} is used without ordering after its mbarrier.init`, lane, i);
  }
  return found;
}

/** The object that an operand names in this block, or where the space is shared::cluster in another. */
function mbarrierAt(call: WarpCall, operand: Operand, lane: number): Mbarrier {
  const { m, i } = call;
  const address = laneValue(call, operand, lane);
  if (!i.modifiers.includes('shared::cluster')) return findMbarrier(call, m.block, address, lane);
  const { block, offset } = blockAt(m, address, lane, i.site);
  const found = findMbarrier(call, block, offset, lane);
  noteReach(m, block, lane, i.site);
  return found;
}

/** Ends phases that have nothing left to wait for. */
export function settlePhase(b: Mbarrier): void {
  while (b.pending === 0 && b.bytes === 0) {
    b.phase++;
    b.pending = b.count;
    b.doneSeen = b.seen;
    b.doneFenced = b.fenced;
    b.seen = Int32Array.from(b.seen);
    b.fenced = Int32Array.from(b.fenced);
    b.block.progress++;
  }
}

function initialise(call: WarpCall, lane: number): void {
  const { m, i } = call;
  const address = laneValue(call, i.operands[0], lane);
  const count = laneValue(call, i.operands[1], lane);
  if (address & 7 || (m.shared.shadow32[address >>> 2] & 0x01010101) !== 0x01010101) {
    m.fault.S(lane, 0, address, 8, false, i.site);
  }
  if (count < 1 || count > COUNTS) fail(m, 'mbarrier', `${count} arrivals are not 1 to ${COUNTS}`, lane, i);
  mbarriers(m.block).set(address, {
    ...{ block: m.block, address, count, pending: count, bytes: 0, phase: 0 },
    ...{ seen: new Int32Array(agents), fenced: new Int32Array(agents) },
    ...{ doneSeen: new Int32Array(agents), doneFenced: new Int32Array(agents) },
    ...{ initWarp: m.warp.agent, initLane: lane, initClock: m.block.clocks[m.warp.agent] },
    fencedClock: Number.POSITIVE_INFINITY,
  });
  m.block.progress++;
}

/** fence.mbarrier_init: of what this warp wrote it covers nothing but mbarriers. */
export function fenceInits({ block, warp }: Machine): void {
  for (const b of mbarriers(block).values())
    if (b.initWarp === warp.agent) b.fencedClock = Math.min(b.fencedClock, block.clocks[warp.agent]);
  block.clocks[warp.agent]++;
}

/** Whether whoever runs now knows that the initialisation was fenced, for mbarriers alone or for the async proxy. */
export const isInitFenced = ({ warp }: Machine, b: Mbarrier): boolean =>
  (b.initWarp === warp.agent
    ? b.fencedClock < Number.POSITIVE_INFINITY
    : warp.seen[b.initWarp] >= b.fencedClock) || warp.proxyFenced[b.initWarp] >= b.initClock;

/** mbarrier.arrive and mbarrier.expect_tx, alone or as one. */
function arrive(call: WarpCall, lane: number): void {
  const { m, i } = call;
  const at = i.operands.findIndex((x) => x.kind === 'address');
  const b = mbarrierAt(call, i.operands[at], lane);
  const given = i.operands[at + 1];
  const number = given ? laneValue(call, given, lane) : undefined;
  const expects = i.modifiers.includes('expect_tx');
  if (expects) b.bytes += number ?? 0;
  if (b.bytes > COUNTS) fail(m, 'mbarrier', `${b.bytes} bytes are more than ${COUNTS}`, lane, i);
  if (i.modifiers[0] === 'arrive') {
    const count = expects ? 1 : (number ?? 1);
    if (b.pending < count) fail(m, 'mbarrier', 'more arrivals than the barrier was initialised for', lane, i);
    joinClock(b.seen, releaseClock(m, m.warp));
    joinClock(b.fenced, m.warp.proxyFenced);
    b.pending -= count;
  }
  m.block.progress++;
  settlePhase(b);
  if (at > 0) setLane(call, i.operands[0], lane, 0);
}

/** Whether the phase of the given parity is over; acquires it if so, and if it `may` succeed. */
function tryWait(call: WarpCall, lane: number, may: boolean): boolean {
  const { m, i } = call;
  if (!i.modifiers.includes('parity')) throw new Error(`ptx: the virtual GPU does not know "${i.text}"`);
  const b = mbarrierAt(call, i.operands[1], lane);
  const over = may && (b.phase & 1) !== (laneValue(call, i.operands[2], lane) & 1);
  setLane(call, i.operands[0], lane, over ? 1 : 0);
  if (over) {
    joinClock(m.warp.seen, b.doneSeen);
    joinClock(m.warp.proxyFenced, b.doneFenced);
  }
  return over;
}

/** cp.async.mbarrier.arrive: the arrival comes when the lane's copies have landed. */
function arriveAfterCopies(call: WarpCall, lane: number): void {
  const { m, i } = call;
  const b = mbarrierAt(call, i.operands[0], lane);
  // Without .noinc the arrival to come is counted first, so that it leaves the count as it was.
  if (!i.modifiers.includes('noinc')) b.pending++;
  landForBarrier(m, lane, b, () => {
    b.pending--;
    settlePhase(b);
  });
}

/** mbarrier.* and cp.async.mbarrier.arrive. */
export function mbarrier(call: WarpCall): Outcome {
  const { m, i } = call;
  const what = i.opcode === 'cp' ? 'copies' : i.modifiers[0];
  let outcome: Outcome = 'next';
  // try_wait may fail though the phase is over; that a warp has tried is then progress.
  const fails = what === 'try_wait' && m.schedule.async === 'random' && m.random() < 0.25;
  if (fails) m.block.progress++;
  eachLane(call, (lane) => {
    if (what === 'copies') arriveAfterCopies(call, lane);
    else if (what === 'init') initialise(call, lane);
    else if (what === 'inval') mbarriers(m.block).delete(laneValue(call, i.operands[0], lane));
    else if (what === 'arrive' || what === 'expect_tx') arrive(call, lane);
    else if (what === 'try_wait' || what === 'test_wait') {
      if (!tryWait(call, lane, !fails)) outcome = 'yield';
    } else throw new Error(`ptx: the virtual GPU does not know "${i.text}"`);
  });
  return outcome;
}

/** Words for a report of deadlock. */
export function describeMbarriers(block: BlockState): string {
  const all = [...mbarriers(block).values()].map(
    (b) => `0x${b.address.toString(16)} in phase ${b.phase} lacks ${b.pending} arrivals and ${b.bytes} bytes`,
  );
  return all.length ? `mbarriers: ${all.join(', ')}` : '';
}
