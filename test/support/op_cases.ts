// What tests that loop over every op share: deterministic inputs for a sample, a run of it with all its gradients on a
// device, and the distance between two results.
import type { Device } from '../../engine/device.ts';
import { backward, clearGrad, gradOf, requireGrad } from '../../engine/grad.ts';
import { type AnyRecord, apply, type Sample, update, updateOf } from '../../engine/op.ts';
import { scope } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import '../../engine/ops/adafactor.ts';
import '../../engine/ops/adamw_8bit.ts';
import '../../engine/ops/attention.ts';
import '../../engine/ops/binary.ts';
import '../../engine/ops/combine.ts';
import '../../engine/ops/conv2d.ts';
import '../../engine/ops/fp8.ts';
import '../../engine/ops/linear.ts';
import '../../engine/ops/loss.ts';
import '../../engine/ops/move.ts';
import '../../engine/ops/norm.ts';
import '../../engine/ops/optimizer.ts';
import '../../engine/ops/pixels.ts';
import '../../engine/ops/q8.ts';
import '../../engine/ops/prodigy.ts';
import '../../engine/ops/random.ts';
import '../../engine/ops/reduce.ts';
import '../../engine/ops/schedule_free.ts';
import '../../engine/ops/timestep_embedding.ts';
import '../../engine/ops/unary.ts';
import '../../engine/ops/weight_norm.ts';

export type { AnyRecord };
export type AnySample = Sample<unknown>;

/** Deterministic values in [-1.5, 1.5] away from zero, so that quotients and kinks stay differentiable. */
export function values(count: number, seed: number): Float64Array {
  const longest = made.get(seed);
  // A shorter list is the beginning of a longer one. What is given may be changed.
  if (longest && longest.length >= count) return longest.slice(0, count);
  const list = new Float64Array(count);
  let state = (seed * 2654435761 + 12345) >>> 0;
  for (let i = 0; i < count; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const u = state / 2 ** 32;
    list[i] = Math.fround((u < 0.5 ? -1 : 1) * (0.3 + 1.2 * ((u * 2) % 1)));
  }
  made.set(seed, list);
  return list.slice();
}

/** By seed: every type and device asks for the same ones again. */
const made = new Map<number, Float64Array>();

/** A sample of which a test changes numbers: what is not finite, for one. */
export type Planted = AnySample & { plant?(name: string, data: Float64Array): void };

export const size = (shape: readonly number[]) => shape.reduce((a, b) => a * b, 1);

export function inputValues(
  sample: AnySample,
): Record<string, { shape: readonly number[]; data: Float64Array }> {
  return Object.fromEntries(
    Object.entries(sample.inputs).map(([name, shape], i) => {
      const signed = values(size(shape), i + 1);
      const data = sample.nonnegative?.includes(name) ? signed.map(Math.abs) : signed;
      const bound = sample.ints?.[name] ?? 0;
      const integer = (j: number) => (bound > 2 ** 16 ? Math.imul(j + 1, 0x9e3779b1) >>> 0 : j * 7 + 3);
      (sample as Planted).plant?.(name, data);
      return [name, { shape, data: bound ? data.map((_, j) => integer(j) % bound) : data }];
    }),
  );
}

export const differentiable = (record: AnyRecord, sample: AnySample) =>
  Object.keys(sample.inputs).filter(
    (name) =>
      !sample.ints?.[name] &&
      !sample.frozen?.includes(name) &&
      !(['target', 'weights'].includes(name) && ['mse', 'huber'].includes(record.name)),
  );

export interface Outcome {
  y: Float32Array;
  /** By input: its gradient or, where the op updates it in place, its new value. */
  gradients: Record<string, Float32Array>;
}

export function runOn(device: Device, record: AnyRecord, sample: AnySample, dtype: FloatDType): Outcome {
  return scope(() => {
    const wanted = record.backward ? differentiable(record, sample) : [];
    const inputs = Object.fromEntries(
      Object.entries(inputValues(sample)).map(([name, { shape, data }]) => {
        const plain = ['t', 'weights'].includes(name);
        const made = tensor(data, shape, {
          device,
          dtype: sample.dtypes?.[name] ?? (sample.ints?.[name] ? 'int32' : plain ? 'float32' : dtype),
        });
        return [name, wanted.includes(name) ? requireGrad(made) : made];
      }),
    );
    if (record.updates) {
      update([updateOf(record, inputs, sample.attrs)]);
      const changed = Object.entries(inputs).filter(([name]) => record.updates?.includes(name));
      return {
        y: new Float32Array(),
        gradients: Object.fromEntries(changed.map(([k, t]) => [k, t.floats()])),
      };
    }
    const y = apply(record, inputs, sample.attrs);
    const gradients: Record<string, Float32Array> = {};
    if (wanted.length) {
      backward(y, tensor(values(y.size, 99), y.shape, { device, dtype: y.dtype }));
      for (const name of wanted) {
        gradients[name] = (gradOf(inputs[name]) as Tensor).floats();
        clearGrad(inputs[name]);
      }
    }
    return { y: y.floats(), gradients };
  });
}

/** Error relative to the largest magnitude, as a root mean square (the square of it is the NMSE). */
export function relativeError(got: Float32Array, want: Float32Array): number {
  let [error, norm] = [0, 0];
  for (let i = 0; i < want.length; i++) {
    error += (got[i] - want[i]) ** 2;
    norm += want[i] ** 2;
  }
  return Math.sqrt(error / (norm || 1));
}

/** Ops whose attributes name their output type are run at that type; casts go from it to each type in turn. */
export function withDtype(attrs: unknown, dtype: FloatDType, index = 0): unknown {
  const named = attrs as { dtype?: FloatDType; from?: FloatDType };
  if (!named.dtype) return attrs;
  if (!named.from) return { ...named, dtype };
  const types = ['float32', 'bfloat16', 'float16'] as const;
  return { ...named, from: dtype, dtype: types[(types.indexOf(dtype) + index) % 3] };
}
