// DPM++ SDE, after k-diffusion's sample_dpmpp_sde: DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095) of second order with
// its midpoint at half the step in log sigma, and ancestral noise after both calls. diffusers takes the noise from a
// Brownian tree so that runs with other step counts resemble each other; here each call draws fresh normal noise.
import { combine } from '../../engine/ops/combine.ts';
import { denoised, towards } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import { sigmaSchedule } from './euler.ts';
import { ancestralLevels } from './euler_ancestral.ts';
import { twice } from './heun.ts';
import type { Method } from './sampler.ts';
import { discreteLevels, sigmaToTimestep } from './sigmas.ts';
import { finiteSigmas } from './tables.ts';

export function dpmSde(config: SchedulerConfig): Method {
  const table = finiteSigmas(config);
  return {
    order: 2,
    schedule(steps, custom) {
      const levels = discreteLevels(config, table, steps, custom.timesteps);
      const middle = (i: number) => Math.sqrt(levels.sigmas[(i - 1) / 2] * levels.sigmas[(i + 1) / 2]);
      const sigmas = twice(levels.sigmas);
      const inputs = Float32Array.from(sigmas, (sigma, i) => (i % 2 ? middle(i) : sigma));
      const timesteps = twice(levels.timesteps).map((t, i) =>
        i % 2 ? sigmaToTimestep(middle(i), table) : t,
      );
      return sigmaSchedule(config, timesteps, [...sigmas, levels.last], inputs);
    },
    start(plan, remember) {
      const start = remember(1);
      const { etaAncestral } = plan;
      return (output, x, i, draw) => {
        const [first] = start.values;
        const second = first !== undefined;
        const sigma = plan.sigmas[second ? i - 1 : i];
        const next = plan.sigmas[second ? i : i + 1];
        const x0 = denoised(config, output, x, plan.inputSigmas![i]);
        if (i === plan.timesteps.length - 1) return towards(x, x0, sigma, next);
        const to = second ? next : plan.inputSigmas![i + 1];
        const { down, up } = ancestralLevels(sigma, to, etaAncestral);
        const moved = combine([down / sigma, first ?? x], [1 - down / sigma, x0], [up, draw()]);
        if (second) start.clear();
        else start.add(x);
        return moved;
      };
    },
  };
}
