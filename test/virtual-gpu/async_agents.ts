// Asynchronous operations as agents of the happens-before order: each takes one of a few agent numbers and a clock of its
// own, writes cells of shared memory under that key, and is seen by whoever waits for what it signals.
import type { BlockState, Machine, Warp } from './machine.ts';
import type { Instruction } from './ptx.ts';
import { agentOf, clockOf, makeKey } from './races.ts';
import { fail, quote } from './report.ts';

const first = 32;
const count = 29;

/** A number and a clock for a new asynchronous operation. */
export function newAgent(block: BlockState): { agent: number; clock: number } {
  const made = (block.extra.get('agents') as number | undefined) ?? 0;
  block.extra.set('agents', made + 1);
  const agent = first + (made % count);
  return { agent, clock: ++block.clocks[agent] };
}

const who = (key: number): string =>
  agentOf(key) < first ? `thread ${agentOf(key) * 32 + (key & 31)}` : 'another asynchronous copy';

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
  const { writer, writeSite, readers, readClock } = m.race.sharedCells;
  const grain = m.kernel.sharedGrain;
  const { seen, id } = op.warp;
  for (let c = from >> grain; c <= (from + bytes - 1) >> grain; c++) {
    const at = `shared+0x${(c << grain).toString(16)}`;
    const key = writer[c];
    if (key !== 0 && agentOf(key) !== id && clockOf(key) > seen[agentOf(key)]) {
      const place = quote(m.kernel.source.instructions[writeSite[c]]);
      fail(
        m,
        'race',
        `the copy overwrites ${at}, which ${who(key)} wrote at ${place} and which is not ordered before it`,
        op.lane,
        op.i,
      );
    }
    for (let mask = readers[c]; mask !== 0; ) {
      const w = 31 - Math.clz32(mask);
      mask &= ~(1 << w);
      if (w !== id && readClock[c * 32 + w] > seen[w]) {
        fail(m, 'race', `the copy overwrites ${at}, which warp ${w} may still be reading`, op.lane, op.i);
      }
    }
    writer[c] = makeKey(op.clock, op.agent, 0);
    writeSite[c] = op.i.site;
    readers[c] = 0;
  }
}

/**
 * A read of shared memory through the async proxy (TMA stores, wgmma operands): its writer has to be ordered before, and
 * where that was a thread, its write has to be fenced towards that proxy.
 */
export function readAsync(
  m: Machine,
  ax: number,
  bytes: number,
  warp: Warp,
  lane: number,
  i: Instruction,
): void {
  const x = ax >>> 2;
  for (let k = 0; k < bytes >> 2; k++) {
    if (m.shared.shadow32[x + k] !== 0x03030303) m.fault.S(lane, 0, ax + 4 * k, 4, true, i.site);
  }
  if (!m.detectRaces) return;
  const { writer, writeSite, readers, readClock, lastRead, readSite } = m.race.sharedCells;
  const grain = m.kernel.sharedGrain;
  for (let c = ax >> grain; c <= (ax + bytes - 1) >> grain; c++) {
    const key = writer[c];
    if (key !== 0) {
      const at = `shared+0x${(c << grain).toString(16)}`;
      const by = `${who(key)} at ${quote(m.kernel.source.instructions[writeSite[c]])}`;
      const agent = agentOf(key);
      if (agent !== warp.id && clockOf(key) > warp.seen[agent]) {
        fail(m, 'race', `the async proxy reads ${at}, not ordered after its writer, ${by}`, lane, i);
      }
      if (agent < first && warp.proxyFenced[agent] < clockOf(key)) {
        fail(
          m,
          'proxy fence',
          `the async proxy reads ${at}, written by ${by}, without fence.proxy.async between`,
          lane,
          i,
        );
      }
    }
    readers[c] |= 1 << warp.id;
    readClock[c * 32 + warp.id] = m.block.clocks[warp.id];
    lastRead[c] = makeKey(m.block.clocks[warp.id], warp.id, lane);
    readSite[c] = i.site;
  }
}
