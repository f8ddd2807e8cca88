// The loss a VAE is trained with: how far the decoded picture is from the true one, as mean absolute and mean squared error,
// and the Kullback-Leibler divergence of the posterior from a standard normal (Kingma & Welling 2013), a mean over the
// latents' elements. Rombach et al. 2022 add perceptual and adversarial terms, which need networks of their own.
import { add } from '../../engine/ops/binary.ts';
import { huber, mse } from '../../engine/ops/loss.ts';
import { sum } from '../../engine/ops/reduce.ts';
import { cast, exp, scale, square } from '../../engine/ops/unary.ts';
import type { Tensor } from '../../engine/tensor.ts';
import type { Moments } from '../../models/vae/vae.ts';

export interface VaeObjective {
  /** Weights of the three terms; 0 leaves one away. */
  l1: number;
  mse: number;
  kl: number;
}

/** Half the width within which |x| is rounded off: a quarter of an 8-bit level. */
const delta = 1 / 512;

/** The loss [1], float32, on the tape. `decoded` and `pictures` are [n, h, w, 3]. */
export function vaeLoss(weights: VaeObjective, decoded: Tensor, pictures: Tensor, moments: Moments): Tensor {
  const [y, x] = [cast(decoded, 'float32'), cast(pictures, 'float32')];
  const terms: Tensor[] = [];
  if (weights.l1 > 0) terms.push(scale(huber(y, x, undefined, delta), weights.l1 / delta));
  if (weights.mse > 0) terms.push(scale(mse(y, x), weights.mse));
  if (weights.kl > 0) terms.push(scale(divergence(moments), weights.kl));
  return terms.reduce(add);
}

/** The mean over elements of (mean^2 + var - 1 - log var) / 2. */
function divergence(moments: Moments): Tensor {
  const [mean, logvar] = [cast(moments.mean, 'float32'), cast(moments.logvar, 'float32')];
  const each = add(add(square(mean), exp(logvar)), scale(logvar, -1, -1));
  return scale(sum(each.reshape(1, each.size), 1), 0.5 / each.size);
}
