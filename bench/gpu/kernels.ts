// One op of the registry timed on a GPU at a model's shape, forward or backward, and held once against the same op in float32.
import type { Direction } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { isComputed, type Tensors } from '../../engine/op.ts';
import { mse } from '../../engine/ops/loss.ts';
import { cast } from '../../engine/ops/unary.ts';
import { scope } from '../../engine/scope.ts';
import { empty, sizeOf, type Tensor, zeros } from '../../engine/tensor.ts';
import { type FloatDType, isFloat } from '../../io/dtype.ts';
import { flopsOf, type OpCase, shapesOf } from '../ops.ts';
import { type Buffers, openBuffers } from './buffers.ts';
import type { BenchCase, BenchGpu, Key, Measure } from './gpu.ts';
import type { Timer } from './timer.ts';

/** What a bfloat16 kernel may differ from float32 by, as the square root of the NMSE. */
const TOLERANCE = { forward: 1e-2, backward: 2e-2 };

export interface Workshop {
  readonly gpu: BenchGpu;
  readonly timer: Timer;
  readonly buffers: Buffers;
}

export interface KernelCase {
  readonly op: OpCase;
  readonly direction: Direction;
  readonly name: string;
  readonly key: Key;
}

const isWeight = (name: string): boolean => name === 'weight';

/** Weights have the spread that keeps outputs near 1; a norm's are near 1 themselves. */
function deviationOf(name: string, shape: readonly number[]): number {
  if (!isWeight(name) || shape.length === 1) return 1;
  return sizeOf(shape.slice(1)) ** -0.5;
}

/** A set of tensors: inputs, outputs after one forward, and for backward dy and the gradients. */
export function prepare(
  { gpu, buffers }: { gpu: Pick<BenchGpu, 'device'>; buffers: Buffers },
  { op, direction }: Pick<KernelCase, 'op' | 'direction'>,
): Tensors {
  const { record, inputs, attrs } = op;
  const made: Tensors = Object.fromEntries(
    Object.entries(inputs).map(([name, spec]) => [name, buffers.random(spec, deviationOf(name, spec.shape))]),
  );
  for (const [name, spec] of Object.entries(record.outputs(made, attrs))) made[name] = buffers.empty(spec);
  if (direction === 'backward') {
    run(gpu, op, 'forward', made);
    made.dy = buffers.random(made.y);
    for (const [name, spec] of Object.entries(inputs))
      if (isFloat(spec.dtype) && isComputed(record, name)) made[`d${name}`] = buffers.empty(spec);
  }
  return made;
}

const run = (
  { device }: Pick<BenchGpu, 'device'>,
  { record, attrs }: OpCase,
  direction: Direction,
  t: Tensors,
): void => scope(() => device.execute(record, direction, t, attrs));

export const release = (tensors: Tensors): void => {
  for (const t of Object.values(tensors)) t.release();
};

/** The largest relative error of y, or of the gradients, against the same inputs in float32. */
function errorOf({ gpu }: Workshop, { op, direction }: KernelCase, got: Tensors): number {
  const { record, inputs, attrs } = op;
  const { device } = gpu;
  return noGrad(() =>
    scope(() => {
      const single = (t: Tensor) => (isFloat(t.dtype) ? cast(t, 'float32') : t);
      const want: Tensors = Object.fromEntries(Object.keys(inputs).map((name) => [name, single(got[name])]));
      for (const [name, spec] of Object.entries(record.outputs(want, attrs)))
        want[name] = empty(spec.shape, { device, dtype: spec.dtype });
      device.execute(record, 'forward', want, attrs);
      let names = ['y'];
      if (direction === 'backward') {
        want.dy = single(got.dy);
        names = Object.keys(got).filter(
          (name) => name !== 'dy' && name.startsWith('d') && name.slice(1) in inputs,
        );
        for (const name of names) want[name] = empty(got[name].shape, { device });
        device.execute(record, 'backward', want, attrs);
      }
      const errors = names.map((name) => relative(single(got[name]), want[name]));
      return errors.some(Number.isNaN) ? Number.NaN : Math.max(...errors);
    }),
  );
}

/** sqrt(mean (got - want)² / mean want²), computed on the device. */
function relative(got: Tensor, want: Tensor): number {
  const { device, shape } = want;
  const [apart, size] = [got, zeros(shape, { device })].map((other) => mse(other, want).floats()[0]);
  return Math.sqrt(apart / (size || 1));
}

function measure(shop: Workshop, each: KernelCase): Measure {
  const { op, direction, name, key } = each;
  const { timer, gpu } = shop;
  const first = prepare(shop, each);
  const bytes = Object.values(first).reduce((sum, t) => sum + t.byteLength, 0);
  const sets = [first];
  while (sets.length < timer.setsFor(bytes)) sets.push(prepare(shop, each));
  run(gpu, op, direction, first);
  const rel_err = errorOf(shop, each, first);
  const timing = timer.time(sets.length, (set) => run(gpu, op, direction, sets[set]));
  sets.forEach(release);
  gpu.device.memory.trim();
  const flops = flopsOf(op, direction);
  const bound = TOLERANCE[direction];
  const problem = rel_err <= bound ? {} : { problem: `relative error ${rel_err}, at most ${bound}` };
  return { name, key, timing, count: op.count, flops, bytes, rel_err, ...problem };
}

/** Opened when the first case of a process runs. */
export function workshop(open: () => BenchGpu, timerOf: (gpu: BenchGpu) => Timer): () => Workshop {
  let made: Workshop | undefined;
  return () => {
    if (made) return made;
    const gpu = open();
    made = { gpu, timer: timerOf(gpu), buffers: openBuffers(gpu) };
    return made;
  };
}

export const kernelCase = (shop: () => Workshop, each: KernelCase): BenchCase => ({
  label: each.name,
  run: () => measure(shop(), each),
});

/** The same call in another storage type. */
export const inType = (op: OpCase, dtype: FloatDType): OpCase => ({
  ...op,
  inputs: Object.fromEntries(
    Object.entries(op.inputs).map(([name, { shape, dtype: own }]) => [
      name,
      { shape, dtype: isFloat(own) ? dtype : own },
    ]),
  ),
});

export const nameOf = (op: OpCase, direction: Direction): string => {
  const shapes = shapesOf(op).replace(/ (bfloat16|float32|float16)\b/g, '');
  return `${op.record.name}${direction === 'backward' ? ' backward' : ''} ${shapes}`;
};
