// DPM++ 3M SDE, after k-diffusion's sample_dpmpp_3m_sde: DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095) with the derivatives of x_0 by
// lambda = -log(sigma) from two steps before, and noise as by ancestral samplers. diffusers' multistep class of third order is no stand-in:
// the weight of its second derivative has a wrong sign in it, and does not vanish with the step. Each step draws fresh normal noise.
import { combine, type Term } from '../../engine/ops/combine.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { denoised, towards } from './arithmetic.ts';
import type { SchedulerConfig } from './config.ts';
import { sigmaSchedule } from './euler.ts';
import type { Method } from './sampler.ts';
import { discreteLevels } from './sigmas.ts';
import { finiteSigmas } from './tables.ts';

export function dpmpp3mSde(config: SchedulerConfig): Method {
  const table = finiteSigmas(config);
  return {
    order: 1,
    schedule(steps, custom) {
      const levels = discreteLevels(config, table, steps, custom.timesteps);
      return sigmaSchedule(config, levels.timesteps, [...levels.sigmas, levels.last]);
    },
    start(plan, remember) {
      const outputs = remember(3);
      const { sigmas, etaAncestral: eta = 1 } = plan;
      return (output, x, i, draw) => {
        const x0 = denoised(config, output, x, sigmas[i]);
        const latest = outputs.add(x0);
        if (sigmas[i + 1] === 0) return towards(x, x0, sigmas[i], 0);
        // The lengths of this step and of those before, in lambda.
        const lengths = latest.map((_, back) => Math.log(sigmas[i - back] / sigmas[i + 1 - back]));
        const [h] = lengths;
        const kept = Math.exp(-h * (1 + eta));
        const noise = sigmas[i + 1] * Math.sqrt(-Math.expm1(-2 * h * eta));
        return combine([kept, x], [1 - kept, x0], ...derivatives(latest, lengths, h * (1 + eta)), [
          noise,
          draw(),
        ]);
      };
    },
  };
}

/** The terms of the first derivative and the second, as far as there are steps before. */
function derivatives([m0, m1, m2]: readonly Tensor[], [h, ...before]: number[], far: number): Term[] {
  if (!m1) return [];
  const [r0, r1] = before.map((length) => length / h);
  const phi2 = Math.expm1(-far) / far + 1;
  const recent = combine([1 / r0, m0], [-1 / r0, m1]);
  if (!m2) return [[phi2, recent]];
  const older = combine([1 / r1, m1], [-1 / r1, m2]);
  const phi3 = phi2 / far - 0.5;
  const bend = (phi2 * r0 - phi3) / (r0 + r1);
  return [
    [phi2 + bend, recent],
    [-bend, older],
  ];
}
