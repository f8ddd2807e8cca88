// One step of Schedule-Free AdamW (Defazio et al. 2024) on one parameter, as an op that updates its inputs in place. Three points: z goes
// by the gradients, x is the mean of where z has been, and the weight, at which gradients are taken, lies between: z + beta1 (x - z). So
// it is made anew of both at each step, in its own type, and needs no master.
import { defineOp, type RefTensors, type Sample, type Update, updateOf } from '../op.ts';
import type { Tensor } from '../tensor.ts';
import { type AdamAttrs, adamSample, checkStep } from './optimizer.ts';
import { awkwardShapes } from './samples.ts';

export interface ScheduleFreeAttrs extends Omit<AdamAttrs, 'rounding'> {
  /** What x takes of z. */
  rate: number;
}

/** What the kernels take, in their order. */
const factors = ({
  gradientScale,
  betas: [beta1, beta2],
  step,
  eps,
  weightDecay,
  lr,
  rate,
}: ScheduleFreeAttrs) => [
  ...[gradientScale, beta1, beta2, 1 - beta2, 1 / Math.sqrt(1 - beta2 ** step), eps, weightDecay, lr, rate],
];

const scheduleFreeOp = defineOp<ScheduleFreeAttrs>({
  name: 'schedule_free',
  outputs: (t) => checkStep('schedule_free', t),
  saves: [],
  storage: 'weight',
  updates: ['weight', 'z', 'x', 'exp_avg_sq'],
  forward(t, attrs, launch) {
    const tensors = [t.weight, t.gradient, t.z, t.x, t.exp_avg_sq];
    launch('schedule_free_forward', [...tensors, t.weight.size, ...factors(attrs)]);
  },
  reference: { forward: move },
  samples: [[1], [4099], [40, 333], ...awkwardShapes].map(
    (shape, i): Sample<ScheduleFreeAttrs> => ({
      inputs: { weight: shape, gradient: shape, z: shape, x: shape, exp_avg_sq: shape },
      attrs: { ...adamSample, rate: i % 2 ? 0.3 : 1 },
      dtypes: { z: 'float32', x: 'float32', exp_avg_sq: 'float32' },
      nonnegative: ['exp_avg_sq'],
    }),
  ),
});

function move({ weight, gradient, z, x, exp_avg_sq }: RefTensors, attrs: ScheduleFreeAttrs): void {
  const [scale, beta1, beta2, rest, correction, eps, weightDecay, lr, rate] = factors(attrs);
  for (let i = 0; i < weight.data.length; i++) {
    const g = gradient.data[i] * scale;
    const v = exp_avg_sq.data[i] * beta2 + rest * g * g;
    const at = z.data[i] + beta1 * (x.data[i] - z.data[i]);
    const moved = z.data[i] - lr * (g / (Math.sqrt(v) * correction + eps) + weightDecay * at);
    const mean = x.data[i] + rate * (moved - x.data[i]);
    exp_avg_sq.data[i] = v;
    z.data[i] = moved;
    x.data[i] = mean;
    weight.data[i] = moved + beta1 * (mean - moved);
  }
}

/** Moves a weight between z and x, which are float32 as exp_avg_sq. Weight decay is of the weight, as z and x have it. */
export const scheduleFreeStep = (
  tensors: { weight: Tensor; gradient: Tensor; z: Tensor; x: Tensor; exp_avg_sq: Tensor },
  attrs: ScheduleFreeAttrs,
): Update => updateOf(scheduleFreeOp, tensors, attrs);
