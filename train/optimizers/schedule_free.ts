// Schedule-Free AdamW (Defazio et al. 2024), as schedulefree's AdamWScheduleFree without inner momentum: a constant learning rate, and in the
// place of its fall a mean of where the weights have been. z goes by the gradients; x, the mean, is what is drawn with, measured and saved;
// gradients are taken at y between them, which is what the model's weights are while they are trained. How much x takes of z at a step is
// one number for all parameters: its weight, k^r times the greatest rate so far to the power of weight_lr_power, over the sum of all so
// far. What is kept is that sum as a multiple of the last weight: it counts the steps where the rate is constant, and stays exact.
import { update } from '../../engine/op.ts';
import { scheduleFreeStep } from '../../engine/ops/schedule_free.ts';
import type { JointRule } from './rule.ts';

export interface ScheduleFreeOptions {
  betas: readonly [number, number];
  eps: number;
  /** The power of a step's number in what its z counts in x. */
  r: number;
  /** That of the greatest learning rate so far: so the steps of a warm-up count less. */
  weight_lr_power: number;
}

export const scheduleFree = ({ betas, eps, r, weight_lr_power }: ScheduleFreeOptions): JointRule => ({
  slots: ({ memoryShape: shape }) => ({ z: 'float32 weight', x: 'float32 weight', exp_avg_sq: { shape } }),
  averages: 'x',
  // The greatest rate so far, and the sum of the weights over the last of them.
  shared: { lr_max_and_weight_sum: [0, 0] },
  stepAll(moves, { lr_max_and_weight_sum: state }, lr) {
    if (moves.length === 0) return undefined;
    const [before, sum] = state.floats();
    const most = Math.max(before, Math.fround(lr));
    const { step } = moves[0].context;
    const last = sum * ((step - 1) / step) ** r * (before / most) ** weight_lr_power;
    // Where no rate has been above 0 yet, nothing counts, but that 0 to the power of 0 is 1.
    const next = most > 0 || weight_lr_power === 0 ? 1 + (sum > 0 ? last : 0) : 0;
    state.set([most, next]);
    const rate = next > 0 ? 1 / next : 0;
    update(
      moves.map(({ tensors: { weight, gradient }, slots: { z, x, exp_avg_sq }, context }) =>
        scheduleFreeStep({ weight, gradient, z, x, exp_avg_sq }, { betas, eps, rate, ...context }),
      ),
    );
    return undefined;
  },
});
