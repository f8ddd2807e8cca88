// Every op of the registry, with no per-op code: gradients of the reference loops against float64 finite differences,
// and the cpu kernels (every instruction set this machine runs) against the reference, in each storage type. Live
// tensors must be back to their count at the end of each case.
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { type Device, openDevice } from '../../engine/device.ts';
import { type RefTensors, registry, type Spec } from '../../engine/op.ts';
import type { Tensor } from '../../engine/tensor.ts';
import type { DType, FloatDType } from '../../io/dtype.ts';
import { packageRoot } from '../../io/package_root.ts';
import { instructionSets, noLibrary, ownDevice, runnable } from '../support/native_library.ts';
import {
  type AnyRecord,
  type AnySample,
  differentiable,
  inputValues,
  relativeError,
  runOn,
  size,
  values,
  withDtype,
} from '../support/op_cases.ts';

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

test('every file of ops is here', (t) => {
  const ops = join(packageRoot, 'engine', 'ops');
  const here = readFileSync(join(packageRoot, 'test', 'support', 'op_cases.ts'), 'utf8');
  for (const file of readdirSync(ops))
    if (readFileSync(join(ops, file), 'utf8').includes('defineOp')) t.ok(here.includes(`/${file}'`), file);
  t.end();
});

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

/** Storage rounding, and for float32 the order of summation. */
const tolerance: Record<FloatDType, number> & Partial<Record<DType, number>> = {
  float32: 2e-6,
  bfloat16: 8e-3,
  float16: 1e-3,
};

test('cpu kernels against the reference', { skip: noLibrary }, (t) => {
  const reference = openDevice('reference');
  const natives = runnable().map((arch) => [arch, ownDevice(arch)] as const);
  for (const arch of instructionSets.slice(0, -natives.length))
    t.pass(arch, { skip: 'this processor has none' });
  for (const record of registry.values()) {
    for (const dtype of ['float32', 'bfloat16', 'float16'] as const) {
      const faults: string[] = [];
      record.samples.forEach((sample, index) => {
        const adjusted = { ...sample, attrs: withDtype(sample.attrs, dtype) };
        const live = (device: Device) => `${device.memory.storages} and ${reference.memory.storages}`;
        const before = natives.map(([, device]) => live(device));
        const want = runOn(reference, record, adjusted, dtype);
        natives.forEach(([arch, device], i) => {
          const label = `${arch} sample ${index}`;
          const got = runOn(device, record, adjusted, dtype);
          const errors = [relativeError(got.y, want.y) / tolerance[dtype]];
          for (const name of Object.keys(want.gradients)) {
            // What an update changes may be stored in another type.
            const stored = (record.updates && sample.dtypes?.[name]) ?? dtype;
            errors.push(
              relativeError(got.gradients[name], want.gradients[name]) /
                (tolerance[stored] ?? tolerance[dtype]),
            );
          }
          const worst = Math.max(...errors);
          if (!(worst <= 1))
            faults.push(`${label}: ${worst.toExponential(1)} of the error that storage explains`);
          if (live(device) !== before[i])
            faults.push(`${label}: live tensors ${before[i]} → ${live(device)}`);
        });
      });
      t.same(faults, [], `${record.name} ${dtype}: ${record.samples.length} samples`);
    }
  }
  t.end();
});
