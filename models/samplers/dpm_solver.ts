// What the DPM-Solvers share (Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095): with lambda = log(alpha / sigma), a
// step of h in lambda is exact in the linear part, and the network's output is a Taylor series D0 + D1 + D2 in lambda.
// "dpmsolver" expands epsilon, "dpmsolver++" x_0; the "sde-" forms add noise.
import { combine, type Term } from '../../engine/ops/combine.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { denoised, predictEpsilon, predictX0 } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import type { PlanOptions, Schedule } from './sampler.ts';
import { solverLevels } from './sigmas.ts';
import { solverTimesteps } from './tables.ts';

/** A noise level; lambda is log(alpha / sigma). */
export interface Level {
  alpha: number;
  sigma: number;
  lambda: number;
}

/** In the parametrization with alpha^2 + sigma^2 = 1, from sigma / alpha. */
export function levelOf(ratio: number): Level {
  const alpha = 1 / Math.sqrt(ratio * ratio + 1);
  return { alpha, sigma: ratio * alpha, lambda: -Math.log(ratio) };
}

/** Weights of one step: of x, of D0, D1 and D2, and of the noise. */
interface Weights {
  x: number;
  d0: number;
  d1: number;
  d2: number;
  noise: number;
}

/** The exact integrals of the series' terms over the step from `s` to `t`; `midpoint` takes D1's at the step's middle. */
export function solverWeights(config: SchedulerConfig, t: Level, s: Level, eta = 1): Weights {
  const h = t.lambda - s.lambda;
  const midpoint = config.solver_type === 'midpoint';
  if (config.algorithm_type === 'dpmsolver++') {
    const phi = Math.expm1(-h);
    const d1 = midpoint ? -0.5 * phi : phi / h + 1;
    const d2 = -((phi + h) / (h * h) - 0.5);
    return { x: t.sigma / s.sigma, d0: -t.alpha * phi, d1: t.alpha * d1, d2: t.alpha * d2, noise: 0 };
  }
  if (config.algorithm_type === 'sde-dpmsolver++') {
    const noised = eta === 0 ? 0 : eta * h; // h is infinite at a last step to sigma 0
    const far = h + noised;
    const phi = -Math.expm1(-far);
    const d1 = midpoint ? 0.5 * phi : phi / -far + 1;
    const d2 = (phi - far) / (far * far) - 0.5;
    const x = (t.sigma / s.sigma) * Math.exp(-noised);
    const noise = t.sigma * Math.sqrt(-Math.expm1(-2 * noised));
    return { x, d0: t.alpha * phi, d1: t.alpha * d1, d2: t.alpha * d2, noise };
  }
  const phi = Math.expm1(h);
  const twice = config.algorithm_type === 'sde-dpmsolver' ? 2 : 1;
  const d1 = midpoint ? -0.5 * phi : -(phi / h - 1);
  const d2 = -((phi - h) / (h * h) - 0.5);
  const noise = twice === 2 ? t.sigma * Math.sqrt(Math.expm1(2 * h)) : 0;
  const scale = twice * t.sigma;
  return { x: t.alpha / s.alpha, d0: -scale * phi, d1: scale * d1, d2: scale * d2, noise };
}

export const isStochastic = (config: SchedulerConfig): boolean => config.algorithm_type.startsWith('sde-');

/** The quantity the algorithm expands: x_0, or epsilon for the "dpmsolver" forms. */
export function solverOutput(
  config: SchedulerConfig,
  output: Tensor,
  x: Tensor,
  { alpha, sigma }: Level,
): Tensor {
  if (config.sigma_data) return denoised(config, output, x, sigma);
  const predict = config.algorithm_type.endsWith('++') ? predictX0 : predictEpsilon;
  return predict(config.prediction_type, output, x, alpha, sigma);
}

/** x, the series' terms and the noise, weighted; an absent term (of a lower order) is left out. */
export function solverUpdate(
  weights: Weights,
  x: Tensor,
  terms: readonly (Tensor | undefined)[],
  noise?: Tensor,
): Tensor {
  const sum: Term[] = [[weights.x, x]];
  const [d0, d1, d2] = terms;
  if (d0) sum.push([weights.d0, d0]);
  if (d1) sum.push([weights.d1, d1]);
  if (d2) sum.push([weights.d2, d2]);
  if (noise) sum.push([weights.noise, noise]);
  return combine(...sum);
}

/** The schedule of a DPM-Solver-like method. */
export function solverSchedule(
  config: SchedulerConfig,
  table: Float32Array,
  steps: number,
  custom: Pick<PlanOptions, 'timesteps'>,
  layout = solverTimesteps,
): Schedule {
  const given = custom.timesteps ? Float64Array.from(custom.timesteps) : layout(config, steps);
  const levels = solverLevels(config, table, given);
  const sigmas = Float32Array.of(...levels.sigmas, levels.last);
  return {
    timesteps: Float32Array.from(levels.timesteps),
    sigmas,
    initNoiseSigma: 1,
    marginal: (i) => {
      const { alpha, sigma } = levelOf(sigmas[i]);
      return { signal: alpha, noise: sigma };
    },
  };
}
