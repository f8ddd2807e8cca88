// What a sampler is, and the one loop that drives every method: a method only lays out its timesteps and sigmas and gives
// a step function that says what it remembers. Latents stay on the device, float32 [n, c, h, w]: the host waits for no
// number (but where a config clips x_0), and a GPU not for the host.
import { combine } from '../../engine/ops/combine.ts';
import { keep, scope, unscoped } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import { clipSample, denoised, predictX0 } from './arithmetic.ts';
import type { SchedulerClass, SchedulerConfig } from './config.ts';
import { openMemory, type Remember } from './memory.ts';
import { hasSpacedSigmas } from './sigmas.ts';
import { roundHalfEven } from './tables.ts';

/** Settings of single methods, as diffusers passes them to `step`. */
export interface StepSettings {
  /** DDIM: 0 deterministic to 1 as noisy as DDPM (default 0). TCD: gamma, 0 to 1 (default 0.3). */
  eta?: number;
  /**
   * Euler a, DPM2 a, DPM++ 2S a and those with SDE in their names: how much of their noise is put anew in each step, 0 (none) to 1
   * (default), k-diffusion's eta.
   */
  etaAncestral?: number;
}

export interface PlanOptions extends StepSettings {
  /** Image-to-image: the part of the steps to do, 0 to 1. */
  strength?: number;
  /** Start where a run with `denoisingEnd` of the same value left off (refiner); `strength` then has no effect. */
  denoisingStart?: number;
  /** Stop at this part of the training range, 0 to 1 (base of an ensemble). */
  denoisingEnd?: number;
  /** Own timesteps, falling, in place of the spacing. */
  timesteps?: readonly number[];
  /** Own sigmas, falling and ending with the final one (Euler and EDM's only). */
  sigmas?: readonly number[];
}

/** A method's layout of a whole run, before a part of it is chosen. */
export interface Schedule {
  /** What the network is handed at each call, falling; second-order methods call twice per step. */
  timesteps: Float32Array;
  /** Noise levels as diffusers' `scheduler.sigmas`, empty for methods that work on abar alone. */
  sigmas: Float32Array;
  /** Standard deviation of the noise to start from. */
  initNoiseSigma: number;
  /**
   * The sigma by which call i's input is scaled, x / sqrt(sigma^2 + 1), where EDM has sigma_data^2 in 1's place; absent when the network
   * sees x itself.
   */
  inputSigmas?: Float32Array;
  /** Weights of x_0 and of the noise in the latents before call i. */
  marginal(i: number): { signal: number; noise: number };
}

export interface Plan extends Schedule, StepSettings {
  /** Calls of the network: end - begin. */
  steps: number;
  begin: number;
  end: number;
}

export type Draw = () => Tensor;
export type Denoise = (x: Tensor, timestep: number, i: number) => Tensor;
/** One call of `step`: the network's output at x, before call i, to the latents after it. */
export type Step = (output: Tensor, x: Tensor, i: number, draw: Draw) => Tensor;

/** What a method's file provides. */
export interface Method {
  /** Network calls per step: 2 for Heun and its kin. */
  order: 1 | 2;
  schedule(steps: number, custom: Pick<PlanOptions, 'timesteps' | 'sigmas' | 'etaAncestral'>): Schedule;
  /** Whether `schedule` heeds a caller's sigmas. */
  takesSigmas?: boolean;
  /** Whether a step goes down by an even share of the training range, wherever the next timestep lies: a caller's own are refused. */
  evenSteps?: boolean;
  /** A step function with a fresh history. Tensors of one step reach the next through `remember` alone. */
  start(plan: Plan, remember: Remember): Step;
}

/** A call and what it came to. Its tensors live until the run has gone on twice, so that it may go on while one is looked at. */
export interface StepResult {
  /** Index of the call into plan.timesteps. */
  index: number;
  timestep: number;
  x: Tensor;
  /** x_0 as the call's output has it, before the step: what diffusers' schedulers call pred_original_sample. Made when asked for. */
  predOriginalSample(): Tensor;
}

export interface Sampler {
  /** The diffusers class that this follows, or k-diffusion's function. */
  readonly name: SchedulerClass;
  readonly config: SchedulerConfig;
  readonly order: 1 | 2;
  /** Lays out `steps` steps and chooses the part to run. */
  plan(steps: number, options?: PlanOptions): Plan;
  /** Latents of image `x0` as they stand before call `i` (default: the plan's first). */
  addNoise(plan: Plan, x0: Tensor, noise: Tensor, i?: number): Tensor;
  /** What the network is handed at call `i`. */
  scaleModelInput(plan: Plan, x: Tensor, i: number): Tensor;
  /**
   * Runs the plan from the latents that `begin` makes. `denoise` gets the scaled model input and returns the network's output after
   * guidance; `draw` returns standard normal noise of x's size. Yields after each call; `next(replacement)` goes on
   * from other latents (inpainting). Returns the last latents, which the caller releases. To leave early call return().
   */
  run(
    plan: Plan,
    begin: () => Tensor,
    denoise: Denoise,
    draw: Draw,
  ): Generator<StepResult, Tensor, Tensor | undefined>;
}

export const makeSampler = (name: SchedulerClass, config: SchedulerConfig, method: Method): Sampler => ({
  name,
  config,
  order: method.order,
  plan(steps, options = {}) {
    checkOptions(steps, config, options);
    if (config.sigma_data) checkEDM(name, options);
    checkOwn(name, config, method, options);
    const schedule = method.schedule(options.timesteps?.length ?? steps, options);
    // Levels of other programs may be fewer than the steps, or more.
    const laid = config.sigma_schedule ? Math.ceil(schedule.timesteps.length / method.order) : steps;
    const total = config.num_train_timesteps;
    const { begin, end } = chosenPart(schedule.timesteps, laid, method.order, total, options);
    const { eta, etaAncestral } = options;
    return { ...schedule, steps: end - begin, begin, end, eta, etaAncestral };
  },
  addNoise(plan, x0, noise, i = plan.begin) {
    const weights = plan.marginal(i);
    return combine([weights.signal, x0], [weights.noise, noise]);
  },
  scaleModelInput: (plan, x, i) => scaledInput(config, plan, x, i),
  run: (plan, begin, denoise, draw) => run(config, method, plan, begin, denoise, draw),
});

function scaledInput({ sigma_data: data = 1 }: SchedulerConfig, { inputSigmas }: Plan, x: Tensor, i: number) {
  if (!inputSigmas) return x;
  return combine([1 / Math.sqrt(inputSigmas[i] * inputSigmas[i] + data * data), x]);
}

/** Sampler.run. */
function* run(
  config: SchedulerConfig,
  method: Method,
  plan: Plan,
  begin: () => Tensor,
  denoise: Denoise,
  draw: Draw,
): ReturnType<Sampler['run']> {
  const memory = openMemory();
  const results: Tensor[][] = [];
  try {
    const step = method.start(plan, memory.remember);
    let before = keep(begin());
    for (let i = plan.begin; i < plan.end; i++) {
      const timestep = plan.timesteps[i];
      const from = before;
      const result = [from];
      results.push(result);
      if (results.length > 2) release(results.shift());
      const [output, after] = unscoped(() =>
        scope(() => {
          const output = denoise(scaledInput(config, plan, from, i), timestep, i).handle();
          return [output, step(output, from, i, draw)];
        }),
      );
      result.push(output, after);
      const predOriginalSample = () => originalSample(config, plan, output, from, i);
      const next = (yield { index: i, timestep, x: after, predOriginalSample }) ?? after;
      before = keep(next.handle());
    }
    return before;
  } finally {
    for (const result of results) release(result);
    memory.release();
  }
}

const release = (tensors: readonly Tensor[] = []): void => {
  for (const t of tensors) t.release();
};

/** x_0 by the level that the network was told of, within the range that the config may set. */
function originalSample(
  config: SchedulerConfig,
  { inputSigmas, marginal }: Plan,
  output: Tensor,
  x: Tensor,
  i: number,
): Tensor {
  if (inputSigmas) return clipSample(config, denoised(config, output, x, inputSigmas[i]));
  const { signal, noise } = marginal(i);
  return clipSample(config, predictX0(config.prediction_type, output, x, signal, noise));
}

function checkOptions(steps: number, config: SchedulerConfig, options: PlanOptions): void {
  const total = config.num_train_timesteps;
  if (!Number.isInteger(steps) || steps < 1 || steps > total)
    throw new UserError(`the number of steps is ${steps}: give a whole number from 1 to ${total}`);
  const { strength, eta, etaAncestral: eta_ancestral } = options;
  const { denoisingStart: denoising_start, denoisingEnd: denoising_end = 1 } = options;
  const { timesteps = [], sigmas = [] } = options;
  if (options.timesteps && options.sigmas)
    throw new UserError('timesteps and sigmas both lay out the steps: give one of them');
  const falls = (list: readonly number[]) => list.every((value, i) => i === 0 || value < list[i - 1]);
  if (!falls(timesteps) || timesteps.some((t) => !Number.isInteger(t) || t < 0 || t >= total))
    throw new UserError(
      `timesteps are ${timesteps.join(', ')}: give whole numbers below ${total}, each smaller than the one before`,
    );
  if (!falls(sigmas) || !sigmas.every((sigma) => sigma >= 0) || sigmas.length === 1)
    throw new UserError(
      `sigmas are ${sigmas.join(', ')}: give the noise levels of the steps and the one to end at, mostly 0, each smaller than the one before`,
    );
  for (const [key, value] of Object.entries({ strength, denoising_start, denoising_end, eta, eta_ancestral }))
    if (value !== undefined && !(value >= 0 && value <= 1))
      throw new UserError(`${key} is ${value}: give a number from 0 to 1`);
  if (denoising_start !== undefined && denoising_start >= denoising_end)
    throw new UserError(
      `denoising_start ${denoising_start} is not below denoising_end ${denoising_end}, so nothing is left to do: lower the start, such as 0.8 for a refiner`,
    );
}

/** @throws UserError for steps of a caller's own that the method does not take */
function checkOwn(name: string, config: SchedulerConfig, method: Method, options: PlanOptions): void {
  if (options.sigmas && !method.takesSigmas)
    throw new UserError(`${name} takes no sigmas of yours; Euler does`);
  if (options.timesteps && method.evenSteps)
    throw new UserError(`${name} takes no timesteps of yours; Euler, DPM++ 2M and most others do`);
  if (options.timesteps && hasSpacedSigmas(config))
    throw new UserError(
      'Karras, exponential, beta and lu sigmas lay out the steps themselves: leave them out, or the timesteps',
    );
}

/** @throws UserError for what counts in the timesteps of training: models under EDM's noise are told its level */
function checkEDM(name: string, { timesteps, denoisingStart, denoisingEnd = 1 }: PlanOptions): void {
  if (timesteps)
    throw new UserError(
      `${name} takes no timesteps of yours, as a model under EDM's noise is told its level: give sigmas`,
    );
  if (denoisingStart !== undefined || denoisingEnd < 1)
    throw new UserError(
      `denoising_start and denoising_end are parts of the timesteps of training, of which ${name} has none: leave them out`,
    );
}

/**
 * The part of the calls to run, as diffusers' SDXL pipelines choose it. A start is always on a whole step, as a
 * second-order step cannot begin with its second call; an end may fall inside one, and then stays there.
 */
function chosenPart(
  timesteps: Float32Array,
  steps: number,
  order: number,
  total: number,
  options: PlanOptions,
): { begin: number; end: number } {
  const cutoff = (part: number) => roundHalfEven(total - part * total);
  let [begin, end] = [0, timesteps.length];
  if (options.denoisingStart !== undefined) {
    const bound = cutoff(options.denoisingStart);
    let left = timesteps.filter((t) => t < bound).length;
    if (order === 2 && left % 2 === 0) left++;
    begin = timesteps.length - left;
  } else if (options.strength !== undefined) {
    begin = Math.max(steps - Math.floor(steps * options.strength), 0) * order;
  }
  if (options.denoisingEnd !== undefined && options.denoisingEnd > 0 && options.denoisingEnd < 1) {
    const bound = cutoff(options.denoisingEnd);
    end = begin + timesteps.subarray(begin).filter((t) => t >= bound).length;
  }
  if (begin >= end) throw nothingLeft(steps, options);
  return { begin, end };
}

/** The mend is of what has chosen the part: strength has no say beside denoising_start. */
function nothingLeft(
  steps: number,
  { strength = 1, denoisingStart, denoisingEnd = 1 }: PlanOptions,
): UserError {
  const mends = [
    ...(denoisingStart !== undefined
      ? ['lower denoising_start']
      : strength < 1
        ? ['raise strength (--strength)']
        : []),
    ...(denoisingEnd < 1 ? ['raise denoising_end'] : []),
    'give more steps',
  ];
  return new UserError(`these settings leave none of the ${steps} steps to run: ${mends.join(', or ')}`);
}
