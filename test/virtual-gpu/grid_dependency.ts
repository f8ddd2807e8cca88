// Programmatic dependent launch. A grid so launched may begin while the grids before it still run: until a thread has waited for
// those (griddepcontrol.wait) it may not touch global memory, but for asking L2 to hold some of it, and it may not end before, for whoever waits for its grid must
// thereby have waited for all grids before. ld.global.nc is outside of what the wait makes visible. Grids run one after another
// here all the same: one that keeps to this cannot tell the difference. A grid launched otherwise has nothing to wait for.
import type { Group, Machine } from './machine.ts';
import type { Instruction } from './ptx.ts';
import { fail } from './report.ts';
import type { Outcome, WarpCall } from './warp_ops.ts';

/** griddepcontrol.launch_dependents, which promises nothing, and .wait. */
export function gridDependency({ m, i, active }: WarpCall): Outcome {
  if (i.modifiers[0] === 'wait') m.warp.waited |= active;
  return 'next';
}

/** A lane of the running warp reads or writes global memory, or has what may be stale brought to it. */
export function checkWaited(m: Machine, lane: number, at: Instruction | number): void {
  if (m.programmatic && !((m.warp.waited >>> lane) & 1))
    fail(m, 'grid dependency', 'global memory is touched before griddepcontrol.wait', lane, at);
}

/** The same by ld.global.nc. */
export function checkReadOnly(m: Machine, lane: number, at: Instruction | number): void {
  if (m.programmatic) fail(m, 'grid dependency', 'ld.global.nc while grids before may still write', lane, at);
}

/** Lanes of the running warp end. */
export function checkEnd(m: Machine, { mask }: Group, at: Instruction): void {
  const hasty = m.programmatic ? mask & ~m.warp.waited : 0;
  const lane = 31 - Math.clz32(hasty & -hasty);
  if (hasty) fail(m, 'grid dependency', 'a thread ends without griddepcontrol.wait', lane, at);
}
