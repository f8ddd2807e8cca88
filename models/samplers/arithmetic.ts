// The arithmetic the methods share: linear combinations of latents, and the three readings of a network's output
// (epsilon, v, x_0). Sums are taken in float64 and stored as float32.
import { UserError } from '../../io/errors.ts';
import type { SchedulerConfig } from './config.ts';

export type PredictionType = SchedulerConfig['prediction_type'];

/** A weighted array in a sum. */
export type Term = readonly [weight: number, values: Float32Array];

/** sum of weight * values, element by element; a term of weight 0 is left out, so it may hold infinities. */
export function combine(...terms: Term[]): Float32Array {
  const used = terms.filter(([weight]) => weight !== 0);
  const { length } = terms[0][1];
  if (used.length === 1) return times(used[0], length);
  if (used.length === 2) return sumOfTwo(used[0], used[1], length);
  const total = new Float64Array(length);
  for (const [weight, values] of used) for (let i = 0; i < length; i++) total[i] += weight * values[i];
  return new Float32Array(total);
}

// The same without a float64 array between, four elements to a turn: most steps are made of such sums, and a GPU waits for them.

function times([weight, values]: Term, length: number): Float32Array {
  const product = new Float32Array(length);
  const even = length - (length % 4);
  for (let i = 0; i < even; i += 4) {
    product[i] = 0 + weight * values[i];
    product[i + 1] = 0 + weight * values[i + 1];
    product[i + 2] = 0 + weight * values[i + 2];
    product[i + 3] = 0 + weight * values[i + 3];
  }
  for (let i = even; i < length; i++) product[i] = 0 + weight * values[i];
  return product;
}

function sumOfTwo([v, a]: Term, [w, b]: Term, length: number): Float32Array {
  const sum = new Float32Array(length);
  const even = length - (length % 4);
  for (let i = 0; i < even; i += 4) {
    sum[i] = 0 + v * a[i] + w * b[i];
    sum[i + 1] = 0 + v * a[i + 1] + w * b[i + 1];
    sum[i + 2] = 0 + v * a[i + 2] + w * b[i + 2];
    sum[i + 3] = 0 + v * a[i + 3] + w * b[i + 3];
  }
  for (let i = even; i < length; i++) sum[i] = 0 + v * a[i] + w * b[i];
  return sum;
}

/**
 * combine([v, x], [w, combine([a, x], [b, y])]) in one walk, to the bit: most steps lead x towards the x_0 that it and the output y
 * make.
 */
export function combineWithin(
  [v, w]: readonly [number, number],
  [a, b]: readonly [number, number],
  x: Float32Array,
  y: Float32Array,
): Float32Array {
  if (v === 0 || w === 0 || a === 0 || b === 0) return combine([v, x], [w, combine([a, x], [b, y])]);
  const { fround } = Math;
  const sum = new Float32Array(x.length);
  const even = x.length - (x.length % 4);
  for (let i = 0; i < even; i += 4) {
    sum[i] = 0 + v * x[i] + w * fround(0 + a * x[i] + b * y[i]);
    sum[i + 1] = 0 + v * x[i + 1] + w * fround(0 + a * x[i + 1] + b * y[i + 1]);
    sum[i + 2] = 0 + v * x[i + 2] + w * fround(0 + a * x[i + 2] + b * y[i + 2]);
    sum[i + 3] = 0 + v * x[i + 3] + w * fround(0 + a * x[i + 3] + b * y[i + 3]);
  }
  for (let i = even; i < x.length; i++) sum[i] = 0 + v * x[i] + w * fround(0 + a * x[i] + b * y[i]);
  return sum;
}

/** x_0 clamped to the configured range, where the config asks for it (pixel-space models do; SDXL's does not). */
export function clipSample(config: SchedulerConfig, x0: Float32Array): Float32Array {
  if (!config.clip_sample) return x0;
  const range = config.clip_sample_range;
  return x0.map((value) => Math.min(Math.max(value, -range), range));
}

/** x_0 from the network's output at x = alpha x_0 + sigma epsilon with alpha^2 + sigma^2 = 1. */
export function predictX0(
  type: PredictionType,
  output: Float32Array,
  x: Float32Array,
  alpha: number,
  sigma: number,
): Float32Array {
  if (type === 'sample') return output;
  if (type === 'v_prediction') return combine([alpha, x], [-sigma, output]);
  if (alpha === 0) throw new UserError(noEpsilon);
  return combine([1 / alpha, x], [-sigma / alpha, output]);
}

const noEpsilon =
  'prediction_type "epsilon" cannot start from pure noise (rescale_betas_zero_snr): use "v_prediction", or drop the rescaling';

/** epsilon from the network's output at x = alpha x_0 + sigma epsilon with alpha^2 + sigma^2 = 1. */
export function predictEpsilon(
  type: PredictionType,
  output: Float32Array,
  x: Float32Array,
  alpha: number,
  sigma: number,
): Float32Array {
  if (type === 'epsilon') return output;
  if (type === 'v_prediction') return combine([alpha, output], [sigma, x]);
  return combine([1 / sigma, x], [-alpha / sigma, output]);
}

/** x_0 from the network's output at x = x_0 + sigma epsilon (the network saw x / sqrt(sigma^2 + 1)). */
export function denoised(
  type: PredictionType,
  output: Float32Array,
  x: Float32Array,
  sigma: number,
): Float32Array {
  if (type === 'sample') return output;
  const [ofX, ofOutput] = denoisedWeights(type, sigma);
  return combine([ofX, x], [ofOutput, output]);
}

/** x_0's weights of x and of the network's output. */
function denoisedWeights(type: Exclude<PredictionType, 'sample'>, sigma: number): [number, number] {
  if (type === 'epsilon') return [1, -sigma];
  const variance = sigma * sigma + 1;
  return [1 / variance, -sigma / Math.sqrt(variance)];
}

/** x moved from level `from` to level `to` along the line through x_0. */
export function towards(x: Float32Array, x0: Float32Array, from: number, to: number): Float32Array {
  const ratio = (to - from) / from;
  return combine([1 + ratio, x], [-ratio, x0]);
}

/** The same towards what denoised() makes of the network's output at sigma. */
export function towardsDenoised(
  type: PredictionType,
  output: Float32Array,
  x: Float32Array,
  sigma: number,
  [from, to]: readonly [number, number],
): Float32Array {
  if (type === 'sample') return towards(x, output, from, to);
  const ratio = (to - from) / from;
  return combineWithin([1 + ratio, -ratio], denoisedWeights(type, sigma), x, output);
}
