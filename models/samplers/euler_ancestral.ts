// Euler's method with ancestral noise, after k-diffusion: a step to sigma_down, then fresh noise of sigma_up, where
// sigma_down^2 + sigma_up^2 = sigma_next^2 and sigma_up^2 = eta^2 sigma_next^2 (sigma^2 - sigma_next^2) / sigma^2.
import { combine } from '../../engine/ops/combine.ts';
import { denoised, towards } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import { sigmaSchedule } from './euler.ts';
import type { Method } from './sampler.ts';
import { discreteLevels } from './sigmas.ts';
import { finiteSigmas } from './tables.ts';

export function eulerAncestral(config: SchedulerConfig): Method {
  const table = finiteSigmas(config);
  return {
    order: 1,
    schedule(steps, custom) {
      const levels = discreteLevels(config, table, steps, custom.timesteps);
      return sigmaSchedule(config, levels.timesteps, [...levels.sigmas, levels.last]);
    },
    start: (plan) => (output, x, i, draw) => {
      const sigma = plan.sigmas[i];
      const { down, up } = ancestralLevels(sigma, plan.sigmas[i + 1], plan.etaAncestral);
      const moved = towards(x, denoised(config, output, x, sigma), sigma, down);
      return combine([1, moved], [up, draw()]);
    },
  };
}

/** The level to step down to and the noise to add on top, `eta` of what there could be, so that both together have level `to`. */
export function ancestralLevels(from: number, to: number, eta = 1): { down: number; up: number } {
  const up = eta * Math.sqrt((to * to * (from * from - to * to)) / (from * from));
  return { up, down: Math.sqrt(to * to - up * up) };
}
