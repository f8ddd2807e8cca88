// Layouts of the noise levels of a run over a model's whole table: diffusers' three between its ends, and those by which A1111, Forge,
// ComfyUI and stable-diffusion.cpp go. Where two of them mean different levels by one name, it is A1111's here: `beta`, whose quantiles are
// of sigmas, where ComfyUI's are of timesteps; `kl_optimal`, which ends at the least level, as in the paper, where ComfyUI's goes on to 0.
// Levels between timesteps are k-diffusion's, linear in log sigma: diffusers' linspace is linear in sigma and trailing rounds, so neither
// is the same.
import type { SigmaSchedule } from './config.ts';
import { linspace, roundHalfEven } from './tables.ts';

/** Of a table, sigmas from the least on, and a count of steps: falling levels, with the last one to end at. */
type Layout = (table: Float32Array, steps: number) => readonly number[];

const indices = (count: number): number[] => Array.from({ length: count }, (_, i) => i);

const greatest = (table: Float32Array): number => table[table.length - 1];

/** The level at a fractional index, linear in its logarithm. */
function levelAt(levels: ArrayLike<number>, at: number): number {
  const low = Math.min(Math.floor(at), levels.length - 2);
  return Math.exp((low + 1 - at) * Math.log(levels[low]) + (at - low) * Math.log(levels[low + 1]));
}

/** `count` levels evenly through a list of others, as Align Your Steps has it for other counts of steps than its own. */
const through = (levels: readonly number[], count: number): number[] =>
  Array.from(linspace(0, levels.length - 1, count), (at) => levelAt(levels, at));

/** So many levels evenly through all timesteps. */
const evenly = (table: Float32Array, count: number): number[] =>
  Array.from(linspace(table.length - 1, 0, count), (at) => levelAt(table, at));

/** The levels at whole timesteps, of which a formula has the i-th, and 0. */
const atTimesteps =
  (timestepOf: (i: number, steps: number, count: number) => number): Layout =>
  (table, steps) => [...indices(steps).map((i) => table[Math.max(timestepOf(i, steps, table.length), 0)]), 0];

/** Even steps of the arctangent, which are best where data are normally distributed, Sabour et al. 2024 (theorem 3.1). */
const arctangents = (table: Float32Array, count: number): number[] =>
  Array.from(linspace(Math.atan(greatest(table)), Math.atan(table[0]), count), Math.tan);

/** Align Your Steps for SDXL, Sabour et al. 2024 (arXiv:2404.14507), as its authors tell of it, and as ComfyUI has it, in more digits. */
const published = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.38, 0.234, 0.113, 0.029];
const precise = [
  ...[14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289],
  ...[0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582],
];

/** GITS, Chen et al. 2024 (arXiv:2405.11326), for a coefficient of 1.2: by steps, from 2 on, which of these levels are taken, by letter. */
const gitsLevels = [
  ...[14.61464119, 7.49001646, 6.77309084, 5.85520077, 4.65472794, 3.46139455, 3.07277966, 2.95596409],
  ...[2.84484982, 2.45070267, 2.36326075, 2.19988537, 2.12350607, 2.05039096, 1.98035145, 1.84880662],
  ...[1.67050016, 1.61558151, 1.56271636, 1.51179266, 1.36964464, 1.24153244, 1.20157266, 1.162866],
  ...[1.08895338, 0.95350921, 0.92192322, 0.86115354, 0.83188516, 0.803307, 0.74807048, 0.72133851],
  ...[0.69515091, 0.64427125, 0.59516323, 0.57119018, 0.52423614, 0.50118381, 0.4783645, 0.45573691],
  ...[0.41087446, 0.38853383, 0.36617002, 0.34370604, 0.32104823, 0.29807833, 0.27464288, 0.25053367],
  ...[0.22545385, 0.19894916, 0.17026083, 0.13792117, 0.09824532, 0.02916753],
];
const letters = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01';
const gitsRows =
  `aD1 asK1 akAQ1 aivIV1 adnzNY1 adjvHT01 adjuDNV01 adirzIQX01 adiqyELSX01 adhpvCIOUY01 adgouzGLQVY01
  acfksyDINRVY01 acfjrxBHLPTWY01 abegmtyCHLPTWY01 abegmtyCHLOSVXZ01 abegmtyCHLORUWYZ01 abeglrwAFJNQTVXYZ01
  abeglrvzEIMPSUWXYZ01 abeglrvzEILORTVWXYZ01`
    .split(/\s+/)
    .map((row) => [...row].map((letter) => gitsLevels[letters.indexOf(letter)]));

/** Begins evenly and ends with squares, as Mochi's schedule of times from 1 to 0 (genmo), whose least noise of the first half is 0.025. */
function linearQuadratic(table: Float32Array, steps: number): number[] {
  if (steps === 1) return [greatest(table), 0];
  const [threshold, linear] = [0.025, Math.floor(steps / 2)];
  const rest = steps - linear;
  const bend = (linear - threshold * steps) / (linear * rest * rest);
  const slope = threshold / linear - 2 * bend * linear;
  const noised = (i: number) =>
    i < linear ? (i * threshold) / linear : bend * i * i + slope * i + bend * linear * linear;
  return [...indices(steps).map((i) => greatest(table) * (1 - noised(i))), 0];
}

const layouts: Readonly<Record<SigmaSchedule, Layout>> = {
  karras: (table, steps) => [...karrasSigmas(greatest(table), table[0], steps), 0],
  exponential: (table, steps) => [...exponentialSigmas(greatest(table), table[0], steps), 0],
  beta: (table, steps) => [...betaSigmas(greatest(table), table[0], steps), 0],
  normal: (table, steps) => [...evenly(table, steps), 0],
  sgm_uniform: (table, steps) => [...evenly(table, steps + 1).slice(0, -1), 0],
  simple: atTimesteps((i, steps, count) => count - 1 - Math.floor(i * (count / steps))),
  // Forge's, in float32.
  turbo: atTimesteps((i, steps, count) =>
    Math.min(roundHalfEven(Math.fround(Math.fround(count / steps) * (steps - i)) - 1), count - 1),
  ),
  // More steps than asked for where the count does not divide the table, as in A1111 and ComfyUI.
  ddim_uniform: (table, steps) => {
    const ratio = Math.max(Math.floor(table.length / steps), 1);
    const levels = indices(Math.ceil((table.length - 1) / ratio)).map((i) => table[1 + i * ratio]);
    return [...levels.reverse(), 0];
  },
  // The 50 timesteps that latent consistency models are distilled on.
  lcm: atTimesteps(
    (i, steps, count) => (50 - Math.floor((i * 50) / steps)) * Math.max(Math.floor(count / 50), 1) - 1,
  ),
  beta_timesteps: atTimesteps((i, steps, count) =>
    roundHalfEven(betaQuantile(1 - i / steps, 0.6) * (count - 1)),
  ),
  smoothstep: atTimesteps((i, steps, count) => {
    const share = 1 - i / steps;
    return Math.round(share * share * (3 - 2 * share) * (count - 1));
  }),
  align_your_steps: (_, steps) => [...through(published, steps), 0],
  ays: (_, steps) => [...through(precise, steps + 1).slice(0, -1), 0],
  gits: (_, steps) => [
    ...(gitsRows[steps - 2] ?? through(gitsRows[gitsRows.length - 1], steps + 1)).slice(0, -1),
    0,
  ],
  kl_optimal: (table, steps) => arctangents(table, steps + 1),
  kl_optimal_zero: (table, steps) => [...arctangents(table, steps), 0],
  linear_quadratic: linearQuadratic,
};

/**
 * The levels of `steps` steps over a table of sigmas, from the least on: falling, with the last one to end at. A level that would come
 * twice comes once, so that with many steps there may be fewer.
 */
export const scheduleLevels = (schedule: SigmaSchedule, table: Float32Array, steps: number): Float64Array =>
  Float64Array.from(new Set(layouts[schedule](table, steps)));

/** Even steps in log sigma. */
export const exponentialSigmas = (max: number, min: number, steps: number): Float64Array =>
  linspace(Math.log(max), Math.log(min), steps).map(Math.exp);

/** Karras et al. 2022 (arXiv:2206.00364), equation 5. */
export function karrasSigmas(max: number, min: number, steps: number, rho = 7): Float64Array {
  const [high, low] = [max ** (1 / rho), min ** (1 / rho)];
  return linspace(0, 1, steps).map((ramp) => (high + ramp * (low - high)) ** rho);
}

/** Quantiles of Beta(0.6, 0.6), which spends more steps at both ends, Lee et al. 2024 (arXiv:2407.12173). */
export function betaSigmas(max: number, min: number, steps: number): Float64Array {
  return linspace(0, 1, steps).map((ramp) => min + betaQuantile(1 - ramp, 0.6) * (max - min));
}

/** The point below which Beta(shape, shape) has mass `probability`, by bisection. */
function betaQuantile(probability: number, shape: number): number {
  if (probability === 0.5) return 0.5; // exactly: of a table of 1000 it is half a timestep, which rounds up
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
