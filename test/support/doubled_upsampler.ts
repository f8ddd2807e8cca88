// An upsampler of formulas for weights, by a convolution of the doubled image or without one (engine/doubled.ts), and how far apart
// the two may come.
import { type Device, openDevice } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { namedParameters, unload } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { sizeOf, type Tensor, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { addAdapters, parametersOf } from '../../models/adapters/adapters.ts';
import { upsample } from '../../models/unet/blocks.ts';
import { ContextCache } from '../../models/unet/context_cache.ts';
import { values } from './op_cases.ts';

export const reference = openDevice('reference');
/** Normalised squared error: of taps rounded once more, and of y. */
export const bounds: Record<FloatDType, number> = { float32: 1e-12, bfloat16: 1e-5, float16: 1e-6 };

/** An upsampler's output: of the doubled image where there is no cache, else without making one. */
export function upsampled(
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
  const cache = how.cached ? new ContextCache() : undefined;
  const y = scope(() => {
    const x = fill(3, shape, 1);
    const twice = () => model(x, 2 * h, 2 * w, cache).floats();
    return noGrad(() => [twice(), twice()]);
  });
  cache?.release();
  unload(model);
  return y;
}
