// The arithmetic the methods share, of latents on the device: the three readings of a network's output (epsilon, v, x_0), and a move
// along the line through x_0.
import { combine } from '../../engine/ops/combine.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import type { SchedulerConfig } from './config.ts';

export type PredictionType = SchedulerConfig['prediction_type'];

/** x_0 clamped to the configured range, where the config asks for it: pixel-space models do. SDXL's does not, so the host may do it. */
export function clipSample(config: SchedulerConfig, x0: Tensor): Tensor {
  if (!config.clip_sample) return x0;
  const range = config.clip_sample_range;
  const clipped = x0.floats().map((value) => Math.min(Math.max(value, -range), range));
  return tensor(clipped, x0.shape, { device: x0.device });
}

/** x_0 from the network's output at x = alpha x_0 + sigma epsilon with alpha^2 + sigma^2 = 1. */
export function predictX0(
  type: PredictionType,
  output: Tensor,
  x: Tensor,
  alpha: number,
  sigma: number,
): Tensor {
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
  output: Tensor,
  x: Tensor,
  alpha: number,
  sigma: number,
): Tensor {
  if (type === 'epsilon') return output;
  if (type === 'v_prediction') return combine([alpha, output], [sigma, x]);
  return combine([1 / sigma, x], [-alpha / sigma, output]);
}

/**
 * x_0 from the network's output at x = x_0 + sigma epsilon. The network saw x / sqrt(sigma^2 + 1), or under EDM x / sqrt(sigma^2 +
 * sigma_data^2), and what "epsilon" names there is the paper's F (Karras et al. 2022, table 1), of which v is the negative.
 */
export function denoised(
  { prediction_type: type, sigma_data }: SchedulerConfig,
  output: Tensor,
  x: Tensor,
  sigma: number,
): Tensor {
  if (type === 'sample') return output;
  const isF = sigma_data !== undefined && type === 'epsilon';
  if (type === 'epsilon' && !isF) return combine([1, x], [-sigma, output]);
  const data = sigma_data ?? 1;
  const variance = sigma * sigma + data * data;
  const weight = (sigma * data) / Math.sqrt(variance);
  return combine([(data * data) / variance, x], [isF ? weight : -weight, output]);
}

/** x moved from level `from` to level `to` along the line through x_0. */
export function towards(x: Tensor, x0: Tensor, from: number, to: number): Tensor {
  const ratio = (to - from) / from;
  return combine([1 + ratio, x], [-ratio, x0]);
}
