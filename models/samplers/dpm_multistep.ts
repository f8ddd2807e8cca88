// DPM-Solver multistep, "DPM++ 2M" and its kin (Lu et al. 2022, arXiv:2211.01095): the derivatives of the series come from
// the outputs of earlier steps, so each step costs one call. Its "sde-" forms are DPM++ 2M SDE.
import { combine } from '../../engine/ops/combine.ts';
import type { Tensor } from '../../engine/tensor.ts';
import type { SchedulerConfig } from './config.ts';
import {
  isStochastic,
  type Level,
  levelOf,
  solverOutput,
  solverSchedule,
  solverUpdate,
  solverWeights,
} from './dpm_solver.ts';
import type { Method, Plan } from './sampler.ts';
import { finiteSigmas } from './tables.ts';

export function dpmMultistep(config: SchedulerConfig): Method {
  const table = finiteSigmas(config);
  return {
    order: 1,
    schedule: (steps, custom) => solverSchedule(config, table, steps, custom),
    start: multistepStart(config, levelOf),
  };
}

/** The steps, in the parametrization of noise levels that `levelAt` makes of the schedule's sigmas. */
export const multistepStart =
  (config: SchedulerConfig, levelAt: (sigma: number) => Level): Method['start'] =>
  (plan, remember) => {
    const outputs = remember(config.solver_order);
    return (output, x, i, draw) => {
      const level = levelAt(plan.sigmas[i]);
      const latest = outputs.add(solverOutput(config, output, x, level));
      const order = Math.min(latest.length, stepOrder(config, plan, i));
      const weights = solverWeights(
        order === 3 ? { ...config, solver_type: 'heun' } : config,
        levelAt(plan.sigmas[i + 1]),
        level,
        plan.etaAncestral,
      );
      const terms = seriesTerms(latest.slice(0, order), (back) => levelAt(plan.sigmas[i + back]).lambda);
      return solverUpdate(weights, x, terms, isStochastic(config) ? draw() : undefined);
    };
  };

/**
 * The order to use at call i: short runs end with lower orders, and a step to sigma 0 is always of first order. So is the last to sigma_min
 * where the level before is that already, as under EDM and of spaced sigmas: its length, which is 0, would be a divisor, as it is in diffusers.
 */
function stepOrder(config: SchedulerConfig, plan: Plan, i: number): number {
  const left = plan.timesteps.length - i;
  const lowers = config.lower_order_final && plan.timesteps.length < 15;
  const toZero = config.final_sigmas_type === 'zero';
  const stays = config.sigma_data || plan.sigmas[i + 1] === plan.sigmas[i];
  const isFirst = config.euler_at_final || lowers || toZero || stays;
  if (left === 1 && isFirst) return 1;
  return left === 2 && lowers ? 2 : config.solver_order;
}

/** D0, D1 and D2 by divided differences; `lambda(k)` is lambda k calls from now (1 is the step's end, 0 its start). */
function seriesTerms(outputs: readonly Tensor[], lambda: (calls: number) => number): Tensor[] {
  const [m0, m1, m2] = outputs;
  if (!m1) return [m0];
  const h = lambda(1) - lambda(0);
  const r0 = (lambda(0) - lambda(-1)) / h;
  const recent = combine([1 / r0, m0], [-1 / r0, m1]);
  if (!m2) return [m0, recent];
  const r1 = (lambda(-1) - lambda(-2)) / h;
  const older = combine([1 / r1, m1], [-1 / r1, m2]);
  const bend = r0 / (r0 + r1);
  const d2 = combine([1 / (r0 + r1), recent], [-1 / (r0 + r1), older]);
  return [m0, combine([1 + bend, recent], [-bend, older]), d2];
}
