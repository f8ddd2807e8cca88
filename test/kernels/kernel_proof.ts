// The proof of the PTX kernels, one op in one storage type at a time: every sample runs on the virtual GPU under every
// schedule, against the reference in float64 (op_exact.ts). cuda.test.ts shares the jobs out to threads
// (kernel_worker.ts), and judges what it counts: which kernels met which shapes, and which of their blocks ran.
import { divideUp } from '../../engine/cuda/plan.ts';
import { type Choice, forced, type Size } from '../../engine/cuda/plan_gemm.ts';
import { overrides, type ProductKind, tilesOf } from '../../engine/cuda/plan_sm90.ts';
import { cudaDevice, type Device } from '../../engine/device.ts';
import { registry } from '../../engine/op.ts';
import type { FloatDType } from '../../io/dtype.ts';
import type { AnyRecord, AnySample } from '../support/op_cases.ts';
import type { Coverage } from '../virtual-gpu/coverage.ts';
import { openVirtualGpu, type VirtualGpu } from '../virtual-gpu/gpu.ts';
import { schedules } from '../virtual-gpu/run_kernel.ts';
import { type Watched, watched } from '../virtual-gpu/watched.ts';
import { samplesOf } from './kernel_samples.ts';
import { errorsOf, forwardOf, type Results, runKernels } from './op_exact.ts';
import type { FurtherSample } from './product_samples.ts';

export interface Job {
  readonly op: string;
  readonly dtype: FloatDType;
}

export interface Check {
  readonly name: string;
  /** What is wrong; undefined where nothing is. */
  readonly problem?: string;
}

/** Per kernel, the shapes that it met under every schedule. */
export type Meetings = Map<string, Set<string>>;

interface Machine {
  readonly gpu: VirtualGpu;
  readonly device: Device;
  readonly launched: Watched['launched'];
  readonly replace: Watched['replace'];
}

const machines = new Map<string, Machine>();
const meetings: Meetings = new Map();

/** The virtual GPU that a sample wants. */
export function machineOf({ multiprocessors, sharedBytes, hopper }: FurtherSample): Machine {
  const capability = hopper ? ([9, 0] as const) : ([8, 9] as const);
  const key = `${capability} ${multiprocessors} ${sharedBytes}`;
  const known = machines.get(key);
  if (known) return known;
  const gpu = openVirtualGpu({ capability, multiprocessors, sharedBytes, arenaBytes: 2 ** 26 });
  const { api, launched, replace } = watched(gpu);
  const made = { gpu, launched, replace, device: cudaDevice(api) };
  machines.set(key, made);
  return made;
}

/**
 * Of the ways to cut a small product one that many large ones take: large tiles where they are enough for the multiprocessors, and as
 * many splits of k as it takes to have two large ones or four small ones for each.
 */
const manyParts =
  (multiprocessors: number) =>
  ({ m, n, batch }: Size, choices: readonly Choice[]): Choice => {
    const most = ({ tile: { side, name }, splits }: Choice): boolean => {
      const tiles = divideUp(m, side) * divideUp(n, side) * batch;
      return splits === 1 || splits * tiles <= (name === 'large' ? 2 : 4) * multiprocessors;
    };
    const [large, small] = ['large', 'small'].map((name) =>
      choices.findLast((choice) => choice.tile.name === name && most(choice)),
    );
    const tiles = divideUp(m, 128) * divideUp(n, 128) * batch;
    const isEnough = large && tiles * large.splits >= 0.75 * multiprocessors;
    return (isEnough ? large : small) as Choice;
  };

/** Has every product be cut as its sample is for: on Hopper in the sample's tile, where its kind comes in it. */
export function forceTile({
  multiprocessors,
  hopper: { tile, splits = 1, paired } = {},
}: FurtherSample): void {
  overrides.version++;
  forced.choose = manyParts(multiprocessors);
  overrides.get = (size) => {
    const own = tilesOf[size.split(' ')[0] as ProductKind];
    return tile && { tile: own.includes(tile) ? tile : own[0], splits, paired };
  };
}

function errorOf(record: AnyRecord, sample: AnySample, dtype: FloatDType, got: Results): string | undefined {
  const bad = errorsOf(record, sample, dtype, got).filter(({ error, bound }) => !(error <= bound));
  return bad.length ? bad.map((e) => `${e.name}: NMSE ${e.error.toExponential(1)}`).join(', ') : undefined;
}

export const sameBits = (a: Results, b: Results): boolean =>
  Object.entries(a).every(([name, x]) => Buffer.from(x.buffer).equals(Buffer.from(b[name].buffer)));

/** Runs a sample under every schedule: right under the first, the same to the bit under the others, and nothing left behind. */
function check(
  machine: Machine,
  record: AnyRecord,
  { sample, together }: FurtherSample,
  dtype: FloatDType,
): string | undefined {
  const { gpu, device, launched } = machine;
  const before = device.memory.storages;
  let first: Results | undefined;
  for (const schedule of schedules) {
    gpu.setSchedule(schedule);
    const got = runKernels(device, record, sample, dtype, together);
    const problem = first ? undefined : errorOf(record, sample, dtype, got);
    if (problem) return problem;
    first ??= got;
    if (!sameBits(first, got)) return `${schedule.async} copies in ${schedule.order} order give other bits`;
  }
  if (device.memory.storages !== before) return `live tensors ${before} → ${device.memory.storages}`;
  const shape = JSON.stringify([sample.inputs, Object.values(first as Results).map((x) => x.length)]);
  for (const kernel of launched) {
    const shapes = meetings.get(kernel) ?? new Set();
    meetings.set(kernel, shapes.add(shape));
  }
  return undefined;
}

export const provableOps = [...registry.keys()];

export function runJob({ op, dtype }: Job): Check[] {
  const whole = registry.get(op) as AnyRecord;
  return samplesOf(whole, dtype).map((further) => {
    const { sample, hopper, forward } = further;
    const record = forward ? forwardOf(whole) : whole;
    const shapes = `[${Object.values(sample.inputs).join('] [')}]`;
    const name = `${op} ${dtype} ${shapes}${hopper ? ` on Hopper ${hopper.tile ?? ''}${hopper.paired ? ' in pairs' : ''}` : ''}`;
    const machine = machineOf(further);
    machine.launched.clear();
    forceTile(further);
    try {
      return { name, problem: check(machine, record, further, dtype) };
    } catch (error) {
      return { name, problem: String(error) };
    }
  });
}

export interface Summary {
  readonly coverage: Coverage[];
  readonly meetings: Meetings;
}

export const summary = (): Summary => ({
  coverage: [...machines.values()].flatMap(({ gpu }) => gpu.coverage()),
  meetings,
});
