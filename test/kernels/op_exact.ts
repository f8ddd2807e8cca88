// An op's kernels held against its reference loops in float64, over the same numbers: inputs rounded to storage, and for
// backward the outputs that the kernels themselves saved. So what is measured is what the kernels add, not what storage had
// already lost, and the reference rounds nothing.
import type { Device } from '../../engine/device.ts';
import { isComputed, type RefTensors, registry, update, updateOf } from '../../engine/op.ts';
import { fromE4m3 } from '../../engine/ops/fp8.ts';
import { scope } from '../../engine/scope.ts';
import { empty, type Tensor, tensor } from '../../engine/tensor.ts';
import { type DType, decodeFloats, encodeNumbers, type FloatDType, isFloat } from '../../io/dtype.ts';
import {
  type AnyRecord,
  type AnySample,
  differentiable,
  inputValues,
  size,
  values,
  withDtype,
} from '../support/op_cases.ts';

/** The most that a GPU kernel may differ by: NMSE, the error's energy over the result's. */
const gpuTolerance: Record<FloatDType, number> = { float32: 1e-7, bfloat16: 1e-5, float16: 1e-5 };
/** Results of so few numbers do not average: rounding one number to bfloat16 can be off by the square root of 2^-16. */
const FEW = 16;
const toleranceOf = (dtype: FloatDType, count: number): number =>
  dtype === 'bfloat16' && count < FEW ? 2 ** -16 : gpuTolerance[dtype];

/** By name: outputs, gradients as `d<input>`, and inputs that the op changes. */
export type Results = Record<string, Float32Array>;

function typeOf(sample: AnySample, name: string, dtype: FloatDType): DType {
  const plain = ['t', 'weights'].includes(name);
  return sample.dtypes?.[name] ?? (sample.ints?.[name] ? 'int32' : plain ? 'float32' : dtype);
}

/** Inputs whose gradients kernels compute. */
const computed = (record: AnyRecord, sample: AnySample) =>
  differentiable(record, sample).filter((name) => isComputed(record, name));

const slopes = (count: number): Float64Array => values(count, 99);

/** A sample's inputs on a device. */
export function tensorsOf(device: Device, sample: AnySample, dtype: FloatDType): Record<string, Tensor> {
  const made: Record<string, Tensor> = {};
  for (const [name, { shape, data }] of Object.entries(inputValues(sample)))
    made[name] = tensor(data, shape, { device, dtype: typeOf(sample, name, dtype) });
  return made;
}

/** Runs a sample's forward and backward on a device; an update `together` with more of the same, a layer with others of its x. */
export function runKernels(
  device: Device,
  record: AnyRecord,
  sample: AnySample,
  dtype: FloatDType,
  together = 1,
): Results {
  const tensors = () => tensorsOf(device, sample, dtype);
  return scope(() => {
    if (record.updates) {
      const all = Array.from({ length: together }, tensors);
      update(all.map((inputs) => updateOf(record, inputs, sample.attrs)));
      const last = Object.entries(all.at(-1) as Record<string, Tensor>);
      return floatsOf(last.filter(([name]) => record.updates?.includes(name)));
    }
    const inputs = tensors();
    const outputs: Record<string, Tensor> = {};
    for (const [name, spec] of Object.entries(record.outputs(inputs, sample.attrs)))
      outputs[name] = empty(spec.shape, { device, dtype: spec.dtype });
    const all = { ...inputs, ...outputs };
    for (let place = 0; place < together; place++) beside(device, record, sample, all, place, together);
    const gradients: Record<string, Tensor> = {};
    if (record.backward) {
      for (const name of computed(record, sample))
        gradients[`d${name}`] = empty(inputs[name].shape, inputs[name]);
      const saved = Object.fromEntries(
        record.saves.filter((name) => name in all).map((name) => [name, all[name]]),
      );
      const dy = tensor(slopes(outputs.y.size), outputs.y.shape, outputs.y);
      device.execute(record, 'backward', { ...saved, ...gradients, dy }, sample.attrs);
    }
    return floatsOf(Object.entries({ ...outputs, ...gradients }));
  });
}

/** Runs a call as number `place` of `count` calls together, which have its x and other weights. */
function beside(
  device: Device,
  record: AnyRecord,
  sample: AnySample,
  all: Record<string, Tensor>,
  place: number,
  count: number,
): void {
  const before = place > 0 ? all.y.floats() : undefined;
  device.together(() => {
    for (let i = 0; i < count; i++) {
      const { x, weight, y } = all;
      const own = () => tensor(values(weight.size, 50 + i), weight.shape, weight);
      const other = () => ({ x, weight: own(), y: empty(y.shape, y) });
      device.execute(record, 'forward', i === place ? all : other(), sample.attrs);
    }
  });
  const after = before && all.y.floats();
  if (before?.some((was, i) => was !== after?.[i])) throw new Error(`other results in place ${place}`);
}

const floatsOf = (tensors: readonly (readonly [string, Tensor])[]): Results =>
  Object.fromEntries(tensors.map(([name, t]) => [name, t.floats()]));

const rounded = (data: ArrayLike<number>, dtype: DType): Float64Array =>
  isFloat(dtype)
    ? Float64Array.from(decodeFloats(encodeNumbers(data, dtype), dtype))
    : Float64Array.from(data);

/** A sample's inputs as they are in storage. */
function inputsIn(sample: AnySample, dtype: FloatDType): RefTensors {
  const inputs: RefTensors = {};
  for (const [name, { shape, data }] of Object.entries(inputValues(sample))) {
    const type = typeOf(sample, name, dtype);
    inputs[name] = { shape, dtype: type, data: rounded(data, type) };
  }
  return inputs;
}

/** linear_fp8 as GPUs do it that multiply no bytes: both operands are turned back into numbers in storage first. */
function fp8ThroughStorage(sample: AnySample, dtype: FloatDType, count: number): Float64Array {
  const { x, x_scale, weight, weight_scale, ...more } = inputsIn(sample, dtype);
  const back = ({ shape, data }: RefTensors[string], { data: [scale] }: RefTensors[string]) => ({
    shape,
    data: rounded(
      Array.from(data, (code) => Math.fround(fromE4m3(code) * scale)),
      dtype,
    ),
  });
  const m = size(x.shape.slice(0, -1));
  const y = { shape: [m, count / m], data: new Float64Array(count) };
  const operands = { x: back(x, x_scale), weight: back(weight, weight_scale) };
  (registry.get('linear_activated') as AnyRecord).reference.forward(
    { y, ...operands, ...more },
    sample.attrs,
  );
  return y.data;
}

/** The same by the reference in float64; backward reads the outputs that `made` holds, as the kernels read theirs. */
export function runExactly(
  record: AnyRecord,
  sample: AnySample,
  dtype: FloatDType,
  made: Results,
): Record<string, Float64Array> {
  const inputs = inputsIn(sample, dtype);
  if (record.updates) {
    record.reference.forward(inputs, sample.attrs);
    return Object.fromEntries(
      record.updates.filter((name) => name in inputs).map((name) => [name, inputs[name].data]),
    ) as Record<string, Float64Array>;
  }
  const known = Object.fromEntries(
    Object.entries(inputs).map(([name, { shape, data }]) => [
      name,
      { shape, dtype: typeOf(sample, name, dtype), size: data.length } as Tensor,
    ]),
  );
  const outputs: RefTensors = {};
  const specs = record.outputs(known, sample.attrs);
  for (const [name, { shape }] of Object.entries(specs))
    outputs[name] = { shape, data: new Float64Array(size(shape)) };
  record.reference.forward({ ...inputs, ...outputs }, sample.attrs);
  const gradients: RefTensors = {};
  if (record.reference.backward) {
    for (const name of computed(record, sample))
      gradients[`d${name}`] = { shape: inputs[name].shape, data: new Float64Array(inputs[name].data.length) };
    const saved: RefTensors = {};
    for (const name of record.saves)
      if (inputs[name]) saved[name] = inputs[name];
      else if (outputs[name])
        saved[name] = { shape: outputs[name].shape, data: Float64Array.from(made[name]) };
    const { shape, data } = outputs.y;
    const dy = { shape, data: rounded(slopes(data.length), specs.y.dtype) };
    record.reference.backward({ ...saved, ...gradients, dy }, sample.attrs);
  }
  return Object.fromEntries(
    Object.entries({ ...outputs, ...gradients }).map(([name, { data }]) => [name, data]),
  ) as Record<string, Float64Array>;
}

/** The energy of the error over that of `want`. */
function nmse(got: ArrayLike<number>, want: ArrayLike<number>): number {
  let [error, norm] = [0, 0];
  for (let i = 0; i < want.length; i++) {
    error += (got[i] - want[i]) ** 2;
    norm += want[i] ** 2;
  }
  return error / (norm || 1);
}

export interface GpuError {
  /** `y`, a gradient `d<input>`, or an input that the op changes. */
  readonly name: string;
  readonly error: number;
  readonly bound: number;
}

/**
 * The NMSE of all that one sample makes in one type; a cast may end in a coarser type than it began in. linear_fp8 has to
 * agree with one of the two products that a GPU may make of its bytes.
 */
export function errorsOf(record: AnyRecord, sample: AnySample, dtype: FloatDType, made: Results): GpuError[] {
  const to = (sample.attrs as { dtype?: FloatDType }).dtype ?? dtype;
  const want = runExactly(record, sample, dtype, made);
  return Object.entries(want).map(([name, values]) => {
    const wanted = [values];
    if (record.name === 'linear_fp8') wanted.push(fp8ThroughStorage(sample, dtype, values.length));
    return {
      name,
      error: Math.min(...wanted.map((one) => nmse(made[name], one))),
      bound: Math.max(toleranceOf(dtype, values.length), toleranceOf(to, values.length)),
    };
  });
}

/** An op without its gradients. */
export const forwardOf = (record: AnyRecord): AnyRecord => ({
  ...record,
  backward: undefined,
  reference: { forward: record.reference.forward },
});

/** The errors of one sample on a device. Throws where live tensors do not return to their count. */
export function gpuErrors(
  device: Device,
  record: AnyRecord,
  given: AnySample,
  dtype: FloatDType,
): GpuError[] {
  const sample = { ...given, attrs: withDtype(given.attrs, dtype) };
  const before = device.memory.storages;
  const errors = errorsOf(record, sample, dtype, runKernels(device, record, sample, dtype));
  if (device.memory.storages !== before)
    throw new Error(`live tensors ${before} → ${device.memory.storages}`);
  return errors;
}
