// Instructions that a warpgroup runs as one, wgmma.mma_async and setmaxnreg: all four warps have to run the same ones in the
// same order, with the same matrix descriptors. Warps run here one after another, so what the first of them ran is kept until
// the last has run it too. The registers that setmaxnreg moves are counted, of the pool that the block's launch took.
import type { BlockState, Machine, Warp } from './machine.ts';
import type { Instruction } from './ptx.ts';
import { fail, quote } from './report.ts';
import { isWhole, laneValue, type Outcome, type WarpCall } from './warp_ops.ts';

interface Step {
  readonly i: Instruction;
  readonly operands: string;
  /** Warps that have yet to run it. */
  left: number;
}

interface Warpgroup {
  /** From number `gone` on: what not all warps have run. */
  readonly steps: Step[];
  gone: number;
  /** How many each warp has run. */
  readonly ran: number[];
}

function warpgroupOf({ block, warp }: Machine): Warpgroup {
  const name = `warpgroup ${warp.id >> 2}`;
  const known = block.extra.get(name) as Warpgroup | undefined;
  if (known) return known;
  const group: Warpgroup = { steps: [], gone: 0, ran: [0, 0, 0, 0] };
  block.extra.set(name, group);
  block.pendingWork.push({
    complete: () => false,
    describe: () => (group.steps.length ? `not all of ${name} ran ${quote(group.steps[0].i)}` : ''),
  });
  return group;
}

/** The running warp's next instruction of its warpgroup; `operands` are those that all warps have to give alike. */
export function runAsWarpgroup({ m, i, first }: WarpCall, operands: string): void {
  const { block, warp } = m;
  if ((warp.id | 3) >= block.warps.length) fail(m, 'wgmma', 'the warpgroup is not complete', first, i);
  const group = warpgroupOf(m);
  const step = group.steps[group.ran[warp.id & 3]++ - group.gone];
  if (!step) {
    group.steps.push({ i, operands, left: 3 });
    return;
  }
  if (step.i !== i) fail(m, 'wgmma', `another warp of the warpgroup ran ${quote(step.i)} instead`, first, i);
  if (step.operands !== operands)
    fail(m, 'wgmma', 'the operands differ between the warps of the warpgroup', first, i);
  if (--step.left > 0) return;
  group.steps.shift();
  group.gone++;
}

/** Registers of a thread: as many as the launch bounds leave to each. */
const REGISTERS = 65536;
const atLaunch = ({ kernel }: Machine): number =>
  Math.min(256, Math.floor(REGISTERS / kernel.source.maxThreads / 8) * 8);

interface Pool {
  /** Registers of a lane that are no warp's, and those of the warps that have moved. */
  free: number;
  readonly held: Map<Warp, number>;
}

function poolOf(block: BlockState): Pool {
  const known = (block.extra.get('registers') as Pool | undefined) ?? { free: 0, held: new Map() };
  block.extra.set('registers', known);
  return known;
}

export function setMaxRegisters(call: WarpCall): Outcome {
  const { m, i, first } = call;
  if (!isWhole(call)) return 'park';
  const n = laneValue(call, i.operands[0], first);
  if (n % 8 || n < 24 || n > 256)
    fail(m, 'launch', `setmaxnreg ${n} is no multiple of 8 from 24 to 256`, first, i);
  const pool = poolOf(m.block);
  const held = pool.held.get(m.warp) ?? atLaunch(m);
  if (i.modifiers[0] === 'inc' ? n < held : n > held)
    fail(m, 'launch', `setmaxnreg ${n} where a thread has ${held}`, first, i);
  if (n - held > pool.free) return 'again';
  runAsWarpgroup(call, '');
  pool.free -= n - held;
  pool.held.set(m.warp, n);
  m.block.progress++;
  return 'next';
}
