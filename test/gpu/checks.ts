// What `npm run test:gpu` runs, as sections of cases: micro-kernels against the virtual GPU, every sample of every op in
// each storage type against the reference, whole models against `cpu`, and the golden tests, which hold float32 against
// diffusers' numbers.
import { spawnSync } from 'node:child_process';
import { basename, join } from 'node:path';
import type { Case, Result, Section } from '../../bench/gpu/sections.ts';
import type { CudaDriver } from '../../engine/cuda/device.ts';
import { storageTypes } from '../../engine/cuda/kernels.ts';
import { openDevice } from '../../engine/device.ts';
import { registry } from '../../engine/op.ts';
import { forwardOf, gpuErrors } from '../kernels/op_exact.ts';
import {
  modelErrors,
  pipelineSteps,
  replaysAndGradients,
  trainingStep,
  type Work,
} from '../kernels/whole_models.ts';
import { packageRoot } from '../support/golden.ts';
import type { AnyRecord, AnySample } from '../support/op_cases.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';
import { benchOn } from '../virtual-gpu/run_kernel.ts';
import { type Gpu, openGpu } from './device.ts';
import { type MicroKernel, microKernels } from './micro.ts';
import { orderErrors, orderWorks, type Turns } from './order.ts';

export interface Check extends Result {
  /** The largest error of the case, and the bound that it had. */
  error: number;
  bound: number;
  /** Assertions in it, where they are many. */
  count?: number;
  /** The device lacks what it needs. */
  skipped?: string;
}

/** A case knows its row of the table. */
export interface CheckCase extends Case<Check> {
  readonly type: string;
}
export interface CheckSection extends Section<Check> {
  cases(): readonly CheckCase[];
}

/** What takes minutes on the virtual GPU is left out there, and told as skipped; a real one runs all. */
const LEFT_OUT = 'left out on the virtual GPU, where it takes minutes';

/** Seconds that a kernel may take on a real GPU, where it ends in milliseconds: compiling its file is the rest. */
const KERNEL_LIMIT = 30;

const unless = (leftOut: boolean, each: CheckCase): CheckCase =>
  leftOut ? { ...each, run: () => ({ error: 0, bound: 0, skipped: LEFT_OUT }) } : each;

/** Opened when a case first needs it: the parent reads labels alone and opens none. */
type Open = () => Gpu;

export interface CheckOptions {
  readonly device: string;
  /** Whether launches may overlap (programmatic dependent launch). */
  readonly pdl: boolean;
  /** Seconds for all from the start of this process on, and for one case. */
  readonly limit: number;
  readonly caseLimit: number;
}

export function checkSections({ device, pdl, limit, caseLimit }: CheckOptions): CheckSection[] {
  let opened: Gpu | undefined;
  const gpu: Open = () => {
    opened ??= openGpu(device, pdl);
    return opened;
  };
  const micros = microKernels();
  const groups = [...new Set(micros.map(({ group }) => group))];
  const virtual = device === 'virtual';
  const ofKernels = virtual ? {} : { caseLimit: KERNEL_LIMIT };
  return [
    ...groups.map((group) => ({
      ...ofKernels,
      name: `micro ${group}`,
      cases: () => micros.filter((kernel) => kernel.group === group).map((kernel) => micro(kernel, gpu)),
    })),
    ...[...registry.values()].map((record) => ({
      ...ofKernels,
      name: `op ${record.name}`,
      cases: () => samples(record, gpu),
    })),
    ...Object.entries(wide).map(([op, sample]) => ({
      name: `wide ${op}`,
      cases: () => [unless(virtual, wideCase(registry.get(op) as AnyRecord, sample, gpu))],
    })),
    ...Object.entries(models).map(([name, work]) => ({
      name: `model ${name}`,
      cases: () =>
        storageTypes.map((dtype) => unless(virtual && dtype !== 'bfloat16', model(name, work, dtype, gpu))),
    })),
    {
      name: 'order',
      cases: () =>
        Object.entries(orderWorks).map(([name, work]) => unless(virtual, orderCase(name, work, gpu))),
    },
    ...golden.map((file) => ({
      name: `golden ${basename(file, '.test.js').replace('models_', '')}`,
      cases: () => [
        unless(
          virtual && file !== golden[0],
          goldenFile(file, device, () => Math.min(caseLimit, limit - performance.now() / 1000)),
        ),
      ],
    })),
  ];
}

function micro(kernel: MicroKernel, gpu: Open): CheckCase {
  return {
    label: kernel.name,
    type: '',
    run() {
      const { api, device: opened } = gpu();
      if (kernel.hopper && (opened.driver as CudaDriver).capability !== 90)
        return { error: 0, bound: 0, skipped: 'compute capability 9.0' };
      const simulated = openVirtualGpu({ arenaBytes: 2 ** 24, capability: [9, 0] });
      const got = kernel.run(benchOn(api));
      const { error, problem } = kernel.agree(got, kernel.run(benchOn(simulated)));
      return { error, bound: 0, problem };
    },
  };
}

const short = (x: number) => x.toExponential(1);

/** The worst of several errors, each against its bound. */
function worst(errors: readonly { name: string; error: number; bound: number }[]): Check {
  const bad = errors.filter(({ error, bound }) => !(error <= bound));
  const [most] = [...errors].sort((a, b) => (b.error / b.bound || 0) - (a.error / a.bound || 0));
  const told = bad.map(({ name, error, bound }) => `${name} ${short(error)}, at most ${short(bound)}`);
  return { error: most.error, bound: most.bound, ...(bad.length ? { problem: told.join('; ') } : {}) };
}

const samples = (record: AnyRecord, gpu: Open): CheckCase[] =>
  storageTypes.flatMap((dtype) =>
    record.samples.map((sample, i) => ({
      label: `${dtype} sample ${i} ${JSON.stringify(sample.inputs)}`,
      type: dtype,
      run: () => worst(gpuErrors(gpu().device, record, sample, dtype)),
    })),
  );

/** Large enough for float32's products on Hopper (plan_float32_sm90.ts), which no sample is there; seconds of the reference. */
const wide: Record<string, AnySample> = {
  linear: { inputs: { x: [1024, 512], weight: [512, 512], bias: [512] }, attrs: {} },
  conv2d: {
    inputs: { x: [1, 48, 48, 64], weight: [192, 3, 3, 64], bias: [192], residual: [1, 48, 48, 192] },
    attrs: { stride: 1, padding: [1, 1, 1, 1] },
  },
  attention: {
    inputs: { q: [1, 512, 512], k: [1, 1024, 512], v: [1, 1024, 512] },
    attrs: { heads: 1, causal: false, scale: 512 ** -0.5 },
  },
};

const wideCase = (record: AnyRecord, sample: AnySample, gpu: Open): CheckCase => ({
  label: `float32 ${JSON.stringify(sample.inputs)}`,
  type: 'float32',
  run: () => worst(gpuErrors(gpu().device, forwardOf(record), sample, 'float32')),
});

const orderCase = (name: string, work: Turns, gpu: Open): CheckCase => ({
  label: `${name} to the bit, where launches overlap and where they do not`,
  type: 'bfloat16',
  run: () => worst(orderErrors(gpu(), work)),
});

const models: Record<string, Work> = {
  pipeline: pipelineSteps,
  'training step': trainingStep,
  'replays and gradients': replaysAndGradients,
};

const model = (name: string, work: Work, dtype: (typeof storageTypes)[number], gpu: Open): CheckCase => ({
  label: `${name} in ${dtype}`,
  type: dtype,
  run: () => worst(modelErrors(gpu().device, openDevice('cpu'), work, dtype)),
});

/** Test files that compare with diffusers' numbers. */
export const golden = [
  'engine/golden_ops',
  'models/models_text',
  'models/models_vae',
  'models/models_unet',
  'models/models_lora',
  'models/lora_kinds',
  'models/oft',
  'models/pipeline',
  'models/controlnet',
  'models/ip_adapter',
  'train/training',
].map((path) => `${path}.test.js`);

const MARGIN = 2;

/** A test file of its own, run on the device: its assertions are the cases. It ends before this process is ended. */
const goldenFile = (file: string, device: string, left: () => number): CheckCase => ({
  label: basename(file),
  type: 'float32',
  run() {
    const script = join(packageRoot, 'dist', 'test', file);
    const env = { ...process.env, TAP_TIMEOUT: '600' };
    const timeout = Math.round(Math.max(1, left() - MARGIN) * 1000);
    const child = spawnSync(process.execPath, [script, `--device=${device}`], {
      ...{ env, encoding: 'utf8', timeout, killSignal: 'SIGKILL' },
    });
    const total = /^# \{ total: \d+.*\}$/m.exec(child.stdout)?.[0] ?? '';
    const count = (word: string) => Number(new RegExp(`${word}: (\\d+)`).exec(total)?.[1] ?? 0);
    const failed = [...child.stdout.matchAll(/^\s*not ok \d+ - (.*)$/gm)].map(([, text]) => text);
    const ended = child.signal ?? `status ${child.status}`;
    const good = child.status === 0 && count('pass') > 0;
    const problem = good
      ? undefined
      : `${file} ended with ${ended}: ${failed.join('; ') || child.stderr.slice(-500)}`;
    return { error: count('fail'), bound: 0, count: count('pass') + count('fail'), problem };
  },
});
