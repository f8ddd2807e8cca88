// Trajectory consistency distillation, Zheng et al. 2024 (arXiv:2402.19159): a jump along the trajectory to timestep
// s = (1 - gamma) t', then noise from s up to t'. gamma is called eta, as in diffusers; 0 is deterministic.
import { combine } from '../../engine/ops/combine.ts';
import { predictEpsilon, predictX0 } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import { varianceSchedule } from './ddim.ts';
import { distilledTimesteps } from './lcm.ts';
import type { Method } from './sampler.ts';
import { trainingTables } from './tables.ts';

export function tcd(config: SchedulerConfig): Method {
  const { alphasCumprod } = trainingTables(config);
  return {
    order: 1,
    schedule: (steps, custom) =>
      varianceSchedule(alphasCumprod, custom.timesteps ?? distilledTimesteps(config, steps)),
    start: (plan) => (output, x, i, draw) => {
      const eta = plan.eta ?? 0.3;
      const next = plan.timesteps[i + 1] ?? 0;
      const abar = alphasCumprod[plan.timesteps[i]];
      // In float32, as torch has it: in float64 0.7 * 700 is below 490.
      const target = alphasCumprod[Math.floor(Math.fround(Math.fround(1 - eta) * next))];
      const [alpha, sigma] = [Math.sqrt(abar), Math.sqrt(1 - abar)];
      const x0 = predictX0(config.prediction_type, output, x, alpha, sigma);
      const epsilon = predictEpsilon(config.prediction_type, output, x, alpha, sigma);
      const jumped = combine([Math.sqrt(target), x0], [Math.sqrt(1 - target), epsilon]);
      if (eta === 0 || i === plan.timesteps.length - 1) return jumped;
      const kept = alphasCumprod[next] / target;
      return combine([Math.sqrt(kept), jumped], [Math.sqrt(1 - kept), draw()]);
    },
  };
}
