// A convolution of a doubled image without the doubled image (engine/doubled.ts), against the loops that define upsampling and
// convolution: as the upsampler of a model, plain and with an adapter on it, and on a virtual Hopper.
import { test } from 'tap';
import { cudaDevice, type Device, openDevice } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import { namedParameters, unload } from '../engine/module.ts';
import { scope } from '../engine/scope.ts';
import { sizeOf, type Tensor, tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import { addAdapters, parametersOf } from '../models/adapters.ts';
import { upsample } from '../models/blocks.ts';
import { newContextCache } from '../models/context_cache.ts';
import { maxDifference } from './golden.ts';
import { relativeError, values } from './op_cases.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';

const reference = openDevice('reference');
/** Normalised squared error: of taps rounded once more, and of y. */
const bounds: Record<FloatDType, number> = { float32: 1e-12, bfloat16: 1e-5, float16: 1e-6 };

/** An upsampler's output: of the doubled image where there is no cache, else without making one. */
function run(
  device: Device,
  dtype: FloatDType,
  shape: readonly number[],
  how: { cached: boolean; adapted: boolean },
) {
  const [, h, w, c] = shape;
  const model = upsample(c);
  const fill = (seed: number, of: readonly number[], by: number): Tensor =>
    tensor(
      values(sizeOf(of), seed).map((v) => v * by),
      of,
      { device, dtype },
    );
  for (const [i, p] of [...namedParameters(model).values()].entries())
    p.tensor = fill(1 + i, p.memoryShape, 1 / Math.sqrt(9 * c));
  if (how.adapted) {
    const uniforms = (name: string, count: number) =>
      Float32Array.from(values(count, name.length)).map(Math.abs);
    const added = parametersOf(addAdapters(model, { rank: 4, alpha: 4, targets: ['conv'] }, uniforms));
    for (const [name, p] of added) if (name.endsWith('lora_B.weight')) p.tensor = fill(7, p.memoryShape, 0.5);
  }
  const cache = how.cached ? newContextCache() : undefined;
  const y = scope(() => {
    const x = fill(3, shape, 1);
    const twice = () => model(x, 2 * h, 2 * w, cache).floats();
    return noGrad(() => [twice(), twice()]);
  });
  cache?.release();
  unload(model);
  return y;
}

const shapes = [
  [1, 1, 1, 8],
  [2, 3, 5, 16],
  [1, 8, 8, 64],
  [1, 16, 7, 33],
];

test('against upsampling and convolution', (t) => {
  const cpu = openDevice('cpu');
  for (const device of [cpu, reference])
    for (const dtype of ['float32', 'bfloat16', 'float16'] as const)
      for (const shape of shapes)
        for (const adapted of [false, true]) {
          const before = device.memory.storages;
          const [want] = run(reference, dtype, shape, { cached: false, adapted });
          const [first, second] = run(device, dtype, shape, { cached: true, adapted });
          const nmse = relativeError(first, want) ** 2;
          const name = `${device.name} ${dtype} [${shape}]${adapted ? ' with an adapter' : ''}`;
          t.ok(nmse <= bounds[dtype], `${name}: ${nmse.toExponential(2)}`);
          t.equal(maxDifference(second, first), 0, `${name}: again, from what was kept`);
          t.equal(device.memory.storages, before, `${name}: live tensors`);
        }
  t.end();
});

test('on Hopper its four convolutions go by TMA', (t) => {
  const gpu = openVirtualGpu({ capability: [9, 0] });
  for (const shape of [
    [2, 9, 11, 64],
    [1, 16, 16, 72],
  ]) {
    const [want] = run(reference, 'bfloat16', shape, { cached: false, adapted: false });
    const [got] = run(cudaDevice(gpu), 'bfloat16', shape, { cached: true, adapted: false });
    const nmse = relativeError(got, want) ** 2;
    t.ok(nmse <= bounds.bfloat16, `[${shape}]: ${nmse.toExponential(2)}`);
  }
  const ran = gpu.coverage().filter(({ entered }) => entered.size > 0);
  const kernels = new Set(ran.map(({ kernel }) => kernel).filter((kernel) => kernel.startsWith('conv2d')));
  t.ok(
    kernels.size > 0 && [...kernels].every((kernel) => kernel.startsWith('conv2d_sm90_forward')),
    [...kernels].join(),
  );
  t.end();
});
