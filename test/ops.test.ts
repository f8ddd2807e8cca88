// Every op of the registry, with no per-op code: gradients of the reference loops against float64 finite differences,
// and the cpu kernels (every instruction set this machine runs) against the reference, in each storage type. Live
// tensors must be back to their count at the end of each case.
import { test } from 'tap';
import { findLibrary } from '../engine/cpu/build.ts';
import { openCpuDriver } from '../engine/cpu/driver.ts';
import { type Device, nativeDevice, openDevice } from '../engine/device.ts';
import { backward, clearGrad, gradOf, requireGrad } from '../engine/grad.ts';
import {
  apply,
  type OpRecord,
  type RefTensors,
  registry,
  type Sample,
  type Spec,
  update,
} from '../engine/op.ts';
import { scope } from '../engine/scope.ts';
import { type Tensor, tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import '../engine/ops/adafactor.ts';
import '../engine/ops/attention.ts';
import '../engine/ops/binary.ts';
import '../engine/ops/conv2d.ts';
import '../engine/ops/linear.ts';
import '../engine/ops/loss.ts';
import '../engine/ops/move.ts';
import '../engine/ops/norm.ts';
import '../engine/ops/optimizer.ts';
import '../engine/ops/reduce.ts';
import '../engine/ops/unary.ts';

// biome-ignore lint/suspicious/noExplicitAny: the registry's records differ in their attributes.
type AnyRecord = OpRecord<any>;
type AnySample = Sample<unknown>;

/** Deterministic values in [-1.5, 1.5] away from zero, so that quotients and kinks stay differentiable. */
function values(count: number, seed: number): Float64Array {
  let state = (seed * 2654435761 + 12345) >>> 0;
  return Float64Array.from({ length: count }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const u = state / 2 ** 32;
    return Math.fround((u < 0.5 ? -1 : 1) * (0.3 + 1.2 * ((u * 2) % 1)));
  });
}

const size = (shape: readonly number[]) => shape.reduce((a, b) => a * b, 1);

function inputValues(sample: AnySample): Record<string, { shape: readonly number[]; data: Float64Array }> {
  return Object.fromEntries(
    Object.entries(sample.inputs).map(([name, shape], i) => {
      const signed = values(size(shape), i + 1);
      const data = sample.nonnegative?.includes(name) ? signed.map(Math.abs) : signed;
      const bound = sample.ints?.[name];
      return [name, { shape, data: bound ? data.map((_, j) => (j * 7 + 3) % bound) : data }];
    }),
  );
}

/** Runs a record's reference loops in float64 and returns all its tensors. */
function referenceForward(record: AnyRecord, sample: AnySample, inputs: RefTensors): RefTensors {
  const specs: Record<string, Spec> = record.outputs(
    Object.fromEntries(
      Object.entries(inputs).map(([name, t]) => [
        name,
        { shape: t.shape, dtype: sample.ints?.[name] ? 'int32' : 'float32', size: t.data.length } as Tensor,
      ]),
    ),
    sample.attrs,
  );
  const outputs = Object.fromEntries(
    Object.entries(specs).map(([name, { shape }]) => [name, { shape, data: new Float64Array(size(shape)) }]),
  );
  const all = { ...inputs, ...outputs };
  record.reference.forward(all, sample.attrs);
  return all;
}

const differentiable = (record: AnyRecord, sample: AnySample) =>
  Object.keys(sample.inputs).filter(
    (name) =>
      !sample.ints?.[name] &&
      !(['target', 'weights'].includes(name) && ['mse', 'huber'].includes(record.name)),
  );

test('every op has twenty samples and more', (t) => {
  for (const { name, samples } of registry.values())
    t.ok(samples.length >= 20, `${name} has ${samples.length} samples`);
  t.end();
});

test('gradients of the reference against float64 finite differences', (t) => {
  for (const record of registry.values()) {
    if (!record.reference.backward) continue;
    record.samples.forEach((sample, index) => {
      const inputs: RefTensors = inputValues(sample);
      const all = referenceForward(record, sample, inputs);
      const dy = values(all.y.data.length, 99);
      const wanted = differentiable(record, sample);
      const gradients = Object.fromEntries(
        wanted.map((name) => [
          `d${name}`,
          { shape: inputs[name].shape, data: new Float64Array(inputs[name].data.length) },
        ]),
      );
      record.reference.backward?.(
        { ...all, ...gradients, dy: { shape: all.y.shape, data: dy } },
        sample.attrs,
      );
      const worst = Math.max(
        ...wanted.map((name) => worstSlope(record, sample, inputs, name, gradients[`d${name}`].data, dy)),
      );
      t.ok(
        worst < 1e-5,
        `${record.name} sample ${index}: worst relative slope error ${worst.toExponential(1)}`,
      );
    });
  }
  t.end();
});

/** Central differences at about a dozen elements of one input, three of a large one, relative to 1 + |slope|. */
function worstSlope(
  record: AnyRecord,
  sample: AnySample,
  inputs: RefTensors,
  name: string,
  gradient: ArrayLike<number>,
  dy: Float64Array,
): number {
  const at = inputs[name].data;
  const loss = () => {
    const y = referenceForward(record, sample, inputs).y.data;
    return dy.reduce((sum, d, i) => sum + d * y[i], 0);
  };
  let worst = 0;
  const probes = at.length > 500 ? 3 : 12;
  for (let i = 0; i < at.length; i += Math.max(1, Math.floor(at.length / probes))) {
    const kept = at[i];
    const h = 1e-5;
    at[i] = kept + h;
    const above = loss();
    at[i] = kept - h;
    const slope = (above - loss()) / (2 * h);
    at[i] = kept;
    worst = Math.max(worst, Math.abs(slope - gradient[i]) / (1 + Math.abs(slope)));
  }
  return worst;
}

interface Outcome {
  y: Float32Array;
  /** By input: its gradient or, where the op updates it in place, its new value. */
  gradients: Record<string, Float32Array>;
}

function runOn(device: Device, record: AnyRecord, sample: AnySample, dtype: FloatDType): Outcome {
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
      update(record, inputs, sample.attrs);
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
function relativeError(got: Float32Array, want: Float32Array): number {
  let [error, norm] = [0, 0];
  for (let i = 0; i < want.length; i++) {
    error += (got[i] - want[i]) ** 2;
    norm += want[i] ** 2;
  }
  return Math.sqrt(error / (norm || 1));
}

/** Storage rounding, and for float32 the order of summation. */
const tolerance: Record<FloatDType, number> = { float32: 2e-6, bfloat16: 8e-3, float16: 1e-3 };

/** A device for each instruction set of the library that this machine can run. */
function nativeDevices(path: string): (readonly [arch: string, device: Device])[] {
  const all = ['avx512', 'avx2', 'portable'];
  return all.slice(all.indexOf(openCpuDriver(path).arch)).map((arch) => [arch, nativeDevice(path, arch)]);
}

const library = findLibrary();
test('cpu kernels against the reference', { skip: 'reason' in library && library.reason }, (t) => {
  const reference = openDevice('reference');
  const natives = 'path' in library ? nativeDevices(library.path) : [];
  for (const record of registry.values()) {
    for (const dtype of ['float32', 'bfloat16', 'float16'] as const) {
      record.samples.forEach((sample, index) => {
        const adjusted = { ...sample, attrs: withDtype(sample.attrs, dtype) };
        const live = (device: Device) => `${device.memory.storages} and ${reference.memory.storages}`;
        const before = natives.map(([, device]) => live(device));
        const want = runOn(reference, record, adjusted, dtype);
        natives.forEach(([arch, device], i) => {
          const label = `${record.name} ${dtype} ${arch} sample ${index}`;
          const got = runOn(device, record, adjusted, dtype);
          const errors = [relativeError(got.y, want.y)];
          for (const name of Object.keys(want.gradients))
            errors.push(relativeError(got.gradients[name], want.gradients[name]));
          const worst = Math.max(...errors);
          t.ok(worst <= tolerance[dtype], `${label}: relative error ${worst.toExponential(1)}`);
          t.ok(live(device) === before[i], `${label}: live tensors ${before[i]} → ${live(device)}`);
        });
      });
    }
  }
  t.end();
});

/** Ops whose attributes name their output type are run at that type. */
function withDtype(attrs: unknown, dtype: FloatDType): unknown {
  const named = attrs as { dtype?: FloatDType; from?: FloatDType };
  return named.dtype ? { ...named, dtype, ...(named.from ? { from: dtype } : {}) } : attrs;
}
