// Instructions that a warp runs as one: barriers, shuffles, votes, fences. Each returns what becomes of the lanes that
// reached it. `.aligned` ones want every thread of the warp, the others those that their mask names; until they are all
// there the group is parked, and a warp whose groups are all parked is a report of divergence.
import { clusterBarrier } from './cluster.ts';
import { commitGroup, waitGroup } from './copy_async.ts';
import { gridDependency } from './grid_dependency.ts';
import { fenceGpu, joinAcquired, joinClock } from './grid_order.ts';
import {
  type BarrierState,
  type Group,
  type Machine,
  readRegister,
  type Warp,
  writeRegister,
} from './machine.ts';
import { loadMatrix, multiplyMatrix, storeMatrix } from './matrix.ts';
import { fenceInits, mbarrier } from './mbarrier.ts';
import type { Instruction, Operand } from './ptx.ts';
import { isWide } from './ptx.ts';
import { fail, GpuReport } from './report.ts';
import { bulkCopy } from './tma.ts';
import { setMaxRegisters } from './warpgroup.ts';
import { wgmma } from './wgmma.ts';

/**
 * next: go on; park: wait for other lanes; barrier: wait for other warps; yield: go on, after the others had a turn; again: the
 * same instruction after that.
 */
export type Outcome = 'next' | 'park' | 'barrier' | 'yield' | 'again';

/** A warp-wide instruction with the lanes that run it. */
export interface WarpCall {
  readonly m: Machine;
  readonly i: Instruction;
  readonly group: Group;
  /** Lanes whose guard holds, and the lowest of them. */
  readonly active: number;
  readonly first: number;
}

type WarpInstruction = (call: WarpCall) => Outcome;

/** The low 32 bits of a lane's operand. */
export function laneValue(call: WarpCall, x: Operand, lane: number): number {
  switch (x.kind) {
    case 'register':
      return readRegister(call.m, x, lane);
    case 'integer':
      return x.low;
    case 'float':
      return x.bits;
    case 'symbol':
      return call.m.kernel.locate(x.name).offset;
    case 'address':
      return (laneValue(call, x.base, lane) + x.offset) | 0;
    case 'not':
      return 1 - laneValue(call, x.operand, lane);
    default:
      throw new Error(`ptx: no value in a ${x.kind} operand`);
  }
}

export function eachLane({ active }: WarpCall, run: (lane: number) => void): void {
  for (let l = 0; l < 32; l++) if ((active >>> l) & 1) run(l);
}

export function setLane({ m }: WarpCall, x: Operand, lane: number, value: number): void {
  if (x.kind !== 'register') return;
  writeRegister(m, x, lane, value);
  if (isWide(x.type)) m.registers[m.warp.base + x.plane * 32 + 32 + lane] = 0;
}

/** Every thread with which the warp began. */
export const isWhole = ({ m, active }: WarpCall): boolean => active === m.warp.initial;

/** Whether the lanes that a member mask names are here. All name the same ones, themselves among them, and none that has ended. */
function membersHere(call: WarpCall, members: Operand): boolean {
  const { m, i, active, first } = call;
  const mask = laneValue(call, members, first);
  const refuse = (lane: number, what: string): never =>
    fail(m, 'divergence', `the member mask 0x${(mask >>> 0).toString(16)} ${what}`, lane, i);
  if (active & ~mask) refuse(31 - Math.clz32(active & ~mask), 'leaves out a thread that runs this');
  if (members.kind !== 'integer')
    eachLane(call, (l) => {
      if (laneValue(call, members, l) !== mask) refuse(l, "is not this thread's");
    });
  if ((mask & ~active) === 0) return true;
  if (mask & ~m.warp.live) refuse(first, 'names threads that have ended');
  return false;
}

/** A warp's clock moves on: what it did until now can be handed to others. Returns a snapshot of what it has seen. */
export function releaseClock(m: Machine, warp: Warp): Int32Array {
  const snapshot = Int32Array.from(warp.seen);
  snapshot[warp.agent] = m.block.clocks[warp.agent]++;
  return snapshot;
}

const barrier: WarpInstruction = (call) => {
  const { m, i, first } = call;
  const { warp, block } = m;
  const what = i.modifiers.find((word) =>
    ['warp', 'cluster', 'arrive', 'red', 'sync', 'wait'].includes(word),
  );
  if (what === 'warp') {
    if (!membersHere(call, i.operands[0])) return 'park';
    warp.seen[warp.agent] = block.clocks[warp.agent]++;
    return 'next';
  }
  if (what === 'cluster') return clusterBarrier(call);
  if (!isWhole(call)) return 'park';
  const reduce = what === 'red';
  const [id, count] = reduce ? i.operands.slice(1, i.operands.length - 1) : i.operands;
  const name = laneValue(call, id, first);
  const threads = count ? laneValue(call, count, first) : block.warps.length * 32;
  if (name < 0 || name > 15) fail(m, 'barrier', `there is no barrier ${name}, only 0 to 15`, first, i);
  const state = block.barriers.get(name) ?? newBarrier(threads, warp.seen.length);
  if (state.expected !== threads) {
    fail(m, 'barrier', `barrier ${name} is used with ${state.expected} and ${threads} threads`, first, i);
  }
  if (threads % 32) fail(m, 'barrier', `${threads} threads are no multiple of the warp size`, first, i);
  block.barriers.set(name, state);
  arrive(m, state);
  block.progress++;
  if (reduce) voteAtBarrier(call, state.count);
  if (what !== 'arrive') {
    warp.waiting = call.group;
    state.waiting.push(warp);
  }
  if (state.count * 32 < threads) return what === 'arrive' ? 'next' : 'barrier';
  block.barriers.delete(name);
  openBarrier(m, state);
  return what === 'arrive' ? 'next' : 'yield';
};

const newBarrier = (expected: number, agents: number): BarrierState => ({
  ...{ expected, count: 0, waiting: [], acquired: new Map() },
  ...{ seen: new Int32Array(agents), proxyFenced: new Int32Array(agents), gpuFenced: new Int32Array(agents) },
});

/** The barrier takes what the warp has done so far, and nothing that it does after an arrival without waiting. */
function arrive(m: Machine, state: BarrierState): void {
  const { warp } = m;
  state.count++;
  joinClock(state.seen, releaseClock(m, warp));
  joinClock(state.proxyFenced, warp.proxyFenced);
  joinClock(state.gpuFenced, warp.gpuFenced);
  joinAcquired(state.acquired, warp.acquired);
}

/** All have come: those that waited have seen what any had, and go on. */
function openBarrier(m: Machine, { waiting, seen, proxyFenced, gpuFenced, acquired }: BarrierState): void {
  for (const w of waiting) {
    joinClock(w.seen, seen);
    joinClock(w.proxyFenced, proxyFenced);
    joinClock(w.gpuFenced, gpuFenced);
    joinAcquired(w.acquired, acquired);
    if (w === m.warp) continue;
    w.state = 'run';
    const group = w.waiting!;
    group.pc = m.kernel.flow.blocks[group.pc].next;
  }
  finishVotes(m);
}

interface Votes {
  readonly entries: { call: WarpCall; warp: Warp; values: number[] }[];
}

/** bar.red: each warp's predicates are kept until the barrier opens. */
function voteAtBarrier(call: WarpCall, position: number): void {
  const { m, i } = call;
  if (position === 1) m.block.extra.set('votes', { entries: [] } satisfies Votes);
  const votes = m.block.extra.get('votes') as Votes;
  const predicate = i.operands[i.operands.length - 1];
  const values: number[] = [];
  eachLane(call, (l) => values.push(laneValue(call, predicate, l)));
  votes.entries.push({ call, warp: m.warp, values });
}

function finishVotes(m: Machine): void {
  const votes = m.block.extra.get('votes') as Votes | undefined;
  if (!votes) return;
  const { entries } = votes;
  m.block.extra.delete('votes');
  const all = entries.flatMap((entry) => entry.values);
  const running = m.warp;
  for (const { call, warp } of entries) {
    m.warp = warp;
    const how = call.i.modifiers;
    const total = all.reduce((a, b) => a + (b ? 1 : 0), 0);
    const value = how.includes('popc')
      ? total
      : how.includes('and')
        ? Number(total === all.length)
        : Number(total > 0);
    eachLane(call, (l) => setLane(call, call.i.operands[0], l, value));
  }
  m.warp = running;
}

const shuffle: WarpInstruction = (call) => {
  const { m, i, active } = call;
  const [target, source, by, clamp, members] = i.operands;
  if (!membersHere(call, members)) return 'park';
  const values = new Int32Array(32);
  for (let l = 0; l < 32; l++) values[l] = laneValue(call, source, l);
  const mode = i.modifiers[1];
  eachLane(call, (l) => {
    const b = laneValue(call, by, l) & 31;
    const c = laneValue(call, clamp, l);
    const segment = (c >>> 8) & 31;
    const max = (l & segment) | (c & 31 & ~segment);
    let from: number;
    if (mode === 'up') from = l - b;
    else if (mode === 'down') from = l + b;
    else if (mode === 'bfly') from = l ^ b;
    else from = (l & segment) | (b & ~segment);
    const inRange = mode === 'up' ? from >= max : from <= max;
    if (!inRange) from = l;
    if (!((active >>> from) & 1))
      fail(m, 'divergence', `shfl reads lane ${from}, which is not taking part`, l, i);
    const [data, flag] = target.kind === 'pair' ? [target.first, target.second] : [target, undefined];
    setLane(call, data, l, values[from]);
    if (flag) setLane(call, flag, l, inRange ? 1 : 0);
  });
  return 'next';
};

const vote: WarpInstruction = (call) => {
  const { i, active } = call;
  const [target, source, members] = i.operands;
  if (!membersHere(call, members)) return 'park';
  let ballot = 0;
  eachLane(call, (l) => {
    if (laneValue(call, source, l)) ballot |= 1 << l;
  });
  const results: Record<string, number> = {
    ballot,
    any: Number(ballot !== 0),
    all: Number(ballot === active),
    uni: Number(ballot === 0 || ballot === active),
  };
  eachLane(call, (l) => setLane(call, target, l, results[i.modifiers[1]]));
  return 'next';
};

const match: WarpInstruction = (call) => {
  const { i, active, m } = call;
  const [target, source, members] = i.operands;
  if (i.modifiers.includes('b64')) throw new Error(`ptx: the virtual GPU does not know "${i.text}"`);
  if (!membersHere(call, members)) return 'park';
  const value = (l: number) => laneValue(call, source, l);
  eachLane(call, (l) => {
    let same = 0;
    for (let k = 0; k < 32; k++) if ((active >>> k) & 1 && value(k) === value(l)) same |= 1 << k;
    const all = i.modifiers[0] === 'all' || i.modifiers[1] === 'all';
    const [data, flag] = target.kind === 'pair' ? [target.first, target.second] : [target, undefined];
    setLane(call, data, l, all && same !== active ? 0 : same);
    if (flag) setLane(call, flag, l, Number(same === active));
  });
  m.stats.instructions++;
  return 'next';
};

const reduce: WarpInstruction = (call) => {
  const { i } = call;
  const [target, source, members] = i.operands;
  if (!membersHere(call, members)) return 'park';
  const values: number[] = [];
  eachLane(call, (l) => values.push(laneValue(call, source, l)));
  const isUnsigned = i.modifiers.includes('u32');
  const operations: Record<string, (a: number, b: number) => number> = {
    add: (a, b) => (a + b) | 0,
    min: (a, b) => (isUnsigned ? Math.min(a >>> 0, b >>> 0) | 0 : Math.min(a, b)),
    max: (a, b) => (isUnsigned ? Math.max(a >>> 0, b >>> 0) | 0 : Math.max(a, b)),
    and: (a, b) => a & b,
    or: (a, b) => a | b,
    xor: (a, b) => a ^ b,
  };
  const total = values.reduce(operations[i.modifiers[1]]);
  eachLane(call, (l) => setLane(call, target, l, total));
  return 'next';
};

const fence: WarpInstruction = ({ m, i }) => {
  const { warp, block } = m;
  const words = i.modifiers;
  if (words[0] === 'mbarrier_init') fenceInits(m);
  else if (words.some((w) => w.startsWith('async'))) {
    joinClock(warp.proxyFenced, warp.seen);
    warp.proxyFenced[warp.agent] = block.clocks[warp.agent]++;
  } else if (!words.includes('cta')) fenceGpu(m);
  return 'next';
};

const copy: WarpInstruction = (call) => {
  const { m, i } = call;
  const what = i.modifiers[1];
  if (what === 'bulk') return bulkCopy(call);
  if (what === 'mbarrier') return mbarrier(call);
  eachLane(call, (l) => {
    if (what === 'commit_group') commitGroup(m, l);
    else if (what === 'wait_all') {
      commitGroup(m, l);
      waitGroup(m, l, 0);
    } else waitGroup(m, l, laneValue(call, i.operands[0], l));
  });
  return 'next';
};

const elect: WarpInstruction = (call) => {
  const [target, members] = call.i.operands;
  if (!membersHere(call, members)) return 'park';
  // Any lane may lead, always the same one of the same members.
  const elected = call.m.schedule.order === 'reverse' ? 31 - Math.clz32(call.active) : call.first;
  eachLane(call, (l) => {
    const [leader, flag] = target.kind === 'pair' ? [target.first, target.second] : [target, undefined];
    setLane(call, leader, l, elected);
    if (flag) setLane(call, flag, l, Number(l === elected));
  });
  return 'next';
};

const whole =
  (run: (call: WarpCall) => void): WarpInstruction =>
  (call) => {
    if (!isWhole(call)) return 'park';
    run(call);
    return 'next';
  };

const instructions: Readonly<Record<string, WarpInstruction>> = {
  bar: barrier,
  barrier,
  shfl: shuffle,
  vote,
  match,
  redux: reduce,
  activemask: (call) => {
    eachLane(call, (l) => setLane(call, call.i.operands[0], l, call.active));
    return 'next';
  },
  elect,
  membar: fence,
  fence,
  cp: copy,
  mma: whole(multiplyMatrix),
  ldmatrix: whole(loadMatrix),
  stmatrix: whole(storeMatrix),
  wgmma,
  mbarrier,
  setmaxnreg: setMaxRegisters,
  griddepcontrol: gridDependency,
  nanosleep: () => 'yield',
};

/** Runs a warp-wide instruction for a group of lanes. */
export function runWarpInstruction(m: Machine, i: Instruction, group: Group): Outcome {
  let active = group.mask;
  if (i.guard) {
    active = 0;
    for (let l = 0; l < 32; l++) {
      if ((group.mask >>> l) & 1 && (readRegister(m, i.guard.register, l) !== 0) !== i.guard.negated)
        active |= 1 << l;
    }
    if (active === 0) return 'next';
  }
  const run = instructions[i.opcode];
  if (!run)
    throw new GpuReport('launch', `the virtual GPU does not know "${i.text}" (PTX line ${i.ptxLine})`);
  return run({ m, i, group, active, first: 31 - Math.clz32(active & -active) });
}
