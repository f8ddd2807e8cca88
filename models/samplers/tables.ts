// The tables a diffusion model is trained with (betas, cumulative products of alphas) and the timesteps a sampler visits.
// The forward process is q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), Ho et al. 2020 (arXiv:2006.11239). Values are
// float32 and follow torch's order of rounding, since checkpoints were trained with those very numbers.
import type { SchedulerConfig } from './config.ts';

const f32 = Math.fround;

export interface TrainingTables {
  betas: Float32Array;
  /** abar_t, the product of (1 - beta_s) over s <= t: accumulated in float64, stored as float32. */
  alphasCumprod: Float32Array;
}

/** The training tables, one entry per training timestep. */
export function trainingTables(config: SchedulerConfig): TrainingTables {
  let betas = trainedBetas(config);
  if (config.rescale_betas_zero_snr) betas = rescaleZeroTerminalSnr(betas);
  return { betas, alphasCumprod: cumulativeAlphas(betas) };
}

function trainedBetas(config: SchedulerConfig): Float32Array {
  const { beta_start, beta_end, num_train_timesteps } = config;
  if (config.trained_betas) return Float32Array.from(config.trained_betas);
  if (config.beta_schedule === 'linear') return torchLinspace(beta_start, beta_end, num_train_timesteps);
  if (config.beta_schedule === 'scaled_linear')
    return torchLinspace(Math.sqrt(beta_start), Math.sqrt(beta_end), num_train_timesteps).map(
      (root) => root * root,
    );
  return cosineBetas(num_train_timesteps);
}

/** Nichol and Dhariwal's squared cosine schedule (arXiv:2102.09672), betas capped at 0.999. */
function cosineBetas(count: number): Float32Array {
  const abar = (t: number) => Math.cos(((t + 0.008) / 1.008) * (Math.PI / 2)) ** 2;
  return Float32Array.from({ length: count }, (_, i) =>
    Math.min(1 - abar((i + 1) / count) / abar(i / count), 0.999),
  );
}

/**
 * torch.linspace in float32, bit for bit: it steps from the start in the first half and from the end in the second,
 * with a fused multiply-add (here: exact in float64, then one rounding).
 */
function torchLinspace(start: number, end: number, count: number): Float32Array {
  const [first, last] = [f32(start), f32(end)];
  const step = f32(f32(last - first) / (count - 1));
  const half = count >> 1;
  return Float32Array.from({ length: count }, (_, i) =>
    i < half ? first + step * i : last - step * (count - 1 - i),
  );
}

function cumulativeAlphas(betas: Float32Array): Float32Array {
  let product = 1;
  return betas.map((beta) => (product *= f32(1 - beta)));
}

/** Shifts sqrt(abar) so that the last step is pure noise and the first unchanged, Lin et al. 2023 (arXiv:2305.08891). */
function rescaleZeroTerminalSnr(betas: Float32Array): Float32Array {
  const roots = cumulativeAlphas(betas).map(Math.sqrt);
  const [first, last] = [roots[0], roots[roots.length - 1]];
  const stretch = f32(first / f32(first - last));
  const abar = roots.map((root) => f32(f32(root - last) * stretch) ** 2);
  return abar.map((value, i) => 1 - f32(i === 0 ? value : value / abar[i - 1]));
}

/** The standard deviations of x_0 + sigma * noise, i.e. sqrt((1 - abar) / abar), one per training timestep. */
export function trainingSigmas(alphasCumprod: Float32Array): Float32Array {
  return alphasCumprod.map((abar) => Math.sqrt(f32(f32(1 - abar) / abar)));
}

/** trainingSigmas for samplers that divide by abar: a zero terminal abar becomes 2^-24, so the first sigma is 4096. */
export function finiteSigmas(config: SchedulerConfig): Float32Array {
  const { alphasCumprod } = trainingTables(config);
  if (config.rescale_betas_zero_snr) alphasCumprod[alphasCumprod.length - 1] = 2 ** -24;
  return trainingSigmas(alphasCumprod);
}

/** Rounds half to even, as numpy does. */
export function roundHalfEven(value: number): number {
  const rounded = Math.round(value);
  return Math.abs(value % 1) === 0.5 && rounded % 2 !== 0 ? rounded - 1 : rounded;
}

/** `count` values from `start` to `end` in float64, both included. */
export function linspace(start: number, end: number, count: number): Float64Array {
  const step = (end - start) / (count - 1);
  return Float64Array.from({ length: count }, (_, i) =>
    i > 0 && i === count - 1 ? end : start + (i && step * i),
  );
}

/**
 * The timesteps of `steps` steps, falling, by config.timestep_spacing: `linspace` spans the whole training range,
 * `leading` takes multiples of a whole ratio plus steps_offset, `trailing` starts from the very end.
 */
export function spacedTimesteps(config: SchedulerConfig, steps: number): Float64Array {
  const total = config.num_train_timesteps;
  if (config.timestep_spacing === 'linspace') return linspace(0, total - 1, steps).reverse();
  if (config.timestep_spacing === 'trailing') return trailingTimesteps(total, steps);
  return leadingTimesteps(config, Math.floor(total / steps), steps).reverse();
}

/**
 * As spacedTimesteps for the solvers of the DPM-Solver family, which lay out one point more and drop the last, as that is
 * where their final step ends.
 */
export function solverTimesteps(config: SchedulerConfig, steps: number): Float64Array {
  const total = config.num_train_timesteps;
  if (config.timestep_spacing === 'trailing') return trailingTimesteps(total, steps);
  const points =
    config.timestep_spacing === 'linspace'
      ? linspace(0, total - 1, steps + 1).map(roundHalfEven)
      : leadingTimesteps(config, Math.floor(total / (steps + 1)), steps + 1);
  return points.reverse().slice(0, steps);
}

function leadingTimesteps(config: SchedulerConfig, ratio: number, count: number): Float64Array {
  return Float64Array.from({ length: count }, (_, i) => i * ratio + config.steps_offset);
}

function trailingTimesteps(total: number, steps: number): Float64Array {
  const ratio = total / steps;
  return Float64Array.from(
    { length: steps }, // numpy's arange has one more, at -1, where the division rounds up
    (_, i) => roundHalfEven(total - i * ratio) - 1,
  );
}

/** The value at fractional index `at`, linear between neighbours and constant beyond the ends (numpy.interp). */
export function interpolate(table: Float32Array, at: number): number {
  if (at <= 0) return table[0];
  if (at >= table.length - 1) return table[table.length - 1];
  const low = Math.floor(at);
  return table[low] + (table[low + 1] - table[low]) * (at - low);
}

/** Signal-to-noise ratio abar / (1 - abar) of a training timestep. */
export function signalToNoise(abar: number): number {
  return abar / (1 - abar);
}

/** The training target of v-prediction, v = sqrt(abar) epsilon - sqrt(1 - abar) x_0 (arXiv:2202.00512, appendix D). */
export function velocity(x0: Float32Array, noise: Float32Array, abar: number): Float32Array {
  return weighted(Math.sqrt(abar), noise, -Math.sqrt(1 - abar), x0);
}

/** x_t = sqrt(abar) x_0 + sqrt(1 - abar) epsilon, the forward process in one step. */
export function noised(x0: Float32Array, noise: Float32Array, abar: number): Float32Array {
  return weighted(Math.sqrt(abar), x0, Math.sqrt(1 - abar), noise);
}

/** v a + w b, summed in float64. */
export function weighted(v: number, a: Float32Array, w: number, b: Float32Array): Float32Array {
  const sum = new Float32Array(a.length);
  for (let i = 0; i < a.length; i++) sum[i] = v * a[i] + w * b[i];
  return sum;
}
