// Micro-kernels: one small PTX kernel per instruction that our kernels use, with its inputs. Each runs on the device and on
// the virtual GPU, and the results must agree. What the virtual GPU gets right is tested apart, against exact arithmetic
// (virtual_gpu_integers, _floats and _lanes.test.ts); here it is shown to be what a GPU does.
import type { GpuApi } from '../../engine/cuda/api.ts';
import type { Bench } from '../virtual-gpu/run_kernel.ts';
import type { Agree } from './agreement.ts';
import { arithmeticKernels } from './micro_arithmetic.ts';
import { gridKernels } from './micro_grids.ts';
import { hopperKernels } from './micro_hopper.ts';
import { matrixKernels } from './micro_matrix.ts';
import { memoryKernels } from './micro_memory.ts';

export interface MicroKernel {
  readonly group: string;
  readonly name: string;
  readonly ptx: string;
  /** Runs on compute capability 9.0 alone. */
  readonly hopper?: boolean;
  run(bench: Bench<GpuApi>): Uint8Array;
  readonly agree: Agree;
}

export const microKernels = (): MicroKernel[] => [
  ...arithmeticKernels(),
  ...memoryKernels(),
  ...matrixKernels(),
  ...hopperKernels(),
  ...gridKernels(),
];

/** The instructions of a PTX text, each with all its modifiers. */
export function opcodesOf(ptx: string): Set<string> {
  const found = new Set<string>();
  for (const part of ptx.replace(/\/\/.*$/gm, '').split(/[;\n{}]/)) {
    const [, opcode] =
      /^\s*(?:[\w$]+:)?\s*(?:@!?%\w+\s+)?([a-z]\w*(?:(?:\.|::)\w+)+)(?=\s|$)/.exec(part) ?? [];
    if (opcode) found.add(opcode);
  }
  return found;
}
