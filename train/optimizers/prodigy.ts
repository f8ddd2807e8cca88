// Prodigy (Mishchenko & Defazio 2023), as prodigyopt's with decoupled weight decay: AdamW that finds its own learning rate d, of which
// `lr` is a multiple, usually 1. d is one for all parameters. What they add to it is summed where each lies, in their order, and d is
// made where the first one lies, so that it does not depend on the number of GPUs. No step waits for it. A step without momentum
// (the first beta 0) goes by d as it was before it, as all others and as the paper's; prodigyopt's by the new d.
import type { Device } from '../../engine/device.ts';
import { copyBetween } from '../../engine/exchange.ts';
import { update } from '../../engine/op.ts';
import { prodigyD, prodigyMoments, prodigyStep } from '../../engine/ops/prodigy.ts';
import { empty, type Tensor, zeros } from '../../engine/tensor.ts';
import type { JointRule, Move } from './rule.ts';

export interface ProdigyOptions {
  betas: readonly [number, number];
  eps: number;
  /** Decay of the sums that d is made of; 0 for the square root of the second beta. */
  beta3: number;
  /** Multiplies the estimate of d. */
  d_coef: number;
  /** What d begins as. */
  d0: number;
  /** The most that d grows by at a step, such as 1.02; 0 for no bound. */
  growth_rate: number;
  /** Adam's bias correction, which is off in Prodigy. */
  use_bias_correction: boolean;
  /** Keeps the learning rate out of the estimate's denominator, for schedules with a warm-up. */
  safeguard_warmup: boolean;
}

export const prodigy = (options: ProdigyOptions): JointRule => ({
  slots: ({ memoryShape: shape }) => ({
    exp_avg: { shape },
    exp_avg_sq: { shape },
    s: { shape },
    p0: 'weight',
  }),
  // d, d_max, d_numerator and k, the number of steps.
  shared: { d: [options.d0, options.d0, 0, 0] },
  stepAll(moves, { d: state }, lr) {
    // As the updates' counter, read when the device has made the update before.
    const [d, , , k] = state.floats();
    if (lr > 0 && moves.length > 0) move(options, moves, state, { d, k, lr });
    return d * lr;
  },
});

/** The step after `k` others, at d as it is before it. */
function move(
  options: ProdigyOptions,
  moves: readonly Move[],
  state: Tensor,
  { d, k, lr }: { d: number; k: number; lr: number },
): void {
  const { betas, eps, d_coef, d0, growth_rate, use_bias_correction, safeguard_warmup } = options;
  const [beta1, beta2] = betas;
  const beta3 = options.beta3 || Math.sqrt(beta2);
  const correction = use_bias_correction ? Math.sqrt(1 - beta2 ** (k + 1)) / (1 - beta1 ** (k + 1)) : 1;
  const dlr = d * lr * correction;
  // d / d0 rather than d, as the sums would be too small for float32.
  const attrs = {
    betas: [beta1, beta2, beta3],
    rates: [d * (1 - beta1), d * d * (1 - beta2), (d / d0) * (safeguard_warmup ? d : dlr)],
  } as const;
  const sums = sumsFor(moves, state);
  update(
    moves.map(({ tensors, slots: { p0, exp_avg, exp_avg_sq, s }, context: { gradientScale } }, index) => {
      const all = { p0, exp_avg, exp_avg_sq, s, sums: sums.get(tensors.weight.device) as Tensor, ...tensors };
      return prodigyMoments(all, { gradientScale, index, ...attrs });
    }),
  );
  const estimate = {
    ...{ beta3, d_coef, rate: (d / d0) * dlr },
    ...{ growth_rate: growth_rate || Number.POSITIVE_INFINITY, fresh: d === Math.fround(d0) },
  };
  update([prodigyD(state, joined(sums), estimate)]);
  const known = spread(state, sums.keys());
  update(
    moves.map(({ tensors: { weight, master }, slots: { exp_avg, exp_avg_sq }, context }) => {
      const { weightDecay, rounding } = context;
      const now = known.get(weight.device) as Tensor;
      return prodigyStep(
        { weight, master, exp_avg, exp_avg_sq, d: now },
        { dlr, weightDecay, eps, rounding },
      );
    }),
  );
}

/** On the device of `state`, and on each that has some of the parameters, room for all of their sums. */
function sumsFor(moves: readonly Move[], state: Tensor): Map<Device, Tensor> {
  const devices = new Set([state.device, ...moves.map(({ tensors }) => tensors.weight.device)]);
  return new Map([...devices].map((device) => [device, zeros([2, moves.length], { device })]));
}

/** All sums, on the first device. Of a parameter's, all but its own device's are zero, so that nothing is rounded. */
function joined(sums: ReadonlyMap<Device, Tensor>): Tensor {
  const [first, ...others] = sums.values();
  const arriving = others.map((sum) => [empty(sum.shape, first), sum] as const);
  copyBetween(arriving);
  for (const [sum] of arriving) first.device.add(first, first, sum);
  return first;
}

/** `state` on each of the devices. */
function spread(state: Tensor, devices: Iterable<Device>): Map<Device, Tensor> {
  const known = new Map(
    [...devices].map((device) => [device, device === state.device ? state : empty(state.shape, { device })]),
  );
  copyBetween([...known.values()].filter((copy) => copy !== state).map((copy) => [copy, state]));
  return known;
}
