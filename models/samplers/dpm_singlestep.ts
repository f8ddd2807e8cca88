// DPM-Solver singlestep (Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095): calls come in groups of up to
// `solver_order`, each group starting anew from its first latents with one order more per call.
import { combine } from '../../engine/ops/combine.ts';
import type { Tensor } from '../../engine/tensor.ts';
import type { SchedulerConfig } from './config.ts';
import {
  isStochastic,
  levelOf,
  solverOutput,
  solverSchedule,
  solverUpdate,
  solverWeights,
} from './dpm_solver.ts';
import type { Method } from './sampler.ts';
import { finiteSigmas, linspace, roundHalfEven } from './tables.ts';

export function dpmSinglestep(config: SchedulerConfig): Method {
  const table = finiteSigmas(config);
  return {
    order: 1,
    schedule: (steps, custom) => solverSchedule(config, table, steps, custom, evenTimesteps),
    start(plan, remember) {
      const orders = orderList(config, plan.timesteps.length);
      const [outputs, first] = [remember(config.solver_order), remember(1)];
      return (output, x, i, draw) => {
        const latest = outputs.add(solverOutput(config, output, x, levelOf(plan.sigmas[i])));
        const order = Math.min(orders[i], latest.length);
        const [start] = order === 1 || first.values.length === 0 ? first.add(x) : first.values;
        const levels = Array.from({ length: order + 1 }, (_, k) => levelOf(plan.sigmas[i + 1 - k]));
        const lambdas = levels.map((level) => level.lambda);
        const integrated = order === 3 ? ({ ...config, solver_type: 'heun' } as const) : config;
        const weights = solverWeights(integrated, levels[0], levels[order]);
        const terms = seriesTerms(latest.slice(0, order), lambdas, config.solver_type === 'midpoint');
        return solverUpdate(weights, start, terms, isStochastic(config) ? draw() : undefined);
      };
    },
  };
}

/** This class has no timestep_spacing: always an even layout over the training range. */
function evenTimesteps(config: SchedulerConfig, steps: number): Float64Array {
  const points = linspace(0, config.num_train_timesteps - 1, steps + 1).map(roundHalfEven);
  return points.reverse().slice(0, steps);
}

/** The order of every call: 1, 2, (3,) 1, 2, (3,) ..., closing with lower orders where the count does not divide. */
function orderList(config: SchedulerConfig, steps: number): number[] {
  const order = config.solver_order;
  const toZero = config.final_sigmas_type === 'zero';
  const orders = Array.from({ length: steps }, (_, i) => (i % order) + 1);
  // An incomplete or zero-ended last group of three is split as 1, 2, 1.
  if (order === 3 && steps % 3 === 0 && (config.lower_order_final || toZero)) orders[steps - 1] = 1;
  if (toZero || (config.lower_order_final && order === 2 && steps % 2 === 0)) orders[steps - 1] = 1;
  return orders;
}

/** D0, D1 and D2 around the group's first output; lambdas run from the step's end back to the group's start. */
function seriesTerms(outputs: readonly Tensor[], lambdas: number[], midpoint: boolean): Tensor[] {
  const start = outputs[outputs.length - 1];
  const base = lambdas[lambdas.length - 1];
  const slope = (k: number) => {
    const r = (lambdas[k + 1] - base) / (lambdas[0] - base);
    return { r, value: combine([1 / r, outputs[k]], [-1 / r, start]) };
  };
  if (outputs.length === 1) return [start];
  const far = slope(0);
  if (outputs.length === 2 || midpoint) return [start, far.value];
  const near = slope(1);
  const gap = far.r - near.r;
  return [
    start,
    combine([far.r / gap, near.value], [-near.r / gap, far.value]),
    combine([2 / gap, far.value], [-2 / gap, near.value]),
  ];
}
