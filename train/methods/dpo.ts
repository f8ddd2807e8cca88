// Diffusion-DPO (Wallace et al. 2023), as diffusers' train_diffusion_dpo_sdxl.py: of a pair of pictures under one caption, one preferred
// (w), one rejected (l), at the same timestep and under the same noise, the network is to lower its error on w, against that of the model
// as it was loaded, more than on l: -log sigmoid(-beta/2 ((m_w - m_l) - (r_w - r_l))), m and r the mean squared errors of both networks.
// A pass's first half is the preferred pictures, its second half the rejected ones in the same order.
import type { Tensors } from '../../engine/op.ts';
import { add, div, mul, sub } from '../../engine/ops/binary.ts';
import { slice } from '../../engine/ops/move.ts';
import { sum } from '../../engine/ops/reduce.ts';
import { cast, exp, relu, scale, square } from '../../engine/ops/unary.ts';
import type { Tensor } from '../../engine/tensor.ts';
import type { Network } from '../objective/objective.ts';
import { type LossContext, type MakeMethod, plainDiffusion } from './method.ts';

export const dpo: MakeMethod = (run, objective) => ({
  ...plainDiffusion(run, objective),
  asks: { teacher: true },
  loss: (context, inputs) => dpoLoss(context, inputs, run.dpo.beta_dpo),
});

function dpoLoss(
  { student, teacher, conditioning }: Pick<LossContext, 'student' | 'teacher' | 'conditioning'>,
  { sample, timesteps, target, weights }: Tensors,
  beta: number,
): Tensor {
  const errors = (network: Network) =>
    square(sub(cast(network(sample, timesteps, conditioning), 'float32'), target));
  const theirs = errors(teacher);
  const worse = meanOfEach(sub(errors(student), theirs));
  const weighed = weights ? mul(worse, weights) : worse;
  const pairs = sample.shape[0] / 2;
  const margin = sub(slice(weighed, 0, 0, pairs), slice(weighed, 0, pairs, pairs));
  return scale(sum(softplus(scale(margin, beta / 2)), 0), 1 / pairs).reshape(1);
}

/** The mean of each image [h, w, c], row by row first: sums of as many numbers at once would be less exact. */
function meanOfEach(x: Tensor): Tensor {
  const [n, h] = x.shape;
  const rows = sum(x.reshape(n * h, -1), 1);
  return scale(sum(rows.reshape(n, h), 1), n / x.size);
}

/** Terms of a series that leave out less than a float32 shows. */
const TERMS = 7;

/**
 * log(1 + e^x), which is -logsigmoid(-x): x/2 + |x|/2 + log(1 + e^-|x|), exact where e^x is not finite. Its gradient at 0, where adapters
 * begin, is 1/2, as |x| has 0 there. log(1 + u) is 2 artanh(s), s = u / (u + 2) of at most 1/3: 2 (s + s^3/3 + s^5/5 ...).
 */
export function softplus(x: Tensor): Tensor {
  const size = add(relu(x), relu(scale(x, -1)));
  const u = exp(scale(size, -1));
  const s = div(u, scale(u, 1, 2));
  const s2 = square(s);
  let series = scale(s2, 1 / (2 * TERMS - 1), 1 / (2 * TERMS - 3));
  for (let k = TERMS - 2; k > 0; k--) series = scale(mul(series, s2), 1, 1 / (2 * k - 1));
  return add(scale(add(x, size), 0.5), scale(mul(series, s), 2));
}
