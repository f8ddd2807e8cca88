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
  if (type === 'epsilon') return combine([1, x], [-sigma, output]);
  const variance = sigma * sigma + 1;
  return combine([-sigma / Math.sqrt(variance), output], [1 / variance, x]);
}
