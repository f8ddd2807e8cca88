// The slow path of every memory access: generated code comes here when its test of address and shadow fails, and here is
// found out what was wrong. Each function throws a report, or returns where the test was too strict.
import { windows } from './emit.ts';
import type { Machine } from './machine.ts';
import { allocated, initialised, type Memory } from './memory.ts';
import { fail } from './report.ts';

type Fault = (lane: number, high: number, ax: number, bytes: number, load: boolean, site: number) => void;

export interface Faults {
  /** Faults at an address of global, shared and local memory. */
  readonly G: Fault;
  readonly S: Fault;
  readonly L: Fault;
  trap(lane: number, site: number): never;
}

const hex = (x: number) => `0x${(x >>> 0).toString(16)}`;

export function newFaults(m: Machine): Faults {
  const diagnose = (
    space: string,
    memory: Memory,
    ax: number,
    from: number,
    bytes: number,
    load: boolean,
    lane: number,
    site: number,
  ) => {
    const access = `${load ? 'load' : 'store'} of ${bytes} bytes at ${space}+${hex(ax)}`;
    for (let b = from; b < from + bytes; b++) {
      if (!((memory.shadow8[b] ?? 0) & allocated)) {
        const near = space === 'global' ? ` (${m.arena.describe(ax >>> 0)})` : '';
        fail(m, 'out of bounds', access + near, lane, site);
      }
    }
    if (ax & (bytes - 1)) fail(m, 'misaligned', access, lane, site);
    for (let b = from; load && b < from + bytes; b++) {
      if (!(memory.shadow8[b] & initialised)) {
        const near = space === 'global' ? ` (${m.arena.describe(ax >>> 0)})` : '';
        fail(m, 'uninitialised', `${access}, byte ${b - from}${near}`, lane, site);
      }
    }
  };
  return {
    G: (lane, high, ax, bytes, load, site) => {
      if (high !== windows.global) {
        const access = `${load ? 'load' : 'store'} of ${bytes} bytes`;
        fail(
          m,
          'out of bounds',
          `${access}: not a device pointer (${hex(high)}${hex(ax).slice(2).padStart(8, '0')})`,
          lane,
          site,
        );
      }
      diagnose('global', m.global, ax, ax, bytes, load, lane, site);
    },
    S: (lane, _, ax, bytes, load, site) => diagnose('shared', m.shared, ax, ax, bytes, load, lane, site),
    L: (lane, _, ax, bytes, load, site) => {
      const from = ax + m.localBase + lane * m.localStride;
      diagnose('local', m.local, ax, from, bytes, load, lane, site);
    },
    trap: (lane, site) => fail(m, 'trap', 'the kernel trapped or an assertion failed', lane, site),
  };
}
