// Do the tests notice a synchronisation that is missing? Each barrier, fence, commit and wait of a family's kernels is taken
// out in turn (virtual-gpu/mutants.ts), and the mutant runs in its kernel's place. It dies by a report of the virtual GPU, or
// by other bits than the kernel's own, which kernel_proof.ts holds against the reference. A kernel's samples are the cheapest
// that enter all of its blocks between them, then those with one multiprocessor, where a block takes one job after another.
import { readPtx } from '../../engine/cuda/kernels.ts';
import { registry } from '../../engine/op.ts';
import type { FloatDType } from '../../io/dtype.ts';
import type { AnyRecord } from '../support/op_cases.ts';
import type { Schedule } from '../virtual-gpu/machine.ts';
import { type Mutant, moduleOf, synchronisationMutants } from '../virtual-gpu/mutants.ts';
import { schedules } from '../virtual-gpu/run_kernel.ts';
import { forceTile, machineOf, sameBits } from './kernel_proof.ts';
import { samplesOf } from './kernel_samples.ts';
import { equivalents } from './mutants_equivalent.ts';
import { forwardOf, type Results, runKernels } from './op_exact.ts';
import type { FurtherSample } from './product_samples.ts';

/** What the proof's schedules let live meets these: the newest copy lands first, and more that chance decides. */
const adverse: readonly Schedule[] = [
  { async: 'newest', order: 'reverse', seed: 1 },
  ...Array.from({ length: 12 }, (_, i): Schedule => ({ async: 'random', order: 'random', seed: i + 1 })),
];

/** The ops that launch a family's kernels. */
const opsOf: Record<string, readonly string[]> = {
  adafactor: ['adafactor'],
  adamw_8bit: ['adamw_8bit'],
  attention: ['attention'],
  conv2d: ['conv2d'],
  fp8: ['fp8_scale', 'to_fp8', 'linear_fp8'],
  gemm: ['linear', 'linear_activated', 'matmul'],
  gemv: ['linear', 'linear_activated'],
  group_norm: ['group_norm'],
  move: ['permute'],
  norm: ['group_norm', 'layer_norm', 'softmax'],
  optimizer: ['sum_squares'],
  prodigy: ['prodigy_moments', 'prodigy_d'],
  reduce: ['sum', 'mse', 'huber'],
  weight_norm: ['row_norms', 'weight_norm'],
  attention_sm90: ['attention'],
  attention_backward_sm90: ['attention'],
  conv2d_sm90: ['conv2d'],
  conv2d_backward_sm90: ['conv2d'],
  fp8_sm90: ['linear_fp8'],
  gemm_sm90: ['linear', 'linear_activated', 'matmul'],
  norm_sm90: ['group_norm'],
  layer_norm_sm90: ['layer_norm'],
};

export interface Job {
  readonly family: string;
  readonly dtype: FloatDType;
  /** A pattern of the kernels that are judged; all without it. */
  readonly kernels?: string;
}

export interface Verdict {
  readonly kernel: string;
  readonly mutant: string;
  readonly alive: boolean;
}

/** A sample, its backward left out or not; what it gives and costs with the right kernels. */
interface Case {
  readonly record: AnyRecord;
  readonly further: FurtherSample;
  readonly results: Results;
  /** Per kernel, the blocks that it enters. */
  readonly entered: ReadonlyMap<string, ReadonlySet<number>>;
  readonly cost: number;
  /** Schedules besides the proof's under which it is known to give the same. */
  readonly proved: Set<Schedule>;
}

function runCase({ record, further }: Pick<Case, 'record' | 'further'>, dtype: FloatDType): Results {
  const { device } = machineOf(further);
  forceTile(further);
  return runKernels(device, record, further.sample, dtype, further.together);
}

/** Every sample of a family's ops, with what it enters of each kernel: forward alone where there is a backward, and whole. */
function casesOf({ family, dtype }: Job): Case[] {
  return (opsOf[family] ?? []).flatMap((op) => {
    const record = registry.get(op) as AnyRecord;
    return samplesOf(record, dtype)
      .filter(({ hopper }) => (hopper !== undefined) === family.endsWith('_sm90'))
      .flatMap((further) => {
        const forward = () => measure({ record: forwardOf(record), further }, dtype);
        if (further.forward) return [forward()];
        const whole = measure({ record, further }, dtype);
        return record.backward ? [forward(), whole] : [whole];
      });
  });
}

function measure(one: Pick<Case, 'record' | 'further'>, dtype: FloatDType): Case {
  const { gpu } = machineOf(one.further);
  const { stats } = gpu;
  const spent = () => stats.instructions + 500 * stats.matrixProducts;
  gpu.setSchedule(schedules[0]);
  gpu.clearCoverage();
  const before = spent();
  const results = runCase(one, dtype);
  const entered = new Map(gpu.coverage().map((c) => [c.kernel, c.entered]));
  return { ...one, results, entered, cost: spent() - before, proved: new Set() };
}

/** Cheap cases that enter between them every block of a kernel that any case enters, then all that were added for plans. */
function casesFor(kernel: string, cases: readonly Case[]): Case[] {
  const blocksOf = (c: Case) => c.entered.get(kernel) ?? new Set<number>();
  const all = cases.filter((c) => blocksOf(c).size).sort((a, b) => a.cost - b.cost);
  // A sample's backward is left out where it enters nothing more.
  const own = all.filter(
    (c, i) =>
      !all
        .slice(0, i)
        .some((other) => other.further === c.further && blocksOf(other).size === blocksOf(c).size),
  );
  const left = new Set(own.flatMap((c) => [...blocksOf(c)]));
  const chosen: Case[] = [];
  while (left.size) {
    const worth = (c: Case) => [...blocksOf(c)].filter((b) => left.has(b)).length / c.cost;
    const best = own.reduce((a, b) => (worth(b) > worth(a) ? b : a));
    for (const block of blocksOf(best)) left.delete(block);
    chosen.push(best);
  }
  const further = own.filter((c) => c.further.multiprocessors === 1 && !chosen.includes(c));
  return [...chosen, ...further].sort((a, b) => a.cost - b.cost);
}

/** The kernels themselves have to be right where their mutants are to fail. */
function prove(one: Case, schedule: Schedule, dtype: FloatDType): void {
  if (one.proved.has(schedule)) return;
  machineOf(one.further).gpu.setSchedule(schedule);
  if (!sameBits(one.results, runCase(one, dtype)))
    throw new Error(`other bits under ${JSON.stringify(schedule)}`);
  one.proved.add(schedule);
}

/** Whether a schedule shows no difference: neither a report nor other bits. */
function passes(mutant: Mutant, one: Case, schedule: Schedule, dtype: FloatDType): boolean {
  const { gpu, replace } = machineOf(one.further);
  gpu.setSchedule(schedule);
  replace(mutant.kernel, mutant.ptx);
  try {
    return sameBits(one.results, runCase(one, dtype));
  } catch {
    return false;
  } finally {
    replace(mutant.kernel);
  }
}

function survives(mutant: Mutant, cases: readonly Case[], dtype: FloatDType): boolean {
  // A case that does not come by the change is none.
  const met = cases.filter(({ entered }) => entered.get(mutant.kernel)?.has(mutant.block));
  const all = (among: readonly Schedule[], run: (one: Case, schedule: Schedule) => boolean) =>
    among.every((schedule) => met.every((one) => run(one, schedule)));
  if (!all(schedules, (one, schedule) => passes(mutant, one, schedule, dtype))) return false;
  if (listed(mutant.kernel, mutant.name) >= 0) return true;
  return all(adverse, (one, schedule) => {
    prove(one, schedule, dtype);
    return passes(mutant, one, schedule, dtype);
  });
}

/** Judges every mutant of a family, and tells of each. */
export function judge(job: Job, tell: (verdict: Verdict) => void = () => {}): Verdict[] {
  const ptx = readPtx(job.family, job.dtype);
  const wanted = new RegExp(job.kernels ?? '');
  const mutants = [...ptx.matchAll(/\.entry (\w+)/g)]
    .filter(([, kernel]) => wanted.test(kernel))
    .flatMap(([, kernel]) => synchronisationMutants(moduleOf(ptx, kernel)));
  if (mutants.length === 0) return [];
  const cases = casesOf(job);
  const chosen = new Map<string, Case[]>();
  return mutants.map((mutant) => {
    const { kernel, name } = mutant;
    const own = chosen.get(kernel) ?? casesFor(kernel, cases);
    if (own.length === 0) throw new Error(`no sample launches ${kernel}`);
    chosen.set(kernel, own);
    const verdict = { kernel, mutant: name, alive: survives(mutant, own, job.dtype) };
    tell(verdict);
    return verdict;
  });
}

const listed = (kernel: string, mutant: string): number =>
  equivalents.findIndex((e) => e.kernel.test(kernel) && e.mutant.test(mutant));

/** Those that live without being listed as equivalent, or beyond the number that is listed. */
export function unexplained(verdicts: readonly Verdict[]): Verdict[] {
  const counts = new Map<string, number>();
  return verdicts.filter(({ kernel, mutant, alive }) => {
    if (!alive) return false;
    const entry = listed(kernel, mutant);
    if (entry < 0) return true;
    const key = `${kernel} ${entry}`;
    counts.set(key, (counts.get(key) ?? 0) + 1);
    return (counts.get(key) as number) > equivalents[entry].most;
  });
}
