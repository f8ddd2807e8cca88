// DPM-Solver-2 in the form of Karras et al. 2022 (arXiv:2206.00364, algorithm 2 without churn), after k-diffusion: a step
// to the geometric mean of two sigmas, and from there the derivative for the whole step. The ancestral variant aims at
// sigma_down and adds noise of sigma_up. DPM++ 2S a, k-diffusion's sample_dpmpp_2s_ancestral, is DPM-Solver++ (Lu et al. 2022,
// arXiv:2211.01095) over the same levels, and goes the whole step towards x_0 as it is seen in the middle.
import { combine } from '../../engine/ops/combine.ts';
import { denoised } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import { sigmaSchedule } from './euler.ts';
import { ancestralLevels } from './euler_ancestral.ts';
import { twice } from './heun.ts';
import type { Method } from './sampler.ts';
import { discreteLevels, sigmaToTimestep } from './sigmas.ts';
import { finiteSigmas, roundHalfEven } from './tables.ts';

interface Kind {
  ancestral: boolean;
  plusPlus: boolean;
}

export const kdpm2 = (config: SchedulerConfig): Method =>
  midpointMethod(config, { ancestral: false, plusPlus: false });
export const kdpm2Ancestral = (config: SchedulerConfig): Method =>
  midpointMethod(config, { ancestral: true, plusPlus: false });
export const dpmpp2sAncestral = (config: SchedulerConfig): Method =>
  midpointMethod(config, { ancestral: true, plusPlus: true });

function midpointMethod(config: SchedulerConfig, { ancestral, plusPlus }: Kind): Method {
  const table = finiteSigmas(config);
  const target = (from: number, to: number, eta?: number) =>
    ancestral ? ancestralLevels(from, to, eta) : { down: to, up: 0 };
  return {
    order: 2,
    schedule(steps, custom) {
      const levels = discreteLevels(config, table, steps, custom.timesteps);
      const rounds = config.use_karras_sigmas && !plusPlus; // diffusers' does
      const whole = rounds ? levels.timesteps.map(roundHalfEven) : levels.timesteps;
      const sigmas = Float32Array.from([...levels.sigmas, levels.last]);
      const between = (i: number) =>
        Math.sqrt(sigmas[i - 1] * target(sigmas[i - 1], sigmas[i], custom.etaAncestral).down);
      const inputs = Float32Array.from(twice(sigmas), (sigma, i) => (i % 2 ? between((i + 1) / 2) : sigma));
      const calls = 2 * levels.sigmas.length - 1;
      const timesteps = Array.from({ length: calls }, (_, i) =>
        i % 2 ? sigmaToTimestep(inputs[i], table) : whole[i / 2],
      );
      return sigmaSchedule(config, timesteps, [...twice(sigmas), 0], inputs);
    },
    start(plan, remember) {
      const start = remember(1);
      return (output, x, i, draw) => {
        const middle = plan.inputSigmas![i];
        const x0 = denoised(config, output, x, middle);
        const [from] = start.values;
        if (!from) {
          // The last step, mostly to sigma 0, has no middle and goes all the way.
          const to = i + 1 < plan.timesteps.length ? plan.inputSigmas![i + 1] : plan.sigmas[i + 1];
          start.add(x);
          return combine([to / middle, x], [1 - to / middle, x0]);
        }
        const begin = plan.sigmas[i - 1];
        const { down, up } = target(begin, plan.sigmas[i], plan.etaAncestral);
        const ratio = (down - begin) / middle;
        const moved = plusPlus
          ? combine([down / begin, from], [1 - down / begin, x0])
          : combine([1, from], [ratio, x], [-ratio, x0]);
        start.clear();
        return ancestral ? combine([1, moved], [up, draw()]) : moved;
      };
    },
  };
}
