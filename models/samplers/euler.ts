// Euler's method on dx/dsigma = (x - x_0(x; sigma)) / sigma, without churn of noise; the scheduler that SDXL's checkpoints name.
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
  (output, x, i) => {
    const [from, to] = plan.sigmas.subarray(i, i + 2);
    return towards(x, denoised(config, output, x, from), from, to);
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
