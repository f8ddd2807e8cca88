// PNDM, Liu et al. 2022 (arXiv:2202.09778): a DDIM-like transfer (equation 11) of a mean of the latest epsilons. With
// skip_prk_steps (Stable Diffusion's setting) the linear multistep form starts with one Heun-like repeated step;
// otherwise the first three steps are Runge-Kutta, four calls each.

import { combine, type Term } from '../../engine/ops/combine.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import type { SchedulerConfig } from './config.ts';
import { varianceSchedule } from './ddim.ts';
import type { Remember } from './memory.ts';
import type { Method, Plan, Step } from './sampler.ts';
import { roundHalfEven, spacedTimesteps, trainingTables } from './tables.ts';

/** Adams-Bashforth weights, latest first, by how many epsilons there are. */
const multistepWeights = [
  [1],
  [3 / 2, -1 / 2],
  [23 / 12, -16 / 12, 5 / 12],
  [55 / 24, -59 / 24, 37 / 24, -9 / 24],
];
const rungeKuttaWeights = [1 / 6, 1 / 3, 1 / 3, 1 / 6];

type Transfer = (x: Tensor, output: Tensor, from: number, to: number) => Tensor;

export function pndm(config: SchedulerConfig): Method {
  if (config.prediction_type === 'sample')
    throw new UserError('PNDM cannot use prediction_type "sample": choose another sampler');
  const { alphasCumprod } = trainingTables(config);
  const transfer = transferWith(config, alphasCumprod);
  return {
    order: 1,
    evenSteps: true,
    schedule(steps) {
      const falling = spacedTimesteps(config, steps).map(roundHalfEven);
      const ratio = Math.floor(config.num_train_timesteps / steps);
      return varianceSchedule(alphasCumprod, calls(config, Array.from(falling), ratio));
    },
    start: (plan, remember) => pndmStep(config, plan, transfer, remember),
  };
}

/** The timesteps of the calls: the second one again, or four per Runge-Kutta step at its start, middle (twice) and end. */
function calls(config: SchedulerConfig, falling: number[], ratio: number): number[] {
  if (config.skip_prk_steps)
    return falling.length < 2 ? falling : [falling[0], falling[1], ...falling.slice(1)];
  if (falling.length < 4)
    throw new UserError(
      'PNDM with Runge-Kutta steps needs at least 4 steps: give more, or set skip_prk_steps',
    );
  const half = Math.floor(ratio / 2);
  const starts = falling.slice(0, 3);
  const rungeKutta = starts.flatMap((t, k) => [
    t,
    falling[k + 1] + half,
    falling[k + 1] + half,
    falling[k + 1],
  ]);
  return [...rungeKutta, ...falling.slice(3)];
}

function pndmStep(config: SchedulerConfig, plan: Plan, transfer: Transfer, remember: Remember): Step {
  const whole = config.skip_prk_steps ? Math.max(plan.timesteps.length - 1, 1) : plan.timesteps.length - 9;
  const ratio = Math.floor(config.num_train_timesteps / whole);
  const rungeKuttaCalls = config.skip_prk_steps ? 0 : 12;
  let counter = 0;
  const [epsilons, stages, start] = [remember(4), remember(4), remember(1)];

  const rungeKutta: Step = (output, x, i) => {
    const stage = counter % 4;
    // Counted from the first call made, not of the schedule: diffusers has it so where a run begins in its middle.
    const from = plan.timesteps[counter++ - stage];
    if (stage === 0) {
      epsilons.add(output);
      start.add(x);
    }
    const outputs = stages.add(output);
    const to = plan.timesteps[i] - (stage % 2 ? 0 : Math.floor(ratio / 2));
    const sum = () => combine(...rungeKuttaWeights.map((weight, k): Term => [weight, outputs[3 - k]]));
    return transfer(start.values[0], stage === 3 ? sum() : output, from, to);
  };

  return (output, x, i, draw) => {
    if (counter < rungeKuttaCalls) return rungeKutta(output, x, i, draw);
    const t = plan.timesteps[i];
    if (counter++ === 1) {
      const mean = combine([0.5, output], [0.5, epsilons.values[0]]);
      return transfer(start.values[0], mean, t + ratio, t);
    }
    const latest = epsilons.add(output);
    start.add(x);
    const mean = combine(
      ...multistepWeights[latest.length - 1].map((weight, k): Term => [weight, latest[k]]),
    );
    return transfer(x, mean, t, t - ratio);
  };
}

/** Equation 11: from timestep `from` to timestep `to` along the network's (mean) output. */
function transferWith(config: SchedulerConfig, alphasCumprod: Float32Array): Transfer {
  const last = config.set_alpha_to_one ? 1 : alphasCumprod[0];
  return (x, output, from, to) => {
    const abar = alphasCumprod[from];
    const next = alphasCumprod[to] ?? last;
    const epsilon =
      config.prediction_type === 'v_prediction'
        ? combine([Math.sqrt(abar), output], [Math.sqrt(1 - abar), x])
        : output;
    const scale = abar * Math.sqrt(1 - next) + Math.sqrt(abar * (1 - abar) * next);
    return combine([Math.sqrt(next / abar), x], [-(next - abar) / scale, epsilon]);
  };
}
