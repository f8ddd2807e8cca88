// Heun's second-order method, Karras et al. 2022 (arXiv:2206.00364, algorithm 1): an Euler step to the next sigma, then
// the step again with the mean of the derivatives at both ends. The last step, mostly to sigma 0, is Euler's alone.
import { combine } from '../../engine/ops/combine.ts';
import { clipSample, denoised, towards } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import { sigmaSchedule } from './euler.ts';
import type { Method } from './sampler.ts';
import { discreteLevels } from './sigmas.ts';
import { finiteSigmas } from './tables.ts';

export function heun(config: SchedulerConfig): Method {
  const table = finiteSigmas(config);
  return {
    order: 2,
    schedule(steps, custom) {
      const levels = discreteLevels(config, table, steps, custom.timesteps);
      const sigmas = [...twice(levels.sigmas), levels.last];
      return sigmaSchedule(config, twice(levels.timesteps), sigmas);
    },
    start(plan, remember) {
      const first = remember(2);
      return (output, x, i) => {
        const sigma = plan.sigmas[i];
        const x0 = clipSample(config, denoised(config, output, x, sigma));
        const [end, start] = first.values;
        if (!start) {
          first.add(x);
          first.add(x0);
          return towards(x, x0, sigma, plan.sigmas[i + 1]);
        }
        const from = plan.sigmas[i - 1];
        const half = (sigma - from) / 2;
        const moved = combine(
          [1 + half / from, start],
          [-half / from, end],
          [half / sigma, x],
          [-half / sigma, x0],
        );
        first.clear();
        return moved;
      };
    },
  };
}

/** a, b, b, c, c, ...: every entry but the first twice, as each step but the last ends where a second call is made. */
export function twice(values: ArrayLike<number>): number[] {
  return Array.from(values).flatMap((value, i) => (i === 0 ? [value] : [value, value]));
}
