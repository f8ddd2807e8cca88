// EDM (Karras et al. 2022, arXiv:2206.00364), under whose noise Playground v2.5 and CosXL were trained: there are no timesteps, but noise
// levels from sigma_max down to sigma_min. The network is told c_noise = ln(sigma) / 4 and sees c_in x, x scaled to unit spread, and x_0 is
// c_skip x + c_out F (`denoised`). Its steps are Euler's and DPM-Solver multistep's own, over x = x_0 + sigma epsilon, so that alpha is 1.
import type { SchedulerConfig } from './config.ts';
import { multistepStart } from './dpm_multistep.ts';
import type { Level } from './dpm_solver.ts';
import { eulerStart } from './euler.ts';
import type { Method, PlanOptions, Schedule } from './sampler.ts';
import { exponentialSigmas, karrasSigmas } from './sigma_schedules.ts';

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

/** c_noise */
const toldOf = (sigma: number): number => Math.log(sigma) / 4;

const levelOf = (sigma: number): Level => ({ alpha: 1, sigma, lambda: -Math.log(sigma) });

/** `steps` levels from the largest down. */
const levelsOf = (
  { sigma_min, sigma_max, sigma_schedule, rho }: SchedulerConfig,
  steps: number,
): Float64Array =>
  sigma_schedule === 'karras'
    ? karrasSigmas(sigma_max as number, sigma_min as number, steps, rho)
    : exponentialSigmas(sigma_max as number, sigma_min as number, steps);

/** Noise begins at sqrt(sigma^2 + 1) of the first level, as diffusers has it, whatever sigma_data is. */
function edmSchedule(config: SchedulerConfig, steps: number, custom: Pick<PlanOptions, 'sigmas'>): Schedule {
  const last = config.final_sigmas_type === 'zero' ? 0 : (config.sigma_min as number);
  const sigmas = Float32Array.from(custom.sigmas ?? [...levelsOf(config, steps), last]);
  return {
    timesteps: sigmas.subarray(0, -1).map(toldOf),
    sigmas,
    initNoiseSigma: Math.sqrt(sigmas[0] * sigmas[0] + 1),
    inputSigmas: sigmas,
    marginal: (i) => ({ signal: 1, noise: sigmas[i] }),
  };
}

/** What a model learns from, by level. */
export interface EDMTables {
  /** Of x_0 / sigma_data, whose spread is 1: 1 / (1 + (sigma / sigma_data)^2), from the least noise on, where 1 - abar is 4e-6. */
  alphasCumprod: Float64Array;
  /** What the network is told of the level. */
  told: Float32Array;
  sigma_data: number;
  /** What F is times DDPM's velocity. */
  sign: 1 | -1;
}

/**
 * EDM's training in DDPM's words. Of x_0 / sigma_data the network sees sqrt(abar) x_0 + sqrt(1 - abar) epsilon, which is c_in x; F, by which
 * c_skip x + c_out F is x_0, is the velocity sqrt(abar) epsilon - sqrt(1 - abar) x_0, or where c_out is positive ("epsilon") its negative; and
 * the paper's weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 of the error of x_0 is 1 of that of F. Levels lie as those of sampling,
 * evenly drawn, as in diffusers' train_dreambooth_lora_sdxl.py, which weighs all errors of x_0 alike.
 */
export function edmTables(config: SchedulerConfig): EDMTables {
  const sigmas = levelsOf(config, config.num_train_timesteps).reverse();
  const sigma_data = config.sigma_data as number;
  return {
    alphasCumprod: sigmas.map((sigma) => 1 / (1 + (sigma / sigma_data) ** 2)),
    told: Float32Array.from(sigmas, toldOf),
    sigma_data,
    sign: config.prediction_type === 'epsilon' ? -1 : 1,
  };
}
