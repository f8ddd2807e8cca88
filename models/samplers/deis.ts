// DEIS in log rho, Zhang and Chen 2022 (arXiv:2204.13902): with rho = sigma / alpha, x / alpha moves by the integral over
// rho of the polynomial in log rho through the latest epsilons, which has a closed form.
import { combine, type Term } from '../../engine/ops/combine.ts';
import { predictEpsilon } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import { levelOf, solverSchedule } from './dpm_solver.ts';
import type { Method, Plan } from './sampler.ts';
import { finiteSigmas } from './tables.ts';

export function deis(config: SchedulerConfig): Method {
  const table = finiteSigmas(config);
  return {
    order: 1,
    schedule: (steps, custom) => solverSchedule(config, table, steps, custom),
    start(plan, remember) {
      const epsilons = remember(config.solver_order);
      return (output, x, i) => {
        const [from, to] = [levelOf(plan.sigmas[i]), levelOf(plan.sigmas[i + 1])];
        const epsilon = predictEpsilon(config.prediction_type, output, x, from.alpha, from.sigma);
        const latest = epsilons.add(epsilon);
        const order = Math.min(latest.length, stepOrder(config, plan, i));
        const nodes = Array.from({ length: order }, (_, k) => Math.log(plan.sigmas[i - k]));
        const terms = nodes.map(
          (_, k): Term => [
            to.alpha * integratedBasis(nodes, k, plan.sigmas[i], plan.sigmas[i + 1]),
            latest[k],
          ],
        );
        return combine([to.alpha / from.alpha, x], ...terms);
      };
    },
  };
}

function stepOrder(config: SchedulerConfig, plan: Plan, i: number): number {
  const left = plan.timesteps.length - i;
  return config.lower_order_final && plan.timesteps.length < 15
    ? Math.min(left, config.solver_order)
    : config.solver_order;
}

/** The integral over rho from a to b of the Lagrange polynomial in log rho that is 1 at nodes[k] and 0 at the others. */
function integratedBasis(nodes: number[], k: number, a: number, b: number): number {
  let coefficients = [1];
  nodes.forEach((node, j) => {
    if (j === k) return;
    const scale = 1 / (nodes[k] - node);
    const next = new Array<number>(coefficients.length + 1).fill(0);
    coefficients.forEach((value, power) => {
      next[power + 1] += value * scale;
      next[power] -= value * node * scale;
    });
    coefficients = next;
  });
  return coefficients.reduce(
    (sum, value, power) => sum + value * (logPower(power, b) - logPower(power, a)),
    0,
  );
}

/** An antiderivative of (log rho)^power: rho (log rho)^power less power times that of the power below. */
function logPower(power: number, rho: number): number {
  return rho * Math.log(rho) ** power - (power > 0 ? power * logPower(power - 1, rho) : 0);
}
