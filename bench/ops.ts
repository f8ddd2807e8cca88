// The registry's ops one by one, at the shapes that a preset's models give them: each model is walked once on a device
// that only notes what it is asked, and every distinct call is then timed alone on random numbers.
import type { Device, Direction } from '../engine/device.ts';
import { type AnyRecord, isComputed, registry, type Spec, type Tensors } from '../engine/op.ts';
import { profiled, standInDevice } from '../engine/profile.ts';
import { scope, unscoped } from '../engine/scope.ts';
import { empty, sizeOf, type Tensor, tensor } from '../engine/tensor.ts';
import { type FloatDType, isFloat } from '../io/dtype.ts';
import { presets } from '../models/formats/presets.ts';
import { uniforms } from './pool_weights.ts';
import { buildSubject, type Sizes, type SubjectName, subjectNames } from './subjects.ts';
import { median, stopwatch } from './timing.ts';

/** A distinct call: an op, its inputs' shapes and types, its attributes. */
export interface OpCase {
  record: AnyRecord;
  inputs: Record<string, Spec>;
  attrs: unknown;
  /** Calls in one pass of each model: UNet, VAE decoder, text encoders. */
  count: number;
  flops: number;
  /** Inputs read once and outputs written once. */
  bytes: number;
}

/** Operations of a call: a backward costs a forward for each operand's gradient, and attention's scores are made again. */
export const flopsOf = ({ record, flops }: OpCase, direction: Direction): number =>
  flops * (direction === 'forward' ? 1 : record.name === 'attention' ? 2.5 : 2);

export interface OpTiming {
  op: string;
  shapes: string;
  count: number;
  /** Median of one call. */
  seconds: number;
  gflops_per_second: number;
  gb_per_second: number;
}

/** Every distinct op call of a preset's models at this size, in the order of the registry. */
export const opCases = (
  preset: string,
  sizes: Sizes,
  dtype: FloatDType,
  subjects: readonly SubjectName[] = subjectNames,
): OpCase[] =>
  casesOf((device) => {
    for (const name of subjects) {
      const subject = buildSubject(name, presets[preset], sizes, device, name === 'vae' ? 'float32' : dtype);
      subject.run();
      subject.release();
    }
  });

/** Every distinct op call of `run`, which is given a device that computes nothing. */
export function casesOf(run: (device: Device) => void): OpCase[] {
  const found = new Map<string, OpCase>();
  const device = profiled(standInDevice(), ({ record, direction, tensors, attrs }) => {
    if (direction === 'backward') return;
    const outputs = Object.keys(record.outputs(tensors, attrs));
    const specs = (names: string[]) =>
      Object.fromEntries(
        names.map((name) => [name, { shape: tensors[name].shape, dtype: tensors[name].dtype }]),
      );
    const inputs = specs(Object.keys(tensors).filter((name) => !outputs.includes(name)));
    const key = JSON.stringify([record.name, inputs, attrs]);
    const known = found.get(key);
    if (known) known.count++;
    else {
      const bytes = Object.values(tensors).reduce((sum, t) => sum + t.byteLength, 0);
      found.set(key, { record, inputs, attrs, count: 1, flops: record.flops?.(tensors, attrs) ?? 0, bytes });
    }
  });
  run(device);
  const order = [...registry.keys()];
  return [...found.values()].sort((a, b) => order.indexOf(a.record.name) - order.indexOf(b.record.name));
}

export interface Prepared {
  /** Seconds of one call. */
  once(): number;
  release(): void;
}

/** Makes a case's tensors on `device`. Backward fills the gradient of every float input. */
export function prepareCase(
  { record, inputs, attrs }: OpCase,
  direction: Direction,
  device: Device,
): Prepared {
  const made: Tensors = unscoped(() =>
    Object.fromEntries(Object.entries(inputs).map(([name, spec]) => [name, randomInput(spec, device)])),
  );
  for (const [name, { shape, dtype }] of Object.entries(record.outputs(made, attrs)))
    made[name] = unscoped(() => empty(shape, { device, dtype }));
  const run = (which: Direction) => scope(() => device.execute(record, which, made, attrs));
  run('forward');
  if (direction === 'backward') {
    made.dy = unscoped(() => randomInput(made.y, device));
    for (const [name, { shape, dtype }] of Object.entries(inputs))
      if (isFloat(dtype) && isComputed(record, name))
        made[`d${name}`] = unscoped(() => empty(shape, { device, dtype }));
  }
  return {
    once: () => stopwatch(() => run(direction), device),
    release() {
      for (const t of Object.values(made)) t.release();
    },
  };
}

/** How many calls fill `budget` seconds when one takes `seconds`: 3 at least, 100 at most. */
export const runsWithin = (budget: number, seconds: number): number =>
  Math.min(100, Math.max(3, Math.round(budget / seconds)));

/** Times one case's forward: a warm-up, then runs for about half a second. */
export function timeCase(each: OpCase, device: Device): OpTiming {
  const { once, release } = prepareCase(each, 'forward', device);
  const seconds = median(Array.from({ length: runsWithin(0.5, once()) }, once));
  release();
  return {
    op: each.record.name,
    shapes: shapesOf(each),
    count: each.count,
    seconds,
    gflops_per_second: each.flops / seconds / 1e9,
    gb_per_second: each.bytes / seconds / 1e9,
  };
}

/** "x float32 [1, 77, 48]  weight ...". */
export const shapesOf = ({ inputs }: OpCase): string =>
  Object.entries(inputs)
    .map(([name, { shape, dtype }]) => `${name} ${dtype} [${shape.join(', ')}]`)
    .join('  ');

/** Uniform numbers; integers are row numbers and stay zero. */
function randomInput({ shape, dtype }: Spec, device: Device): Tensor {
  const size = sizeOf(shape);
  const values = dtype === 'int32' ? new Int32Array(size) : uniforms(Math.min(size, 1 << 20), size);
  if (values.length === size) return tensor(values, shape, { device, dtype });
  const all = new Float32Array(size);
  for (let at = 0; at < size; at += values.length) all.set(values.subarray(0, size - at), at);
  return tensor(all, shape, { device, dtype });
}

/** Ops of the registry that the cases do not hold: those of training alone. */
export const absentOps = (cases: readonly OpCase[]): string[] =>
  [...registry.keys()].filter((name) => !cases.some(({ record }) => record.name === name));
