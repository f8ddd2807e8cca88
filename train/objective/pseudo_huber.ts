// The pseudo-Huber loss sqrt(r^2 + c^2) - c (Charbonnier et al. 1994; Song & Dhariwal 2023), near a square within c and linear beyond, and
// kohya's two of it, whose c is each image's own and goes by its timestep (Khrapov et al. 2024). Composed of ops that there are: beside a pass
// through the UNet it costs nothing.
import { noGrad } from '../../engine/grad.ts';
import { add, div, mul } from '../../engine/ops/binary.ts';
import { concat, slice } from '../../engine/ops/move.ts';
import { layerNorm } from '../../engine/ops/norm.ts';
import { sum } from '../../engine/ops/reduce.ts';
import { scale } from '../../engine/ops/unary.ts';
import { scope } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';

export interface HuberSettings {
  /** Squares; torch's Huber loss by `huber_delta`; or 2 c (sqrt(r^2 + c^2) - c), which is kohya's `huber`; or the same without c before it. */
  loss: 'mse' | 'huber' | 'pseudo_huber' | 'smooth_l1';
  huber_delta: number;
  /** What c is (constant), or comes to where there is nothing but noise. */
  huber_c: number;
  /** What c is multiplied by, but under the schedule `snr`. */
  huber_scale: number;
  huber_schedule: 'constant' | 'exponential' | 'snr';
}

/** Whether images have a c. */
export const hasThreshold = ({ loss }: Pick<HuberSettings, 'loss'>): boolean =>
  loss === 'pseudo_huber' || loss === 'smooth_l1';

/** c at a timestep of `count`, where pictures have `abar` of the variance; as kohya's get_huber_threshold_if_needed. */
export function huberThreshold(
  { huber_c, huber_scale, huber_schedule }: HuberSettings,
  t: number,
  count: number,
  abar: number,
): number {
  if (huber_schedule === 'constant') return huber_c * huber_scale;
  if (huber_schedule === 'exponential') return huber_c ** (t / count) * huber_scale;
  const sigma = Math.sqrt((1 - abar) / abar);
  return (1 - huber_c) / (1 + sigma) ** 2 + huber_c;
}

/**
 * sqrt(r^2 + c^2) - c of each number of r [n, ...] float32; c is above 0, one for all or one for each of n. The length of (r, c) is its
 * product with its direction, and the direction is also the gradient, so that needs none. Layer norm finds it: the numbers (r, -r, c, -c)
 * have mean 0 and variance (r^2 + c^2) / 2. With it the loss is r^2 / (length + c), so that c, where it is large, rounds nothing away.
 */
export function pseudoHuber(r: Tensor, c: number | Tensor): Tensor {
  const [n] = r.shape;
  const x = r.reshape(n, -1, 1);
  const [direction, rest] = noGrad(() =>
    scope(() => {
      const constant = typeof c === 'number' ? scale(x, 0, c) : add(scale(x, 0), c.reshape(n, 1, 1));
      const rows = concat([x, scale(x, -1), constant, scale(constant, -1)], 2);
      const first = slice(slice(rows, 0, 0, 1), 1, 0, 1).reshape(4);
      const made = layerNorm(rows, scale(first, 0, Math.SQRT1_2), scale(first, 0), { eps: 0 });
      const [along, across] = [slice(made, 2, 0, 1), slice(made, 2, 2, 1)];
      return [along, scale(div(mul(mul(x, along), across), scale(across, 1, 1)), -1)];
    }),
  );
  return add(mul(x, direction), rest).reshape(...r.shape);
}

/** The mean over images of weight_i times the mean of an image's numbers [n, ...], row by row first: [1]. */
export function weighedMean(each: Tensor, weights?: Tensor): Tensor {
  const [n, h] = each.shape;
  const perImage = scale(sum(sum(each.reshape(n, h, -1), 2), 1), n / each.size);
  return scale(sum(weights ? mul(perImage, weights) : perImage, 0), 1 / n).reshape(1);
}
