// How blocks of one grid synchronise: a fence, then an atomic or volatile write of a flag (release); a strong read of the
// flag, then a fence (acquire). What the releasing block had fenced is then ordered before what the acquiring warp does.
// Blocks run one after another here, so a release is always complete before its acquire looks.
import { agents } from './agents.ts';
import type { Machine, VectorClock } from './machine.ts';

/** By the offset of a flag: how far which blocks have released through it. Emptied at each launch. */
const releases = new WeakMap<Machine, Map<number, Map<number, VectorClock>>>();

export function resetGridOrder(m: Machine): void {
  releases.set(m, new Map());
}

function joinInto(target: Map<number, VectorClock>, source: ReadonlyMap<number, VectorClock>): void {
  for (const [block, clock] of source) {
    const known = target.get(block);
    if (!known) target.set(block, Int32Array.from(clock));
    else joinClock(known, clock);
  }
}

export function joinClock(target: VectorClock, source: VectorClock): void {
  for (let a = 0; a < agents; a++) if (source[a] > target[a]) target[a] = source[a];
}

/** The running warp writes the flag at `ax`; `whole` when the write itself releases. */
export function release(m: Machine, ax: number, whole: boolean): void {
  const { warp, block } = m;
  if (whole) fenceGpu(m);
  const fenced = warp.gpuFenced;
  if (fenced[warp.agent] === 0 && warp.acquired.size === 0) return;
  const flags = releases.get(m)!;
  const known = flags.get(ax) ?? new Map<number, VectorClock>();
  joinInto(known, new Map([[m.race.globals.stamp(), fenced]]));
  joinInto(known, warp.acquired);
  flags.set(ax, known);
  block.progress++;
}

/** The running warp reads the flag at `ax`. */
export function observe(m: Machine, ax: number, whole: boolean): void {
  const released = releases.get(m)!.get(ax);
  if (released) joinInto(whole ? m.warp.acquired : m.warp.observed, released);
}

/** membar.gl, fence.acq_rel.gpu and wider: what the warp has seen is fenced, what it observed is acquired. */
export function fenceGpu(m: Machine): void {
  const { warp, block } = m;
  joinClock(warp.gpuFenced, warp.seen);
  warp.gpuFenced[warp.agent] = block.clocks[warp.agent]++;
  joinInto(warp.acquired, warp.observed);
  warp.observed.clear();
}

/** Barriers hand on what was acquired. */
export function joinAcquired(
  target: Map<number, VectorClock>,
  source: ReadonlyMap<number, VectorClock>,
): void {
  if (source.size) joinInto(target, source);
}
