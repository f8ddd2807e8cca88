// Latents on the host: [n, c, h, w] float32 as torch draws and stores them, so that a seed means the same numbers. The
// layout changes only on the way into and out of a model, on the device.
import type { Device } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import { namedParameters, placeOf } from '../engine/module.ts';
import { permute } from '../engine/ops/move.ts';
import { cast } from '../engine/ops/unary.ts';
import { scope, unscoped } from '../engine/scope.ts';
import { type Tensor, tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import type { Vae } from './vae.ts';

export interface Latents {
  /** [n, c, h, w]. */
  shape: readonly number[];
  data: Float32Array;
}

/** A tensor [n, c, h, w] as [n, h, w, c]. */
export const channelsLast = (x: Tensor): Tensor => permute(x, [0, 2, 3, 1]);
/** A tensor [n, h, w, c] as [n, c, h, w]. */
export const channelsFirst = (x: Tensor): Tensor => permute(x, [0, 3, 1, 2]);

/** [n, c, h, w] numbers → a tensor [n, h, w, c]. */
export const toDevice = ({ shape, data }: Latents, device: Device, dtype: FloatDType): Tensor =>
  scope(() => cast(channelsLast(tensor(data, shape, { device })), dtype));

/** A tensor [n, h, w, c] → [n, c, h, w] numbers. */
export const toHost = (t: Tensor): Latents =>
  noGrad(() =>
    scope(() => {
      const x = cast(channelsFirst(t), 'float32');
      return { shape: x.shape, data: x.floats() };
    }),
  );

/** The encoder's standard deviation: exp(logvar / 2), the log-variance clamped to [-30, 20] first. */
export const posteriorStd = (logvar: Float32Array): Float32Array =>
  logvar.map((v) => Math.exp(0.5 * Math.min(20, Math.max(-30, v))));

/** A draw from what the VAE's encoder gives: mean + std * noise, element by element, not yet scaled. */
export function samplePosterior(mean: Float32Array, logvar: Float32Array, noise: Float32Array): Float32Array {
  const std = posteriorStd(logvar);
  return mean.map((m, i) => m + std[i] * noise[i]);
}

/** A picture in [-1, 1] → scaled latents: mean + std * noise, noise drawn by `draw` in the latents' shape. */
export function encodeImage(
  vae: Vae,
  image: Latents,
  draw: (count: number) => Float32Array,
  tiling: boolean,
): Latents {
  const [mean, logvar] = withoutOverflow(vae, (device, dtype) => {
    const moments = vae.encode(toDevice(image, device, dtype), { tiling });
    return [toHost(moments.mean), toHost(moments.logvar)];
  });
  const sample = samplePosterior(mean.data, logvar.data, draw(mean.data.length));
  return { shape: mean.shape, data: sample.map((z) => z * vae.config.scaling_factor) };
}

/** Scaled latents → pictures [n, 3, h, w], about [-1, 1]. One image at a time, to keep memory low. */
export function decodeLatents(vae: Vae, latents: Latents, tiling: boolean): Latents {
  const [n, c, h, w] = latents.shape;
  const images = Array.from({ length: n }, (_, i) => {
    const data = latents.data
      .slice(i * c * h * w, (i + 1) * c * h * w)
      .map((x) => x / vae.config.scaling_factor);
    const [image] = withoutOverflow(vae, (device, dtype) => [
      toHost(vae.decode(toDevice({ shape: [1, c, h, w], data }, device, dtype), { tiling })),
    ]);
    return image;
  });
  return stacked(images);
}

/**
 * Runs a VAE in the type of its weights. One that overflows goes on in float32, so that what was drawn is not lost. Every number
 * is looked at: a tile may overflow where the others do not.
 */
function withoutOverflow(vae: Vae, run: (device: Device, dtype: FloatDType) => Latents[]): Latents[] {
  const { device, dtype } = placeOf(vae.module);
  const results = noGrad(() => scope(() => run(device, dtype)));
  if (dtype === 'float32' || results.every(({ data }) => allFinite(data))) return results;
  for (const parameter of namedParameters(vae.module).values())
    parameter.tensor = noGrad(() => unscoped(() => cast(parameter.tensor, 'float32')));
  return noGrad(() => scope(() => run(device, 'float32')));
}

/** Whether no number is NaN or infinite: times zero, only those are not zero. A plain loop, as `every` takes ten times as long. */
export function allFinite(numbers: Float32Array): boolean {
  let sum = 0;
  for (let i = 0; i < numbers.length; i++) sum += numbers[i] * 0;
  return sum === 0;
}

/** Batches of one shape as one batch. */
export function stacked(parts: readonly Latents[]): Latents {
  if (parts.length === 1) return parts[0];
  const [n, ...rest] = parts[0].shape;
  return { shape: [parts.length * n, ...rest], data: joined(parts.map(({ data }) => data)) };
}

/** Arrays end to end. */
export function joined(parts: readonly Float32Array[]): Float32Array {
  const out = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}
