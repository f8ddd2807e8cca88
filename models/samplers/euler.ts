// Euler's method on dx/dsigma = (x - x_0(x; sigma)) / sigma, with the optional churn of noise of Karras et al. 2022
// (arXiv:2206.00364, algorithm 2); the scheduler that SDXL's checkpoints name.
import { combine } from '../../engine/ops/combine.ts';
import { denoised, towards } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import type { Method, PlanOptions, Schedule } from './sampler.ts';
import { discreteLevels, sigmaToTimestep } from './sigmas.ts';
import { finiteSigmas } from './tables.ts';

export function euler(config: SchedulerConfig): Method {
  const table = finiteSigmas(config);
  return {
    order: 1,
    takesSigmas: true,
    schedule: (steps, custom) => eulerSchedule(config, table, steps, custom),
    start: eulerStart(config),
  };
}

/** The steps over any layout of sigmas. */
export const eulerStart =
  (config: SchedulerConfig): Method['start'] =>
  (plan) =>
  (output, x, i, draw) => {
    const sigma = plan.sigmas[i];
    const { s_churn = 0, s_tmin = 0, s_tmax = Number.POSITIVE_INFINITY, s_noise = 1 } = plan.settings;
    const churns = s_churn > 0 && sigma >= s_tmin && sigma <= s_tmax;
    const gamma = churns ? Math.min(s_churn / (plan.sigmas.length - 1), Math.SQRT2 - 1) : 0;
    const hat = sigma * (gamma + 1);
    if (gamma > 0) x = combine([1, x], [s_noise * Math.sqrt(hat * hat - sigma * sigma), draw()]);
    // v was trained at sigma, not at the churned level: diffusers keeps sigma there, but not under EDM.
    const level = config.prediction_type === 'v_prediction' && !config.sigma_data ? sigma : hat;
    return towards(x, denoised(config, output, x, level), hat, plan.sigmas[i + 1]);
  };

/** Standard deviation to start from: with leading spacing the first sigma is below the last training step's. */
function startSigma(config: SchedulerConfig, sigmas: Float32Array): number {
  const max = sigmas.reduce((a, b) => Math.max(a, b));
  return config.timestep_spacing === 'leading' ? Math.sqrt(max * max + 1) : max;
}

/** The schedule of a method whose calls are its sigmas: the network sees x / sqrt(sigma^2 + 1). */
export function sigmaSchedule(
  config: SchedulerConfig,
  timesteps: ArrayLike<number>,
  sigmas: ArrayLike<number>,
  inputSigmas?: Float32Array,
): Schedule {
  const levels = Float32Array.from(sigmas);
  return {
    timesteps: Float32Array.from(timesteps),
    sigmas: levels,
    initNoiseSigma: startSigma(config, levels),
    inputSigmas: inputSigmas ?? levels,
    marginal: (i) => ({ signal: 1, noise: levels[i] }),
  };
}

function eulerSchedule(
  config: SchedulerConfig,
  table: Float32Array,
  steps: number,
  custom: Pick<PlanOptions, 'timesteps' | 'sigmas'>,
): Schedule {
  if (custom.sigmas) {
    const given = Float32Array.from(custom.sigmas);
    const timesteps = given.subarray(0, -1).map((sigma) => sigmaToTimestep(sigma, table));
    return sigmaSchedule(config, timesteps, given);
  }
  const levels = discreteLevels(config, table, steps, custom.timesteps);
  return sigmaSchedule(config, levels.timesteps, [...levels.sigmas, levels.last]);
}
