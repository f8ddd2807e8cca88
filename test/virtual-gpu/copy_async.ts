// cp.async: a lane begins a copy from global to shared memory; it is complete only when the lane has waited for its group.
// `late` lands it at the wait, with the destination poisoned until then; `early` at once; `random` either way.
import { copyAgent, makeKey, never } from './agents.ts';
import { newAgent } from './async_agents.ts';
import { inBlock } from './cluster.ts';
import { windows } from './emit.ts';
import type { LaneCopies, Machine, PendingCopy } from './machine.ts';
import { poison } from './memory.ts';
import { fail } from './report.ts';

export function newCopyAsync(m: Machine) {
  return (
    lane: number,
    to: number,
    high: number,
    from: number,
    bytes: number,
    sourceBytes: number,
    site: number,
  ): void => {
    if (to & (bytes - 1) || from & (bytes - 1)) {
      fail(
        m,
        'misaligned',
        `cp.async of ${bytes} bytes from 0x${from.toString(16)} to shared+0x${to.toString(16)}`,
        lane,
        site,
      );
    }
    if (sourceBytes < 0 || sourceBytes > bytes)
      fail(m, 'launch', `cp.async reads ${sourceBytes} of ${bytes} bytes`, lane, site);
    for (let b = 0; b < sourceBytes; b++) {
      if (high !== windows.global || m.global.shadow8[from + b] !== 3)
        m.fault.G(lane, high, from, sourceBytes, true, site);
    }
    for (let b = 0; b < bytes; b += 4) {
      if ((m.shared.shadow32[(to + b) >>> 2] & 0x01010101) !== 0x01010101)
        m.fault.S(lane, 0, to, bytes, false, site);
    }
    if (sourceBytes > 0) m.race.globalRead(lane, from, sourceBytes, site);
    m.race.sharedWrite(lane, to, bytes, site);
    const copy: PendingCopy = { to, from, bytes, sourceBytes, done: false };
    copiesOf(m, lane).current.push(copy);
    markWriter(m, copy, makeKey(never, copyAgent, lane));
    const { async } = m.schedule;
    if (async === 'early' || (async === 'random' && m.random() < 0.5)) land(m, copy);
    else for (let b = 0; b < bytes; b += 4) m.shared.i32[(to + b) >>> 2] = poison;
  };
}

function copiesOf(m: Machine, lane: number): LaneCopies {
  return (m.warp.copies[lane] ??= { current: [], groups: [] });
}

function land(m: Machine, copy: PendingCopy): void {
  if (copy.done) return;
  copy.done = true;
  const { to, from, bytes, sourceBytes } = copy;
  const { u8, shadow32 } = m.shared;
  const source = m.global.u8;
  // By hand: a copy is so short that the calls of set and fill would take longer than what they do.
  for (let b = 0; b < sourceBytes; b++) u8[to + b] = source[from + b];
  for (let b = sourceBytes; b < bytes; b++) u8[to + b] = 0;
  for (let b = 0; b < bytes; b += 4) shadow32[(to + b) >>> 2] = 0x03030303;
}

function markWriter(m: Machine, { to, bytes }: PendingCopy, key: number): void {
  if (!m.detectRaces) return;
  const grain = m.kernel.sharedGrain;
  const { writer } = m.race.sharedCells;
  for (let c = to >> grain, end = (to + bytes - 1) >> grain; c <= end; c++) writer[c] = key;
}

export function commitGroup(m: Machine, lane: number): void {
  const copies = copiesOf(m, lane);
  copies.groups.push(copies.current);
  copies.current = [];
}

/** Whether a lane has copies that neither it nor an mbarrier has waited for. */
export function isCopying({ warp }: Machine, lane: number): boolean {
  const copies = warp.copies[lane];
  return (
    copies !== undefined &&
    [copies.current, ...copies.groups].some((group) => group.some((c) => !c.signalled))
  );
}

/** Completes all but the lane's last `pending` groups: from now on it is the lane itself that wrote them. */
export function waitGroup(m: Machine, lane: number, pending: number): void {
  const copies = copiesOf(m, lane);
  while (copies.groups.length > pending) {
    for (const copy of copies.groups.shift() ?? []) {
      land(m, copy);
      markWriter(m, copy, makeKey(m.block.clocks[m.warp.agent], m.warp.agent, lane));
    }
  }
}

/**
 * cp.async.mbarrier.arrive: once all copies that the lane has begun have landed, `arrive` runs; whoever waits for the
 * mbarrier has then seen them.
 */
export function landForBarrier(
  m: Machine,
  lane: number,
  barrier: { seen: Int32Array },
  arrive: () => void,
): void {
  const copies = copiesOf(m, lane);
  const begun = [...copies.current, ...copies.groups.flat()].filter((copy) => !copy.signalled);
  const { agent, clock } = newAgent(m.block);
  for (const copy of begun) copy.signalled = true;
  const { block } = m;
  const finish = () =>
    inBlock(m, block, () => {
      for (const copy of begun) {
        land(m, copy);
        markWriter(m, copy, makeKey(clock, agent, 0));
      }
      barrier.seen[agent] = Math.max(barrier.seen[agent], clock);
      arrive();
      block.progress++;
    });
  if (m.schedule.async === 'early') {
    finish();
    return;
  }
  const known = m.block.extra.get('arrivals') as (() => void)[] | undefined;
  const arrivals = known ?? [];
  arrivals.push(finish);
  if (known) return;
  m.block.extra.set('arrivals', arrivals);
  m.block.pendingWork.push({
    complete(pick) {
      const [next] = arrivals.splice(pick(arrivals.length), 1);
      next?.();
      return next !== undefined;
    },
    describe: () =>
      arrivals.length ? `${arrivals.length} arrival(s) of asynchronous copies are pending` : '',
  });
}
