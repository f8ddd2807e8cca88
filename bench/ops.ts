// The registry's ops one by one, at the shapes that a preset's models give them: each model is walked once on a device
// that only notes what it is asked, and every distinct call is then timed alone on random numbers.
import type { Device } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import { apply, type OpRecord, registry } from '../engine/op.ts';
import { profiled, standInDevice } from '../engine/profile.ts';
import { scope } from '../engine/scope.ts';
import { sizeOf, type Tensor, tensor } from '../engine/tensor.ts';
import type { DType, FloatDType } from '../io/dtype.ts';
import { uniforms } from './random_weights.ts';
import { buildSubject, presets, type Sizes, subjectNames } from './subjects.ts';
import { median, stopwatch } from './timing.ts';

interface Spec {
  shape: readonly number[];
  dtype: DType;
}

/** A distinct call: an op, its inputs' shapes and types, its attributes. */
export interface OpCase {
  // biome-ignore lint/suspicious/noExplicitAny: as in the registry, attributes differ from record to record.
  record: OpRecord<any>;
  inputs: Record<string, Spec>;
  attrs: unknown;
  /** Calls in one pass of each model: UNet, VAE decoder, text encoders. */
  count: number;
  flops: number;
  /** Inputs read once and outputs written once. */
  bytes: number;
}

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
export function opCases(preset: string, sizes: Sizes, dtype: FloatDType): OpCase[] {
  const found = new Map<string, OpCase>();
  const device = profiled(standInDevice(), ({ record, tensors, attrs }) => {
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
  for (const name of subjectNames) {
    const subject = buildSubject(name, presets[preset], sizes, device, name === 'vae' ? 'float32' : dtype);
    subject.run();
    subject.release();
  }
  const order = [...registry.keys()];
  return [...found.values()].sort((a, b) => order.indexOf(a.record.name) - order.indexOf(b.record.name));
}

/** Times one case: a warm-up, then runs for about `budget` seconds, three at least. */
export function timeCase(
  { record, inputs, attrs, count, flops, bytes }: OpCase,
  device: Device,
  budget = 0.5,
): OpTiming {
  const seconds = noGrad(() =>
    scope(() => {
      const made = Object.fromEntries(
        Object.entries(inputs).map(([name, spec]) => [name, randomInput(spec, device)]),
      );
      const once = () => stopwatch(() => void scope(() => void apply(record, made, attrs)));
      const runs = Math.min(100, Math.max(3, Math.round(budget / once())));
      return median(Array.from({ length: runs }, once));
    }),
  );
  const shapes = Object.entries(inputs)
    .map(([name, { shape, dtype }]) => `${name} ${dtype} [${shape.join(', ')}]`)
    .join('  ');
  return {
    op: record.name,
    shapes,
    count,
    seconds,
    gflops_per_second: flops / seconds / 1e9,
    gb_per_second: bytes / seconds / 1e9,
  };
}

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
