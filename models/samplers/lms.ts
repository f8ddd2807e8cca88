// Linear multistep (Adams-Bashforth on uneven sigmas), after k-diffusion: the polynomial through the last four derivatives
// dx/dsigma is integrated over the step.
import { combine, type Term } from '../../engine/ops/combine.ts';
import { denoised } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import { sigmaSchedule } from './euler.ts';
import type { Method } from './sampler.ts';
import { discreteLevels } from './sigmas.ts';
import { finiteSigmas } from './tables.ts';

const ORDER = 4;

export function lms(config: SchedulerConfig): Method {
  const table = finiteSigmas(config);
  return {
    order: 1,
    schedule(steps, custom) {
      const levels = discreteLevels(config, table, steps, custom.timesteps);
      return sigmaSchedule(config, levels.timesteps, [...levels.sigmas, levels.last]);
    },
    start(plan, remember) {
      const derivatives = remember(ORDER);
      return (output, x, i) => {
        const sigma = plan.sigmas[i];
        const x0 = denoised(config, output, x, sigma);
        const latest = derivatives.add(combine([1 / sigma, x], [-1 / sigma, x0]));
        // The polynomial's degree counts steps from the start of the schedule, also when a run begins in the middle, as
        // diffusers has it; coefficients of derivatives that were never taken are then dropped.
        const nodes = Array.from({ length: Math.min(i + 1, ORDER) }, (_, k) => plan.sigmas[i - k]);
        const weights = latest.map(
          (values, k): Term => [integratedBasis(nodes, k, sigma, plan.sigmas[i + 1]), values],
        );
        return combine([1, x], ...weights);
      };
    },
  };
}

/** The integral from `a` to `b` of the Lagrange polynomial that is 1 at nodes[k] and 0 at the others. */
function integratedBasis(nodes: number[], k: number, a: number, b: number): number {
  const basis = (at: number) =>
    nodes.reduce((product, node, j) => (j === k ? product : (product * (at - node)) / (nodes[k] - node)), 1);
  const [middle, half] = [(a + b) / 2, (b - a) / 2];
  return half * gauss.reduce((sum, [at, weight]) => sum + weight * basis(middle + half * at), 0);
}

/** Gauss-Legendre points and weights on [-1, 1], exact up to degree 7 (order 8). */
const gauss = [0.8611363115940526, 0.3399810435848563].flatMap((at, i) => {
  const weight = [0.3478548451374538, 0.6521451548625461][i];
  return [
    [-at, weight],
    [at, weight],
  ];
});
