// Which basic blocks of the kernels' PTX have run.
import type { LoadedKernel } from './machine.ts';

export interface Coverage {
  readonly kernel: string;
  readonly blocks: number;
  /** Numbers of those that ran. */
  readonly entered: ReadonlySet<number>;
  /** Where the blocks begin that never ran, by number: the source line, or the instruction where none is known. */
  readonly missed: ReadonlyMap<number, string>;
}

/** Per kernel; one that was loaded several times is counted once. */
export function coverageOf(kernels: readonly LoadedKernel[]): Coverage[] {
  return mergeCoverage(
    kernels.map(({ source, flow, visits }) => {
      const blocks = flow.blocks.filter((b) => b.entered && (b.instructions.length > 0 || b.branch));
      const missed = blocks.filter((b) => visits[b.id] === 0);
      const first = (b: (typeof blocks)[number]) => b.instructions[0] ?? b.branch;
      return {
        kernel: source.name,
        blocks: blocks.length,
        entered: new Set(blocks.filter((b) => visits[b.id] > 0).map((b) => b.id)),
        missed: new Map(missed.map((b) => [b.id, first(b).source ?? first(b).text])),
      };
    }),
  );
}

/** Several runs of the same kernels: a block is missed that all of them miss. */
export function mergeCoverage(runs: readonly Coverage[]): Coverage[] {
  const merged = new Map<string, Coverage>();
  for (const run of runs) {
    const key = `${run.kernel} ${run.blocks}`;
    const known = merged.get(key);
    const missed = new Map([...run.missed].filter(([id]) => !known || known.missed.has(id)));
    const entered = new Set([...run.entered, ...(known?.entered ?? [])]);
    merged.set(key, { ...run, entered, missed });
  }
  return [...merged.values()];
}
