// Asynchronous operations as agents of the happens-before order: each takes one of a few agent numbers and a clock of its
// own, writes cells of shared memory under that key, and is seen by whoever waits for what it signals.
import { agentOf, clockOf, makeKey, mostWarps } from './agents.ts';
import type { BlockState, Machine, Warp } from './machine.ts';
import type { Instruction } from './ptx.ts';
import { fail, quote, threadName } from './report.ts';

const first = mostWarps;
const count = 29;

/** A number and a clock for a new asynchronous operation. */
export function newAgent(block: BlockState): { agent: number; clock: number } {
  const agent = first + (block.cluster.operations++ % count);
  return { agent, clock: ++block.clocks[agent] };
}

const who = (m: Machine, key: number): string =>
  agentOf(key) < first ? threadName(m, key) : 'another asynchronous copy';

/** Reads as one, with no lane before another: wgmma's of its operands. */
export const allLanes = -1;
/** Whether an access was this very thread's: other lanes of its warp have to be ordered before it by bar.warp.sync. */
const isOwn = (key: number, warp: number, lane: number): boolean =>
  agentOf(key) === warp && (lane === allLanes || (key & 31) === lane);

interface Operation {
  readonly agent: number;
  readonly clock: number;
  readonly warp: Warp;
  readonly lane: number;
  readonly i: Instruction;
}

/** An asynchronous copy is about to overwrite shared memory: all earlier accesses have to be ordered before its issue. */
export function writeAsync(m: Machine, op: Operation, from: number, bytes: number): void {
  if (!m.detectRaces) return;
  const { writer, writeSite, words, readers, readClock, lastRead } = m.race.sharedCells;
  const grain = m.kernel.sharedGrain;
  const { seen, proxyFenced, agent: id } = op.warp;
  const nameOf = (c: number) => `shared+0x${(c << grain).toString(16)}`;
  const mine = makeKey(op.clock, op.agent, 0);
  const end = (from + bytes - 1) >> grain;
  for (let c = from >> grain; c <= end; c++) {
    const key = writer[c];
    if (key !== 0 && !isOwn(key, id, op.lane) && clockOf(key) > seen[agentOf(key)]) {
      const place = quote(m.kernel.source.instructions[writeSite[c]]);
      fail(
        m,
        'race',
        `the copy overwrites ${nameOf(c)}, which ${who(m, key)} wrote at ${place} and which is not ordered before it`,
        op.lane,
        op.i,
      );
    }
    if (key !== 0 && agentOf(key) < first && proxyFenced[agentOf(key)] < clockOf(key)) {
      const by = `${who(m, key)} at ${quote(m.kernel.source.instructions[writeSite[c]])}`;
      const what = `the copy overwrites ${nameOf(c)}, written by ${by}, without fence.proxy.async between`;
      fail(m, 'proxy fence', what, op.lane, op.i);
    }
    for (let w = 0; w < 32 * words; w++) {
      if (!((readers[c * words + (w >> 5)] >>> (w & 31)) & 1)) continue;
      const own = w === id && isOwn(lastRead[c], id, op.lane);
      if (!own && readClock[c * words * 32 + w] > seen[w]) {
        fail(
          m,
          'race',
          `the copy overwrites ${nameOf(c)}, which warp ${w} may still be reading`,
          op.lane,
          op.i,
        );
      }
    }
    writer[c] = mine;
    writeSite[c] = op.i.site;
    readers.fill(0, c * words, (c + 1) * words);
  }
}

/**
 * A read of shared memory through the async proxy, by a lane (TMA stores) or by all of a warp (wgmma's operands): its writer
 * has to be ordered before, and where that was a thread, its write has to be fenced towards that proxy.
 */
export function readAsync(
  m: Machine,
  ax: number,
  bytes: number,
  warp: Warp,
  lane: number,
  i: Instruction,
): void {
  const { shadow32 } = m.shared;
  const teller = Math.max(0, lane);
  for (let k = 0; k < bytes; k += 4) {
    if (shadow32[(ax + k) >>> 2] !== 0x03030303) m.fault.S(teller, 0, ax + k, 4, true, i.site);
  }
  if (!m.detectRaces) return;
  const { writer, words, readers, readClock, lastRead, readSite } = m.race.sharedCells;
  const grain = m.kernel.sharedGrain;
  const { agent: id, seen, proxyFenced } = warp;
  const clock = m.block.clocks[id];
  const mine = makeKey(clock, id, teller);
  const end = (ax + bytes - 1) >> grain;
  for (let c = ax >> grain; c <= end; c++) {
    const key = writer[c];
    if (key !== 0) {
      const agent = agentOf(key);
      if (!isOwn(key, id, lane) && clockOf(key) > seen[agent]) unordered(m, c, false, teller, i);
      if (agent < first && proxyFenced[agent] < clockOf(key)) unordered(m, c, true, teller, i);
    }
    readers[c * words + (id >> 5)] |= 1 << (id & 31);
    readClock[c * words * 32 + id] = clock;
    lastRead[c] = mine;
    readSite[c] = i.site;
  }
}

/** A store's read ends where a lane waits for its group: only who is ordered after that may write there. */
export function endRead(m: Machine, ax: number, bytes: number, lane: number, i: Instruction): void {
  if (!m.detectRaces) return;
  const { words, readers, readClock, lastRead, readSite } = m.race.sharedCells;
  const { agent: id } = m.warp;
  const clock = m.block.clocks[id];
  const end = (ax + bytes - 1) >> m.kernel.sharedGrain;
  for (let c = ax >> m.kernel.sharedGrain; c <= end; c++) {
    readers[c * words + (id >> 5)] |= 1 << (id & 31);
    readClock[c * words * 32 + id] = clock;
    lastRead[c] = makeKey(clock, id, lane);
    readSite[c] = i.site;
  }
}

/** The fault of reading a cell through the async proxy too early, or where only the fence is missing. */
function unordered(m: Machine, cell: number, isOrdered: boolean, lane: number, i: Instruction): never {
  const { writer, writeSite } = m.race.sharedCells;
  const at = `shared+0x${(cell << m.kernel.sharedGrain).toString(16)}`;
  const by = `${who(m, writer[cell])} at ${quote(m.kernel.source.instructions[writeSite[cell]])}`;
  return isOrdered
    ? fail(
        m,
        'proxy fence',
        `the async proxy reads ${at}, written by ${by}, without fence.proxy.async between`,
        lane,
        i,
      )
    : fail(m, 'race', `the async proxy reads ${at}, not ordered after its writer, ${by}`, lane, i);
}
