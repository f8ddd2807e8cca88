// Ways to lay out the noise levels (sigmas) of a run between the largest and the smallest, and the way back from a sigma
// to the timestep the network was trained on. Everything is computed in float64 and rounded once, at the end of a plan.
import type { SchedulerConfig } from './config.ts';
import { interpolate, linspace, roundHalfEven, spacedTimesteps } from './tables.ts';

/** Whether the config lays out sigmas itself rather than reading them at the timesteps. */
export function hasSpacedSigmas(config: SchedulerConfig): boolean {
  return Boolean(
    config.use_karras_sigmas ||
      config.use_exponential_sigmas ||
      config.use_beta_sigmas ||
      config.use_lu_lambdas,
  );
}

/** `steps` sigmas from `max` down to `min`, spaced as the config says. */
export function spacedSigmas(config: SchedulerConfig, max: number, min: number, steps: number): Float64Array {
  const [high, low] = [config.sigma_max ?? max, config.sigma_min ?? min];
  if (config.use_karras_sigmas) return karrasSigmas(high, low, steps);
  if (config.use_beta_sigmas) return betaSigmas(high, low, steps);
  // use_lu_lambdas (Lu et al. 2022, arXiv:2206.00927) names the same layout.
  return exponentialSigmas(high, low, steps);
}

/** Even steps in log sigma. */
export const exponentialSigmas = (max: number, min: number, steps: number): Float64Array =>
  linspace(Math.log(max), Math.log(min), steps).map(Math.exp);

/** Karras et al. 2022 (arXiv:2206.00364), equation 5. */
export function karrasSigmas(max: number, min: number, steps: number, rho = 7): Float64Array {
  const [high, low] = [max ** (1 / rho), min ** (1 / rho)];
  return linspace(0, 1, steps).map((ramp) => (high + ramp * (low - high)) ** rho);
}

/** Quantiles of Beta(0.6, 0.6), which spends more steps at both ends, Lee et al. 2024 (arXiv:2407.12173). */
function betaSigmas(max: number, min: number, steps: number): Float64Array {
  return linspace(0, 1, steps).map((ramp) => min + betaQuantile(1 - ramp, 0.6) * (max - min));
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

/** Noise levels and the timesteps that go with them, before the final sigma. */
export interface Levels {
  timesteps: Float64Array;
  sigmas: Float64Array;
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
  const timesteps = Float64Array.from(own ?? spacedTimesteps(config, steps).map(Math.fround));
  const [lowest, highest] = [table[0], table[table.length - 1]];
  const sigmas =
    config.interpolation_type === 'log_linear'
      ? linspace(Math.log(highest), Math.log(lowest), timesteps.length + 1).map(Math.exp)
      : timesteps.map((t) => interpolate(table, t));
  if (!hasSpacedSigmas(config)) return { timesteps, sigmas };
  const spaced = spacedSigmas(config, sigmas[0], sigmas[sigmas.length - 1], timesteps.length);
  return { sigmas: spaced, timesteps: spaced.map((sigma) => sigmaToTimestep(sigma, table)) };
}

/** Levels for the DPM-Solver family: spaced sigmas span the whole training table, and timesteps are whole numbers. */
export function solverLevels(config: SchedulerConfig, table: Float32Array, timesteps: Float64Array): Levels {
  if (!hasSpacedSigmas(config)) return { timesteps, sigmas: timesteps.map((t) => interpolate(table, t)) };
  const sigmas = spacedSigmas(config, table[table.length - 1], table[0], timesteps.length);
  const rounds =
    (config.use_karras_sigmas || config.use_lu_lambdas) && config.beta_schedule !== 'squaredcos_cap_v2';
  const whole = rounds ? roundHalfEven : Math.trunc;
  return { sigmas, timesteps: sigmas.map((sigma) => whole(sigmaToTimestep(sigma, table))) };
}

/** The point below which Beta(shape, shape) has mass `probability`, by bisection. */
function betaQuantile(probability: number, shape: number): number {
  if (probability > 0.5) return 1 - betaQuantile(1 - probability, shape);
  let [low, high] = [0, 0.5];
  for (let i = 0; i < 200 && low < high; i++) {
    const middle = (low + high) / 2;
    if (betaMass(middle, shape) / betaMass(0.5, shape) < 2 * probability) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}

/**
 * Mass of Beta(shape, shape) below x <= 1/2, up to a constant: the series of x^(shape-1) (1-x)^(shape-1) integrated term
 * by term.
 */
function betaMass(x: number, shape: number): number {
  let [sum, term] = [0, 1];
  for (let k = 0; k < 100; k++) {
    sum += term / (shape + k);
    term *= ((k + 1 - shape) / (k + 1)) * x;
  }
  return x ** shape * sum;
}
