// Latents on the host: [n, c, h, w] float32 as torch draws and stores them, so that a seed means the same numbers. The
// layout changes only on the way into and out of a model, on the device.
import { type Seamless, withoutSeams } from '../../engine/circular.ts';
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { namedParameters, placeOf } from '../../engine/module.ts';
import { permute } from '../../engine/ops/move.ts';
import { isWhollyFinite } from '../../engine/ops/optimizer.ts';
import { toPixels } from '../../engine/ops/pixels.ts';
import { cast } from '../../engine/ops/unary.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { sizeOf, type Tensor, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import type { Picture } from '../../io/pixels.ts';
import { type Autoencoder, checkDecode } from './autoencoder.ts';
import type { VaeConfig } from './vae.ts';

/** Pictures as the VAE's encoder has them, on the host. */
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

/** How a VAE's latents become those that a UNet sees, as its config tells: (z - mean) scaling_factor / std. */
export type LatentScale = Pick<VaeConfig, 'scaling_factor' | 'latents_mean' | 'latents_std'>;

/** Latents of a VAE, scaled. `area` is how many numbers of one channel lie side by side: 1 where channels are last. */
export function scaleLatents(
  { scaling_factor, latents_mean: mean, latents_std: std }: LatentScale,
  z: Float32Array,
  area: number,
): Float32Array {
  if (!mean || !std) return z.map((value) => value * scaling_factor);
  const channel = (i: number) => Math.floor(i / area) % mean.length;
  return z.map((value, i) => ((value - mean[channel(i)]) * scaling_factor) / std[channel(i)]);
}

/** Scaled latents [n, c, h, w] as the VAE's own. */
export function unscaleLatents(
  { scaling_factor, latents_mean: mean, latents_std: std }: LatentScale,
  { shape: [, , h, w], data }: Latents,
): Float32Array {
  if (!mean || !std) return data.map((value) => value / scaling_factor);
  const channel = (i: number) => Math.floor(i / (h * w)) % mean.length;
  return data.map((value, i) => (value * std[channel(i)]) / scaling_factor + mean[channel(i)]);
}

/** How a VAE is run. */
export interface VaeRequest {
  /** In overlapping tiles, for large pictures. */
  vae_tiling?: boolean;
  /** The axes along which pictures go on at their other side, "x", "y" or "xy": those of patterns. */
  seamless?: Seamless;
}

/** @throws UserError for what excludes each other */
export function checkVaeRequest({ vae_tiling, seamless }: VaeRequest): void {
  if (vae_tiling && seamless)
    throw new UserError(
      '--vae-tiling (vae_tiling) codes tiles, which have edges of their own, and --seamless (seamless) wants none: give one of them',
    );
}

/**
 * A picture in [-1, 1] → scaled latents: mean + std * noise, noise drawn by `draw` in the latents' shape. Where there is no
 * posterior nothing is drawn.
 */
export function encodeImage(
  vae: Autoencoder,
  image: Latents,
  draw: (count: number) => Float32Array,
  how: VaeRequest,
): Latents {
  const [mean, logvar] = encoded(vae, image, how);
  const sample = logvar ? samplePosterior(mean.data, logvar.data, draw(mean.data.length)) : mean.data;
  const [, , h, w] = mean.shape;
  return { shape: mean.shape, data: scaleLatents(vae.config, sample, h * w) };
}

/** The mode of what an encoder says of a picture in [-1, 1], not scaled. */
export const encodeMode = (vae: Autoencoder, image: Latents, how: VaeRequest): Latents =>
  encoded(vae, image, how)[0];

/** Mean and log-variance, or where there is no posterior the latents. */
function encoded(vae: Autoencoder, image: Latents, how: VaeRequest): Latents[] {
  checkVaeRequest(how);
  const { vae_tiling: tiling, seamless } = how;
  const encode: Run = (device, dtype) => {
    const x = toDevice(image, device, dtype);
    if (!vae.posterior) return [vae.encode(x, { tiling }).latents];
    const moments = vae.encode(x, { tiling });
    return [moments.mean, moments.logvar];
  };
  return withoutSeams(seamless, () => withoutOverflow(vae, encode, toHost));
}

type Run = (device: Device, dtype: FloatDType) => Tensor[];
/** What brings a tensor to the host, told that it is finite where that is known. */
type Bring<R> = (t: Tensor, finite?: boolean) => R;
/** A way to run an autoencoder. */
type Way = <R>(vae: Autoencoder, run: Run, bring: Bring<R>) => R[];

/** One image at a time, to keep memory low. */
const decodeBy =
  <R>(way: Way, bring: Bring<R>) =>
  (vae: Autoencoder, latents: Latents, how: VaeRequest): R[] => {
    if (!Array.isArray(latents?.shape) || !(latents.data instanceof Float32Array))
      throw new UserError('what is to be decoded is no latents: of what denoiseToEnd gives take .latents');
    checkVaeRequest(how);
    const { vae_tiling: tiling, seamless } = how;
    const [n, c, h, w] = latents.shape;
    const ratio = 2 ** (vae.config.block_out_channels.length - 1);
    checkDecode(vae, { height: h * ratio, width: w * ratio }, tiling);
    return Array.from({ length: n }, (_, i) => {
      const shape = [1, c, h, w];
      const own = latents.data.subarray(i * c * h * w, (i + 1) * c * h * w);
      const data = unscaleLatents(vae.config, { shape, data: own });
      const run: Run = (device, dtype) => {
        const z = toDevice({ shape, data }, device, dtype);
        return [vae.decode(z, { tiling })];
      };
      return withoutSeams(seamless, () => way(vae, run, bring)[0]);
    });
  };

/** Runs an autoencoder in the type of its weights, and leaves it as it was. */
const asItIs: Way = (vae, run, bring) => {
  const { device, dtype } = placeOf(vae.module);
  return noGrad(() => scope(() => run(device, dtype).map((t) => bring(t))));
};

/**
 * Runs a VAE in the type of its weights. One that overflows runs again in float32, so that what was drawn is not lost, and has its type
 * back, which loses nothing: no picture depends on those before it. Every number is looked at: a tile may overflow where others do not.
 */
const withoutOverflow: Way = (vae, run, bring) => {
  const { device, dtype } = placeOf(vae.module);
  const results = noGrad(() =>
    scope(() => {
      const made = run(device, dtype);
      if (dtype === 'float32') return made.map((t) => bring(t));
      return made.every(isWhollyFinite) ? made.map((t) => bring(t, true)) : undefined;
    }),
  );
  if (results) return results;
  try {
    castTo(vae, 'float32');
    return noGrad(() => scope(() => run(device, 'float32').map((t) => bring(t))));
  } finally {
    castTo(vae, dtype);
  }
};

function castTo(vae: Autoencoder, dtype: FloatDType): void {
  for (const parameter of namedParameters(vae.module).values())
    parameter.tensor = noGrad(() => unscoped(() => cast(parameter.tensor, dtype)));
}

/** A decoded picture. */
export interface DecodedPicture extends Picture {
  /** False where NaN or infinite values have left it black, in whole or in part. */
  finite: boolean;
}

/** A decoded tensor [1, h, w, 3] as a picture: the device makes its bytes, a quarter of what it would bring as float32. */
function toPicture(t: Tensor, finite = isWhollyFinite(t)): DecodedPicture {
  const [, height, width] = t.shape;
  return { width, height, channels: 3, data: toPixels(t).bytes(), finite };
}

const decodeEach = decodeBy(withoutOverflow, toHost);

/** Scaled latents → decoded values [n, 3, h, w], about [-1, 1]. */
export const decodeLatents = (vae: Autoencoder, latents: Latents, how: VaeRequest = {}): Latents =>
  stacked(decodeEach(vae, latents, how));

/** Scaled latents → pictures. */
export const decodePictures = decodeBy(withoutOverflow, toPicture);

/** The same for a look at latents on their way: what overflows stays so, as the final picture may not depend on who has looked. */
export const previewPictures = decodeBy(asItIs, toPicture);

/** Batches of one shape as one batch. */
export function stacked(parts: readonly Latents[]): Latents {
  if (parts.length === 1) return parts[0];
  const [n, ...rest] = parts[0].shape;
  return { shape: [parts.length * n, ...rest], data: joined(parts.map(({ data }) => data)) };
}

/** The middle of each plane, [n, c, rows, columns]; of an odd row too many it keeps the one before it. */
export function middleOf(
  { shape: [n, c, h, w], data }: Latents,
  [rows, columns]: readonly [rows: number, columns: number],
): Latents {
  const top = Math.floor((h - rows) / 2);
  const left = Math.floor((w - columns) / 2);
  const out = new Float32Array(n * c * rows * columns);
  for (let plane = 0; plane < n * c; plane++)
    for (let y = 0; y < rows; y++) {
      const from = (plane * h + top + y) * w + left;
      out.set(data.subarray(from, from + columns), (plane * rows + y) * columns);
    }
  return { shape: [n, c, rows, columns], data: out };
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

/** @throws UserError where a program's own numbers do not fit the rest of its request */
export function checkShape(name: string, { shape, data }: Latents, wanted: readonly number[]): void {
  if (`${shape}` === `${wanted}` && data.length === sizeOf(wanted)) return;
  throw new UserError(
    `${name}: ${data.length} numbers of shape [${shape.join(', ')}], where the request takes [${wanted.join(', ')}]`,
  );
}
