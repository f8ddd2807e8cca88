// Latent consistency distillation (Luo et al. 2023, algorithm 1; as adapters LCM-LoRA, Luo et al. 2023b), as diffusers' scripts have it. A
// picture is noised to one of a few timesteps. From there the frozen teacher, guided by a drawn w, takes a step of DDIM back. What the
// student makes of the noisier point is to be what it makes, off the tape, of the other: from any point of the way the same x_0, in one
// step. Each of these is a sum a x + b o of the latents x and the network's output o, so a, b are made on the host, for each image.
import { noGrad } from '../../engine/grad.ts';
import type { Tensors } from '../../engine/op.ts';
import { add, mul, sub } from '../../engine/ops/binary.ts';
import { mse } from '../../engine/ops/loss.ts';
import { slice } from '../../engine/ops/move.ts';
import { cast } from '../../engine/ops/unary.ts';
import { scope } from '../../engine/scope.ts';
import { sizeOf, type Tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { noised } from '../../models/samplers/tables.ts';
import type { Conditioning } from '../../models/unet/transformer.ts';
import { draws } from '../data/draws.ts';
import type { LatentBatch, Network, Objective } from '../objective/objective.ts';
import type { PassInputs } from '../objective/pass_inputs.ts';
import { pseudoHuber, weighedMean } from '../objective/pseudo_huber.ts';
import { asksAverages } from '../run/rules/methods.ts';
import type { Run } from '../run/run.ts';
import type { LossContext, MakeMethod } from './method.ts';

/** The data's standard deviation that the boundary condition is built on, as in models/samplers/lcm.ts. */
const SIGMA_DATA = 0.5;

/** Factors of a sum a x + b o. */
type Sum = readonly [ofSample: number, ofOutput: number];

const plus = (u: number, [a, b]: Sum, v: number, [c, d]: Sum): Sum => [u * a + v * c, u * b + v * d];

/** A step of the solver: from timestep `from` to `to`, where its target is asked; DDIM itself lands on `abar`. */
export interface SolverStep {
  from: number;
  to: number;
  abar: number;
}

/** The steps of diffusers' DDIMSolver, the last of the way, to timestep 0, first. */
export function solverSteps(
  alphasCumprod: Objective['alphasCumprod'],
  num_ddim_timesteps: number,
): SolverStep[] {
  const ratio = Math.floor(alphasCumprod.length / num_ddim_timesteps);
  return Array.from({ length: num_ddim_timesteps }, (_, i) => {
    const to = Math.max(0, i * ratio - 1);
    return { from: (i + 1) * ratio - 1, to, abar: alphasCumprod[to] };
  });
}

/** What the output at a timestep says of x_0, and of the noise, where x = sqrt(abar) x_0 + sqrt(1 - abar) noise. */
function readings({ settings, alphasCumprod }: Objective, t: number): { x0: Sum; noise: Sum } {
  const [alpha, sigma] = [Math.sqrt(alphasCumprod[t]), Math.sqrt(1 - alphasCumprod[t])];
  return settings.prediction_type === 'epsilon'
    ? { x0: [1 / alpha, -sigma / alpha], noise: [0, 1] }
    : { x0: [alpha, -sigma], noise: [sigma, alpha] };
}

/** The consistency function c_skip x + c_out x_0 at a timestep: x itself at 0. */
export function consistency(objective: Objective, t: number, timestep_scaling_factor: number): Sum {
  const scaled = timestep_scaling_factor * t;
  const norm = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
  const [skip, out] = [(SIGMA_DATA * SIGMA_DATA) / norm, scaled / Math.sqrt(norm)];
  return plus(skip, [1, 0], out, readings(objective, t).x0);
}

/** Where each sum begins in an image's row of factors; the last is w alone. */
const [STUDENT, SOLVER, TARGET, GUIDANCE, FACTORS] = [0, 2, 4, 6, 7];

/** The factors of an image that is noised to the begin of a step, under guidance w. */
function factorsOf(
  objective: Objective,
  { from, to, abar }: SolverStep,
  w: number,
  scaling: number,
): number[] {
  const { x0, noise } = readings(objective, from);
  const solver = plus(Math.sqrt(abar), x0, Math.sqrt(1 - abar), noise);
  return [...consistency(objective, from, scaling), ...solver, ...consistency(objective, to, scaling), w];
}

/** `train.method` "lcm". The target is the student itself for adapters, else its moving average where there is one. */
export const latentConsistency: MakeMethod = (run, objective) => {
  const { lcm, seed, dtype } = run;
  const { length: count } = objective.alphasCumprod;
  if (objective.edm)
    throw new UserError(
      `the model was trained under EDM's noise, and "train.method" "lcm" is for DDPM's: give a model of SDXL's own noise`,
    );
  if (lcm.num_ddim_timesteps > count)
    throw new UserError(
      `lcm.num_ddim_timesteps is ${lcm.num_ddim_timesteps}, and the model's schedule has ${count} timesteps; give that or fewer, such as 50`,
    );
  const steps = solverSteps(objective.alphasCumprod, lcm.num_ddim_timesteps);
  return {
    asks: { teacher: true, unconditional: true, average: asksAverages(run) },
    inputs(batch) {
      const drawn = batch.ids.map((id) => {
        const step = steps[draws(seed, batch.epoch, id, 'timestep').integer(steps.length)];
        const w = lcm.w_min + draws(seed, batch.epoch, id, 'guidance').uniform() * (lcm.w_max - lcm.w_min);
        return { step, w };
      });
      return distilled(objective, batch, drawn, { seed, lcm });
    },
    blank(shape) {
      const rows = (...more: number[]) => new Float32Array(sizeOf([shape[0], ...more]));
      const [timesteps, factors] = [rows(), rows(FACTORS)];
      return inputsOf(shape, { sample: rows(...shape.slice(1)), timesteps, ends: timesteps, factors });
    },
    loss: (context, inputs) => consistencyLoss(context, inputs, lcm, dtype),
  };
};

/** A batch noised to the begin of the steps that are drawn for its images. */
export function distilled(
  objective: Objective,
  { ids, epoch, latents, height, width, weights }: LatentBatch,
  drawn: readonly { step: SolverStep; w: number }[],
  { seed, lcm }: Pick<Run, 'seed' | 'lcm'>,
): PassInputs {
  const size = latents.length / ids.length;
  const sample = new Float32Array(latents.length);
  for (const [i, id] of ids.entries()) {
    const noise = draws(seed, epoch, id, 'noise').normals(size);
    const own = latents.subarray(i * size, (i + 1) * size);
    sample.set(noised(own, noise, objective.alphasCumprod[drawn[i].step.from]), i * size);
  }
  const scaling = lcm.timestep_scaling_factor;
  return inputsOf([ids.length, height, width, size / (height * width)], {
    sample,
    timesteps: Float32Array.from(drawn, ({ step }) => step.from),
    ends: Float32Array.from(drawn, ({ step }) => step.to),
    factors: Float32Array.from(drawn.flatMap(({ step, w }) => factorsOf(objective, step, w, scaling))),
    weights,
  });
}

type Row = 'timesteps' | 'ends' | 'weights';

function inputsOf(
  shape: readonly number[],
  {
    sample,
    factors,
    ...rows
  }: Record<'sample' | 'factors', Float32Array> & Partial<Record<Row, Float32Array>>,
): PassInputs {
  const [n] = shape;
  const input = (values: Float32Array, shape: readonly number[]) => ({
    shape,
    values,
    dtype: 'float32' as const,
  });
  return {
    sample: input(sample, shape),
    factors: input(factors, [n, FACTORS]),
    ...Object.fromEntries(
      Object.entries(rows).flatMap(([name, values]) => (values ? [[name, input(values, [n])]] : [])),
    ),
  };
}

/** The distance of the student's x_0 from the target's. All but what networks see is float32. */
export function consistencyLoss(
  { student, teacher, target, conditioning, unconditional }: LossContext,
  { sample, timesteps, ends, factors, weights }: Tensors,
  settings: Pick<Run['lcm'], 'loss_type' | 'huber_c'>,
  dtype: FloatDType,
): Tensor {
  const factor = (k: number) => slice(factors, 1, k, 1).reshape(-1, 1, 1, 1);
  const summed = (k: number, x: Tensor, o: Tensor) => add(mul(x, factor(k)), mul(o, factor(k + 1)));
  const ask = (network: Network, x: Tensor, t: Tensor, told: Conditioning) =>
    cast(network(cast(x, dtype), t, told), 'float32');
  // The teacher is guided, and hears of no guidance.
  const guided = { ...conditioning, guidance: slice(factors, 1, GUIDANCE, 1).reshape(-1) };
  // First what is off the tape, so that nothing of the student's pass has to be kept meanwhile.
  const wanted = noGrad(() =>
    scope(() => {
      const told = ask(teacher, sample, timesteps, conditioning);
      // The paper's guidance: w is one less than what sampling calls guidance_scale.
      const more = sub(told, ask(teacher, sample, timesteps, unconditional));
      const before = summed(SOLVER, sample, add(told, mul(more, factor(GUIDANCE))));
      return summed(TARGET, before, ask(target, before, ends, guided));
    }),
  );
  const given = summed(STUDENT, sample, ask(student, sample, timesteps, guided));
  return settings.loss_type === 'l2'
    ? mse(given, wanted, weights)
    : weighedMean(pseudoHuber(sub(given, wanted), settings.huber_c), weights);
}
