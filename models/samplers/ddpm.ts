// DDPM ancestral sampling, Ho et al. 2020 (arXiv:2006.11239), equations 6 and 7: the mean of q(x' | x, x_0) with the
// predicted x_0, plus noise of the posterior's variance (fixed_small, which fixed_small_log gives by another way) or of beta
// (fixed_large).
import { combine } from '../../engine/ops/combine.ts';
import { UserError } from '../../io/errors.ts';
import { clipSample, predictX0 } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import { varianceSchedule } from './ddim.ts';
import type { Method } from './sampler.ts';
import { roundHalfEven, spacedTimesteps, trainingTables } from './tables.ts';

export function ddpm(config: SchedulerConfig): Method {
  if (!['fixed_small', 'fixed_small_log', 'fixed_large', null].includes(config.variance_type))
    throw new UserError(
      `DDPM with variance_type "${config.variance_type}" is not supported: set it to "fixed_small", or choose another sampler`,
    );
  const { alphasCumprod } = trainingTables(config);
  return {
    order: 1,
    schedule: (steps, custom) =>
      varianceSchedule(alphasCumprod, custom.timesteps ?? spacedTimesteps(config, steps).map(roundHalfEven)),
    start: (plan) => (output, x, i, draw) => {
      const t = plan.timesteps[i];
      const abar = alphasCumprod[t];
      const before = alphasCumprod[plan.timesteps[i + 1]] ?? 1;
      const alpha = abar / before;
      const x0 = clipSample(
        config,
        predictX0(config.prediction_type, output, x, Math.sqrt(abar), Math.sqrt(1 - abar)),
      );
      const mean = combine(
        [(Math.sqrt(before) * (1 - alpha)) / (1 - abar), x0],
        [(Math.sqrt(alpha) * (1 - before)) / (1 - abar), x],
      );
      if (t === 0) return mean;
      const posterior = Math.max(((1 - before) / (1 - abar)) * (1 - alpha), 1e-20);
      const variance = config.variance_type === 'fixed_large' ? 1 - alpha : posterior;
      return combine([1, mean], [Math.sqrt(variance), draw()]);
    },
  };
}
