// The noise levels (sigmas) of a run, read at its timesteps or laid out between the largest and the smallest, and the way back from a
// sigma to the timestep the network was trained on. Everything is computed in float64 and rounded once, at the end of a plan.
import type { SchedulerConfig, SigmaSchedule } from './config.ts';
import { betaSigmas, exponentialSigmas, karrasSigmas, scheduleLevels } from './sigma_schedules.ts';
import { interpolate, linspace, roundHalfEven, spacedTimesteps } from './tables.ts';

/** Whether the config lays out sigmas itself rather than reading them at the timesteps. */
export function hasSpacedSigmas(config: SchedulerConfig): boolean {
  return Boolean(
    config.sigma_schedule ||
      config.use_karras_sigmas ||
      config.use_exponential_sigmas ||
      config.use_beta_sigmas ||
      config.use_lu_lambdas,
  );
}

/** `steps` sigmas from `max` down to `min`, spaced as the config says. */
function spacedSigmas(config: SchedulerConfig, max: number, min: number, steps: number): Float64Array {
  const [high, low] = [config.sigma_max ?? max, config.sigma_min ?? min];
  if (config.use_karras_sigmas) return karrasSigmas(high, low, steps);
  // use_lu_lambdas (Lu et al. 2022, arXiv:2206.00927) names the exponential layout, and comes before beta's.
  if (config.use_beta_sigmas && !config.use_lu_lambdas) return betaSigmas(high, low, steps);
  return exponentialSigmas(high, low, steps);
}

/** The timestep (fractional) whose training sigma is `sigma`, linear in log sigma; clamped to the table. */
export function sigmaToTimestep(sigma: number, sigmas: Float32Array): number {
  const wanted = Math.log(Math.max(sigma, 1e-10));
  let low = 0;
  while (low < sigmas.length - 2 && Math.fround(Math.log(sigmas[low + 1])) <= wanted) low++;
  const [below, above] = [Math.fround(Math.log(sigmas[low])), Math.fround(Math.log(sigmas[low + 1]))];
  const weight = Math.min(Math.max((below - wanted) / (below - above), 0), 1);
  return low + weight;
}

/** Noise levels and the timesteps that go with them, and the final sigma, which has none. */
export interface Levels {
  timesteps: Float64Array;
  sigmas: Float64Array;
  last: number;
}

/**
 * Levels that a schedule lays out over the whole table, whatever the spacing, each with its own timestep, as k-diffusion has it. Where the
 * config lets none end at 0, the last comes twice, as diffusers has it for Karras' in DEIS.
 */
function namedLevels(
  schedule: SigmaSchedule,
  table: Float32Array,
  steps: number,
  endsAtZero: boolean,
): Levels {
  const levels = scheduleLevels(schedule, table, steps);
  const sigmas = levels.subarray(0, -1);
  const last = levels[sigmas.length] || (endsAtZero ? 0 : sigmas[sigmas.length - 1]);
  return { sigmas, timesteps: sigmas.map((sigma) => sigmaToTimestep(sigma, table)), last };
}

/**
 * Levels for the k-diffusion family at the timesteps of `steps` steps, or at the caller's own: sigmas read there, or with
 * log_linear interpolation in even steps of log sigma over the whole table (Euler's option); or spaced between the first and
 * last of those.
 */
export function discreteLevels(
  config: SchedulerConfig,
  table: Float32Array,
  steps: number,
  own?: readonly number[],
): Levels {
  const endsAtZero = config.final_sigmas_type !== 'sigma_min';
  if (config.sigma_schedule) return namedLevels(config.sigma_schedule, table, steps, endsAtZero);
  const timesteps = Float64Array.from(own ?? spacedTimesteps(config, steps).map(Math.fround));
  const [lowest, highest] = [table[0], table[table.length - 1]];
  const sigmas =
    config.interpolation_type === 'log_linear'
      ? linspace(Math.log(highest), Math.log(lowest), timesteps.length + 1).map(Math.exp)
      : timesteps.map((t) => interpolate(table, t));
  const last = endsAtZero ? 0 : table[0];
  if (!hasSpacedSigmas(config)) return { timesteps, sigmas, last };
  const spaced = spacedSigmas(config, sigmas[0], sigmas[sigmas.length - 1], timesteps.length);
  return { sigmas: spaced, timesteps: spaced.map((sigma) => sigmaToTimestep(sigma, table)), last };
}

/**
 * Levels for the DPM-Solver family: spaced sigmas span the whole training table, and timesteps are whole numbers. Where the last is not
 * sigma 0, DPM-Solver itself ends at training's smallest, its kin (which have no algorithm_type) at the last of spaced sigmas.
 */
export function solverLevels(config: SchedulerConfig, table: Float32Array, timesteps: Float64Array): Levels {
  const endsAtZero = config.final_sigmas_type === 'zero';
  if (config.sigma_schedule) return namedLevels(config.sigma_schedule, table, timesteps.length, endsAtZero);
  if (!hasSpacedSigmas(config))
    return {
      timesteps,
      sigmas: timesteps.map((t) => interpolate(table, t)),
      last: endsAtZero ? 0 : table[0],
    };
  const sigmas = spacedSigmas(config, table[table.length - 1], table[0], timesteps.length);
  const rounds =
    (config.use_karras_sigmas || config.use_lu_lambdas) && config.beta_schedule !== 'squaredcos_cap_v2';
  const whole = rounds ? roundHalfEven : Math.trunc;
  return {
    sigmas,
    timesteps: sigmas.map((sigma) => whole(sigmaToTimestep(sigma, table))),
    last: endsAtZero ? 0 : config.algorithm_type ? table[0] : sigmas[sigmas.length - 1],
  };
}
