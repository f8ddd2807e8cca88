// UniPC, Zhao et al. 2023 (arXiv:2302.04867): a multistep predictor, and a corrector that redoes the step before with the
// output at its end, at no extra call. Both weight differences of outputs by the solution of a small linear system.
import { combine, type Term } from '../../engine/ops/combine.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { predictEpsilon, predictX0 } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import { levelOf, solverSchedule } from './dpm_solver.ts';
import type { Method, Plan } from './sampler.ts';
import { finiteSigmas } from './tables.ts';

export function unipc(config: SchedulerConfig): Method {
  const table = finiteSigmas(config);
  const predict = config.predict_x0 ? predictX0 : predictEpsilon;
  return {
    order: 1,
    schedule: (steps, custom) => solverSchedule(config, table, steps, custom),
    start(plan, remember) {
      const [outputs, previous] = [remember(config.solver_order), remember(1)];
      let order = 0;
      let taken = 0;
      return (output, x, i) => {
        const { alpha, sigma } = levelOf(plan.sigmas[i]);
        const latest = predict(config.prediction_type, output, x, alpha, sigma);
        if (taken > 0 && !config.disable_corrector.includes(i - 1))
          x = unifiedUpdate(config, plan, i - 1, previous.values[0], outputs.values, order, latest);
        order = Math.min(stepOrder(config, plan, i), ++taken);
        previous.add(x);
        return unifiedUpdate(config, plan, i, x, outputs.add(latest), order);
      };
    },
  };
}

/**
 * The order to use at call i: a run ends with lower orders, unless it is told not to. The last step to sigma 0, or to the level that x is at,
 * is of first order even then: in diffusers it comes to no number.
 */
function stepOrder({ lower_order_final, solver_order }: SchedulerConfig, plan: Plan, i: number): number {
  const left = plan.timesteps.length - i;
  const [from, to] = plan.sigmas.subarray(i, i + 2);
  return lower_order_final || to === 0 || to === from ? Math.min(left, solver_order) : solver_order;
}

/**
 * The step from call i to i + 1, from latents x and outputs m0, m1, ... (latest first, m0 at call i): corrected with
 * `reached`, the output at call i + 1, where that is given, and predicted without it.
 */
function unifiedUpdate(
  config: SchedulerConfig,
  plan: Plan,
  i: number,
  x: Tensor,
  outputs: readonly Tensor[],
  order: number,
  reached?: Tensor,
): Tensor {
  const [from, to] = [levelOf(plan.sigmas[i]), levelOf(plan.sigmas[i + 1])];
  const h = to.lambda - from.lambda;
  const signed = config.predict_x0 ? -h : h;
  const phi = Math.expm1(signed);
  const ratios = Array.from(
    { length: order - 1 },
    (_, k) => (levelOf(plan.sigmas[i - k - 1]).lambda - from.lambda) / h,
  );
  const base = config.predict_x0 ? to.alpha : to.sigma;
  const scale = -base * (config.solver_type === 'bh1' ? signed : phi);
  const weights = differenceWeights(config, signed, ratios, reached !== undefined);

  let ofM0 = -base * phi;
  const terms: Term[] = [[config.predict_x0 ? to.sigma / from.sigma : to.alpha / from.alpha, x]];
  const add = (weight: number, values: Tensor) => {
    terms.push([weight, values]);
    ofM0 -= weight;
  };
  ratios.forEach((ratio, k) => {
    add((scale * weights[k]) / ratio, outputs[k + 1]);
  });
  if (reached) add(scale * weights[ratios.length], reached);
  return combine(...terms, [ofM0, outputs[0]]);
}

/** The weights of the differences (m_k - m_0) / r_k, and for the corrector of the last, r = 1 (equations 9 and 10). */
function differenceWeights(
  config: SchedulerConfig,
  h: number,
  ratios: number[],
  corrects: boolean,
): number[] {
  const nodes = corrects ? [...ratios, 1] : ratios;
  // The paper's simplification for these two cases, independent of h (which is infinite on the way to sigma 0).
  if (nodes.length === 1) return [0.5];
  const bh = config.solver_type === 'bh1' ? h : Math.expm1(h);
  const right: number[] = [];
  let phi = Math.expm1(h) / h - 1;
  let factorial = 1;
  for (let k = 1; k <= nodes.length; k++) {
    right.push((phi * factorial) / bh);
    factorial *= k + 1;
    phi = phi / h - 1 / factorial;
  }
  return solveLinear(
    nodes.map((_, power) => nodes.map((node) => node ** power)),
    right,
  );
}

/** Solves a small dense system by Gaussian elimination with row pivots. */
function solveLinear(matrix: number[][], right: number[]): number[] {
  const rows = matrix.map((row, i) => [...row, right[i]]);
  const size = rows.length;
  for (let column = 0; column < size; column++) {
    let pivot = column;
    for (let i = column + 1; i < size; i++)
      if (Math.abs(rows[i][column]) > Math.abs(rows[pivot][column])) pivot = i;
    [rows[column], rows[pivot]] = [rows[pivot], rows[column]];
    for (let i = 0; i < size; i++) {
      if (i === column) continue;
      const factor = rows[i][column] / rows[column][column];
      for (let j = column; j <= size; j++) rows[i][j] -= factor * rows[column][j];
    }
  }
  return rows.map((row, i) => row[size] / row[i]);
}
