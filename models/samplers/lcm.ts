// Latent consistency models, Luo et al. 2023 (arXiv:2310.04378): the network's x_0, joined to x by the boundary condition
// c_skip x + c_out x_0, is noised again to the next of few timesteps. The last step adds no noise.

import { combine } from '../../engine/ops/combine.ts';
import { UserError } from '../../io/errors.ts';
import { clipSample, predictX0 } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import { varianceSchedule } from './ddim.ts';
import type { Method } from './sampler.ts';
import { trainingTables } from './tables.ts';

/** The data's standard deviation that the boundary condition is built on. */
const sigmaData = 0.5;

export function lcm(config: SchedulerConfig): Method {
  const { alphasCumprod } = trainingTables(config);
  return {
    order: 1,
    schedule: (steps, custom) =>
      varianceSchedule(alphasCumprod, custom.timesteps ?? distilledTimesteps(config, steps)),
    start: (plan) => (output, x, i, draw) => {
      const t = plan.timesteps[i];
      const abar = alphasCumprod[t];
      const x0 = clipSample(
        config,
        predictX0(config.prediction_type, output, x, Math.sqrt(abar), Math.sqrt(1 - abar)),
      );
      const scaled = t * config.timestep_scaling;
      const norm = scaled * scaled + sigmaData * sigmaData;
      const joined = combine([scaled / Math.sqrt(norm), x0], [(sigmaData * sigmaData) / norm, x]);
      if (i === plan.timesteps.length - 1) return joined;
      const next = alphasCumprod[plan.timesteps[i + 1]];
      return combine([Math.sqrt(next), joined], [Math.sqrt(1 - next), draw()]);
    },
  };
}

/** `steps` of the timesteps the student was distilled on, evenly by index, from the noisiest. */
export function distilledTimesteps(config: SchedulerConfig, steps: number): number[] {
  const count = config.original_inference_steps;
  if (steps > count)
    throw new UserError(
      `${steps} steps are more than the ${count} this sampler was distilled on (original_inference_steps): give fewer`,
    );
  const ratio = Math.floor(config.num_train_timesteps / count);
  // As numpy's linspace has it: a step first, whose rounding counts where i of them should come to a whole number.
  return Array.from({ length: steps }, (_, i) => (count - Math.floor(i * (count / steps))) * ratio - 1);
}
