// Mutants: a kernel file with one synchronisation taken away or weakened. A test that runs a file's kernels under the
// virtual GPU should fail for each of them; those that still pass are either equivalent (a barrier that nothing needs) or
// show what the tests or the detectors miss.
import { analyse, type Block } from './flow.ts';
import { parsePtx } from './parser.ts';
import type { Instruction } from './ptx.ts';

export interface Mutant {
  readonly kernel: string;
  /** What was done: `without "bar.sync 0" (PTX line 80, gemm.cu:31)`. */
  readonly name: string;
  readonly ptx: string;
  /** The basic block that the change is in, as coverage counts them. */
  readonly block: number;
}

const synchronises = (i: Instruction): boolean => {
  const { opcode, modifiers } = i;
  // Its other half, launch_dependents, only lets the next grid begin sooner: a kernel without it computes the same.
  if (opcode === 'griddepcontrol') return modifiers[0] === 'wait';
  if (['bar', 'barrier', 'membar', 'fence', 'mbarrier'].includes(opcode)) return true;
  if (opcode === 'wgmma') return modifiers[0] !== 'mma_async';
  if (opcode !== 'cp') return false;
  return modifiers.some((word) => /^(commit_group|wait_group|wait_all|mbarrier)$/.test(word));
};

/** Every mutant of a module's kernels, or of those that `wanted` picks. */
export function synchronisationMutants(
  ptx: string,
  wanted: (kernel: string) => boolean = () => true,
): Mutant[] {
  const mutants: Mutant[] = [];
  for (const kernel of parsePtx(ptx).kernels.values()) {
    if (!wanted(kernel.name)) continue;
    const { blocks } = analyse(kernel);
    for (const i of kernel.instructions.filter(synchronises)) {
      const block = basicBlockOf(blocks, i);
      const at = `"${i.text}" (PTX line ${i.ptxLine}${i.source ? `, ${i.source}` : ''})`;
      mutants.push({
        kernel: kernel.name,
        name: `without ${at}`,
        ptx: replaceStatement(ptx, i, substitute(i)),
        block,
      });
      const count = i.operands[0];
      if (i.modifiers.includes('wait_group') && count?.kind === 'integer') {
        const weaker = i.text.replace(/\d+$/, String(count.low + 1));
        mutants.push({
          kernel: kernel.name,
          name: `${weaker} for ${at}`,
          ptx: replaceStatement(ptx, i, `${weaker};`),
          block,
        });
      }
    }
  }
  return mutants;
}

/** Straight-line code is cut into several blocks, of which the first is entered. */
function basicBlockOf(blocks: readonly Block[], i: Instruction): number {
  let at = blocks.findIndex(({ instructions }) => instructions.includes(i));
  while (at > 0 && !blocks[at].entered) at--;
  return blocks[at].id;
}

/** A module of one kernel, for quick parsing where a file has many. */
export function moduleOf(ptx: string, kernel: string): string {
  const [head, ...entries] = ptx.split('\n.visible .entry ');
  const own = entries.find((text) => text.startsWith(`${kernel}(`));
  if (own === undefined) throw new Error(`no kernel ${kernel} in this PTX`);
  const files = own === entries.at(-1) ? [] : [...ptx.matchAll(/^\t\.file.*$/gm)].map(([line]) => line);
  return [head, `.visible .entry ${own}`, ...files].join('\n');
}

/** What stands in an instruction's place: nothing, or a wait that has always succeeded. */
function substitute(i: Instruction): string {
  const [predicate] = i.operands;
  const waits = i.opcode === 'mbarrier' && /^(try|test)_wait/.test(i.modifiers[0]);
  return waits && predicate?.kind === 'register' ? `setp.eq.u32 ${predicate.name}, 0, 0;` : '';
}

function replaceStatement(ptx: string, i: Instruction, by: string): string {
  const lines = ptx.split('\n');
  const line = lines[i.ptxLine - 1];
  const changed = line.replace(/[^;{}]*;/, by);
  if (changed === line) throw new Error(`cannot take ${i.text} out of PTX line ${i.ptxLine}`);
  lines[i.ptxLine - 1] = changed;
  return lines.join('\n');
}

/** The mutants that `run` does not notice: it should throw for a report and for a wrong result alike. */
export function survivors(mutants: readonly Mutant[], run: (mutant: Mutant) => void): Mutant[] {
  return mutants.filter((mutant) => {
    try {
      run(mutant);
      return true;
    } catch {
      return false;
    }
  });
}
