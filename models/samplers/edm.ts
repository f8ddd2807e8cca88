// EDM (Karras et al. 2022, arXiv:2206.00364), under whose noise Playground v2.5 and CosXL were trained: there are no timesteps, but noise
// levels from sigma_max down to sigma_min. The network is told c_noise = ln(sigma) / 4 and sees c_in x, x scaled to unit spread, and x_0 is
// c_skip x + c_out F (`denoised`). Its steps are Euler's and DPM-Solver multistep's own, over x = x_0 + sigma epsilon, so that alpha is 1.
import type { SchedulerConfig } from './config.ts';
import { multistepStart } from './dpm_multistep.ts';
import type { Level } from './dpm_solver.ts';
import { eulerStart } from './euler.ts';
import type { Method, PlanOptions, Schedule } from './sampler.ts';
import { exponentialSigmas, karrasSigmas } from './sigmas.ts';

export const edmEuler = (config: SchedulerConfig): Method => ({
  order: 1,
  takesSigmas: true,
  schedule: (steps, custom) => edmSchedule(config, steps, custom),
  start: eulerStart(config),
});

export const edmDpmMultistep = (config: SchedulerConfig): Method => ({
  order: 1,
  takesSigmas: true,
  schedule: (steps, custom) => edmSchedule(config, steps, custom),
  start: multistepStart(config, levelOf),
});

const levelOf = (sigma: number): Level => ({ alpha: 1, sigma, lambda: -Math.log(sigma) });

/** Noise begins at sqrt(sigma^2 + 1) of the first level, as diffusers has it, whatever sigma_data is. */
function edmSchedule(
  { sigma_min, sigma_max, sigma_schedule, rho, final_sigmas_type }: SchedulerConfig,
  steps: number,
  custom: Pick<PlanOptions, 'sigmas'>,
): Schedule {
  const [low, high] = [sigma_min as number, sigma_max as number];
  const spaced = () =>
    sigma_schedule === 'karras' ? karrasSigmas(high, low, steps, rho) : exponentialSigmas(high, low, steps);
  const last = final_sigmas_type === 'zero' ? 0 : low;
  const sigmas = Float32Array.from(custom.sigmas ?? [...spaced(), last]);
  return {
    timesteps: sigmas.subarray(0, -1).map((sigma) => Math.log(sigma) / 4),
    sigmas,
    initNoiseSigma: Math.sqrt(sigmas[0] * sigmas[0] + 1),
    inputSigmas: sigmas,
    marginal: (i) => ({ signal: 1, noise: sigmas[i] }),
  };
}
