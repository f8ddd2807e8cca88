// How the tests of planted faults run one: what a run ends with, against what it should.
import { test } from 'tap';
import { CudaError } from '../../engine/cuda/errors.ts';
import type { VirtualGpuOptions } from './gpu.ts';
import { synchronisationMutants } from './mutants.ts';
import { GpuReport } from './report.ts';
import { type Bench, newBench } from './run_kernel.ts';

/** What a run ends with: the kind of its report, `refused` by the driver, `wrong`, or `nothing`. */
export function outcome(run: () => undefined | boolean): { kind: string; message: string } {
  try {
    return run() === false ? { kind: 'wrong', message: 'a wrong result' } : { kind: 'nothing', message: '' };
  } catch (error) {
    if (error instanceof GpuReport) return { kind: error.kind, message: error.message };
    if (error instanceof CudaError) return { kind: 'refused', message: error.message };
    throw error;
  }
}

/** Takes the n-th statement that matches out of a kernel of a PTX file. */
export function without(ptx: string, kernel: string, what: RegExp, n = 0): string {
  const found = synchronisationMutants(ptx, (name) => name === kernel).filter((m) => what.test(m.name));
  if (!found[n]) throw new Error(`${kernel} has no ${n}. ${what}`);
  return found[n].ptx;
}

export type Fault = readonly [name: string, expected: RegExp, run: (bench: Bench) => undefined | boolean];

/** A test of kernels with planted faults, and of controls without. */
export function checkFaults(title: string, faults: readonly Fault[], options: VirtualGpuOptions = {}): void {
  test(title, (t) => {
    for (const [name, expected, run] of faults) {
      const { kind, message } = outcome(() => run(newBench(options)));
      t.match(kind, expected, `${name}: ${message || kind}`);
    }
    t.end();
  });
}
