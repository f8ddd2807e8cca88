// Do the tests notice a synchronisation that is missing? Each barrier, fence, commit and wait of a family's kernels is taken
// out in turn (virtual-gpu/mutants.ts), and the mutant runs in its kernel's place. A kernel's samples are the cheapest that
// enter all of its blocks between them, then those with one multiprocessor, where a block takes one job after another.
import { readPtx } from '../engine/cuda/kernels.ts';
import { registry } from '../engine/op.ts';
import type { FloatDType } from '../io/dtype.ts';
import { forceTile, machineOf } from './kernel_proof.ts';
import { type FurtherSample, samplesOf } from './kernel_samples.ts';
import { equivalents } from './mutants_equivalent.ts';
import type { AnyRecord } from './op_cases.ts';
import { errorsOf, runKernels } from './op_exact.ts';
import { type Mutant, moduleOf, synchronisationMutants } from './virtual-gpu/mutants.ts';
import { schedules } from './virtual-gpu/run_kernel.ts';

/** The ops that launch a family's kernels. */
const opsOf: Record<string, readonly string[]> = {
  adafactor: ['adafactor'],
  adamw_8bit: ['adamw_8bit'],
  attention: ['attention'],
  conv2d: ['conv2d'],
  fp8: ['fp8_scale', 'to_fp8', 'linear_fp8'],
  gemm: ['linear', 'matmul'],
  move: ['permute'],
  norm: ['group_norm', 'layer_norm', 'softmax'],
  optimizer: ['sum_squares'],
  reduce: ['mse', 'huber'],
  attention_sm90: ['attention'],
  attention_backward_sm90: ['attention'],
  conv2d_sm90: ['conv2d'],
  fp8_sm90: ['linear_fp8'],
  gemm_sm90: ['linear'],
};

export interface Job {
  readonly family: string;
  readonly dtype: FloatDType;
}

export interface Verdict {
  readonly kernel: string;
  readonly mutant: string;
  readonly alive: boolean;
}

interface Case {
  readonly op: string;
  readonly further: FurtherSample;
  /** Per kernel, the blocks that it enters. */
  readonly entered: ReadonlyMap<string, ReadonlySet<number>>;
  readonly cost: number;
}

function runCase({ op, further }: Pick<Case, 'op' | 'further'>, dtype: FloatDType): void {
  const { device } = machineOf(further);
  forceTile(further);
  const { sample, together } = further;
  const made = runKernels(device, registry.get(op) as AnyRecord, sample, dtype, together);
  for (const { name, error, bound } of errorsOf(registry.get(op) as AnyRecord, sample, dtype, made))
    if (!(error <= bound)) throw new Error(`${name} is wrong`);
}

/** Every sample of a family's ops, with what it enters of each kernel. */
function casesOf({ family, dtype }: Job): Case[] {
  return (opsOf[family] ?? []).flatMap((op) =>
    samplesOf(registry.get(op) as AnyRecord, dtype)
      .filter(({ hopper }) => (hopper !== undefined) === family.endsWith('_sm90'))
      .map((further) => {
        const { gpu } = machineOf(further);
        gpu.setSchedule(schedules[0]);
        gpu.clearCoverage();
        const before = gpu.stats.instructions + 500 * gpu.stats.matrixProducts;
        runCase({ op, further }, dtype);
        const entered = new Map(gpu.coverage().map(({ kernel, entered }) => [kernel, entered]));
        return {
          op,
          further,
          entered,
          cost: gpu.stats.instructions + 500 * gpu.stats.matrixProducts - before,
        };
      }),
  );
}

/** Cheap cases that enter between them every block of a kernel that any case enters, then all that were added for plans. */
function cheapest(kernel: string, cases: readonly Case[]): Case[] {
  const own = cases.filter((c) => c.entered.get(kernel)?.size).sort((a, b) => a.cost - b.cost);
  const left = new Set(own.flatMap((c) => [...(c.entered.get(kernel) ?? [])]));
  const chosen: Case[] = [];
  while (left.size) {
    const worth = (c: Case) => [...(c.entered.get(kernel) ?? [])].filter((b) => left.has(b)).length / c.cost;
    const best = own.reduce((a, b) => (worth(b) > worth(a) ? b : a));
    for (const block of best.entered.get(kernel) ?? []) left.delete(block);
    chosen.push(best);
  }
  return [...chosen, ...own.filter((c) => c.further.multiprocessors === 1 && !chosen.includes(c))];
}

function survives(mutant: Mutant, cases: readonly Case[], dtype: FloatDType): boolean {
  for (const schedule of schedules)
    for (const one of cases) {
      const { gpu, replace } = machineOf(one.further);
      gpu.setSchedule(schedule);
      replace(mutant.kernel, mutant.ptx);
      try {
        runCase(one, dtype);
      } catch {
        return false;
      } finally {
        replace(mutant.kernel);
      }
    }
  return true;
}

export function judge(job: Job): Verdict[] {
  const ptx = readPtx(job.family, job.dtype);
  const mutants = [...ptx.matchAll(/\.entry (\w+)/g)].flatMap(([, kernel]) =>
    synchronisationMutants(moduleOf(ptx, kernel)),
  );
  if (mutants.length === 0) return [];
  const cases = casesOf(job);
  const chosen = new Map<string, Case[]>();
  return mutants.map((mutant) => {
    const { kernel, name } = mutant;
    const own = chosen.get(kernel) ?? cheapest(kernel, cases);
    chosen.set(kernel, own);
    if (own.length === 0) throw new Error(`no sample launches ${kernel}`);
    return { kernel, mutant: name, alive: survives(mutant, own, job.dtype) };
  });
}

export const isEquivalent = ({ kernel, mutant }: Verdict): boolean =>
  equivalents.some((e) => e.kernel.test(kernel) && e.mutant.test(mutant));
