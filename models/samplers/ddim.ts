// DDIM, Song et al. 2020 (arXiv:2010.02502), equation 12: x_0 is predicted and noised again to the level before,
// x' = sqrt(abar') x_0 + sqrt(1 - abar' - s^2) epsilon + s z, with s = eta sqrt((1 - abar') / (1 - abar) (1 - abar / abar')).
import { combine } from '../../engine/ops/combine.ts';
import { UserError } from '../../io/errors.ts';
import { clipSample, predictEpsilon, predictX0 } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import type { Method, Schedule } from './sampler.ts';
import { roundHalfEven, spacedTimesteps, trainingTables } from './tables.ts';

export function ddim(config: SchedulerConfig): Method {
  const { alphasCumprod } = trainingTables(config);
  const last = config.set_alpha_to_one ? 1 : alphasCumprod[0];
  return {
    order: 1,
    evenSteps: true,
    schedule: (steps) => varianceSchedule(alphasCumprod, spacedTimesteps(config, steps).map(roundHalfEven)),
    start: (plan) => (output, x, i, draw) => {
      const t = plan.timesteps[i];
      const ratio = Math.floor(config.num_train_timesteps / plan.timesteps.length);
      const abar = alphasCumprod[t];
      const before = alphasCumprod[t - ratio] ?? last;
      const [alpha, sigma] = [Math.sqrt(abar), Math.sqrt(1 - abar)];
      const x0 = clipSample(config, predictX0(config.prediction_type, output, x, alpha, sigma));
      const epsilon = predictEpsilon(config.prediction_type, output, x, alpha, sigma);
      const eta = plan.eta ?? 0;
      const spread = eta * Math.sqrt(((1 - before) / (1 - abar)) * (1 - abar / before));
      // From pure noise (zero terminal SNR) with eta 1 nothing is left for epsilon, and rounding may fall below zero.
      const along = Math.sqrt(Math.max(1 - before - spread * spread, 0));
      const moved = combine([Math.sqrt(before), x0], [along, epsilon]);
      return eta > 0 ? combine([1, moved], [spread, draw()]) : moved;
    },
  };
}

/** The schedule of a method that works on abar at whole training timesteps: the network sees x itself. */
export function varianceSchedule(alphasCumprod: Float32Array, given: ArrayLike<number>): Schedule {
  const timesteps = Float32Array.from(given);
  if (!timesteps.every((t) => t < alphasCumprod.length))
    throw new UserError(
      `${timesteps.length} steps with this spacing begin past the last training timestep: give fewer, or another timestep_spacing`,
    );
  return {
    timesteps,
    sigmas: new Float32Array(0),
    initNoiseSigma: 1,
    marginal: (i) => {
      const abar = alphasCumprod[timesteps[i]];
      return { signal: Math.sqrt(abar), noise: Math.sqrt(1 - abar) };
    },
  };
}
