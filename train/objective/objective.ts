// The diffusion objective: latents → timesteps, noise, noised latents, target and weights, and the loss of a prediction.
// All draws are keyed by (seed, epoch, sample) and made on the host in the latents' own layout [n, h, w, c]. Where peers
// differ the paper's formula is taken and the function says so.
import type { Tensors } from '../../engine/op.ts';
import { mul, sub } from '../../engine/ops/binary.ts';
import { huber, mse } from '../../engine/ops/loss.ts';
import { cast, scale, square } from '../../engine/ops/unary.ts';
import type { Tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { isEDM } from '../../models/samplers/config.ts';
import { completeConfig, parseSchedulerConfig } from '../../models/samplers/config_checks.ts';
import { type EDMTables, edmTables } from '../../models/samplers/edm.ts';
import { noised, signalToNoise, trainingTables, velocity, weighted } from '../../models/samplers/tables.ts';
import type { Conditioning } from '../../models/unet/transformer.ts';
import { draws } from '../data/draws.ts';
import { drawNoise, type NoiseSettings } from './noise.ts';
import type { HostTensor, PassInputs } from './pass_inputs.ts';
import {
  type HuberSettings,
  hasThreshold,
  huberThreshold,
  pseudoHuber,
  weighedMean,
} from './pseudo_huber.ts';

export interface ObjectiveSettings extends NoiseSettings, HuberSettings {
  /** What the network says of a noised picture; empty for what the model's scheduler says that it does. */
  prediction_type: '' | 'epsilon' | 'v_prediction';
  /** What the loss of pictures for prior preservation weighs (dataset.class_data_dir). */
  prior_loss_weight: number;
  /** Weigh each place of a picture by its mask, its conditioning image or its alpha (mask.ts). */
  masked_loss: boolean;
  /** Min-SNR weighting (Hang et al. 2023); 0 for none. */
  snr_gamma: number;
  /** Debiased estimation weighting (Yu et al. 2023). */
  debiased: boolean;
  /** Weigh the loss of v as that of epsilon, by s / (s + 1) of the signal to noise ratio s; kohya's. */
  scale_v_pred_loss_like_noise_pred: boolean;
  /** How much of the loss of epsilon, weighed as that of v, counts besides; kohya's. */
  v_pred_like_loss: number;
  /** Rescale the schedule so that the last timestep is pure noise (Lin et al. 2023). */
  zero_terminal_snr: boolean;
  /** Strength of noise that the network sees and the target does not (Ning et al. 2023); 0 for none. */
  input_perturbation: number;
  /** Draw that strength for each picture, from 0 to what is said. */
  input_perturbation_random_strength: boolean;
  timesteps: 'uniform' | 'earlier' | 'later' | 'range' | 'cubic';
  /** Share of the timesteps that `earlier` and `later` prefer. */
  timestep_bias: number;
  /** What `range` prefers, as shares of the timesteps. */
  timestep_range: readonly number[];
  /** Only timesteps from the first on and below the second are drawn; 0 for the schedule's last. */
  min_timestep: number;
  max_timestep: number;
}

/** Scaled latents [n, height, width, channels] and who they are: the keys of their draws. */
export interface LatentBatch {
  ids: readonly number[];
  epoch: number;
  latents: Float32Array;
  height: number;
  width: number;
  /** What each image's loss is multiplied by besides; undefined for 1. */
  weights?: Float32Array;
}

/** One pass's inputs and aims, on the host. Everything but the timesteps and weights is [n, height, width, channels]. */
export interface NoisedBatch {
  shape: readonly number[];
  sample: Float32Array;
  timesteps: Float32Array;
  target: Float32Array;
  /** What multiplies each image's loss; undefined for 1. */
  weights?: Float32Array;
  /** The c of each image's loss, where the run's loss has one. */
  huber_c?: Float32Array;
}

export interface Objective {
  settings: ObjectiveSettings & { prediction_type: 'epsilon' | 'v_prediction' };
  /** abar_t by timestep. */
  alphasCumprod: Float32Array | Float64Array;
  /** Of a model of EDM's noise, whose levels are counted as timesteps. */
  edm?: EDMTables;
}

/** The model's scheduler config as it is of the trained model: previews and the finished model sample by it. */
export function trainedScheduler(
  config: Readonly<Record<string, unknown>>,
  { prediction_type, zero_terminal_snr }: Pick<ObjectiveSettings, 'prediction_type' | 'zero_terminal_snr'>,
): Record<string, unknown> {
  return {
    ...config,
    ...(prediction_type ? { prediction_type } : {}),
    ...(zero_terminal_snr ? { rescale_betas_zero_snr: true, timestep_spacing: 'trailing' } : {}),
  };
}

/**
 * The objective over a model's noise schedule, whatever sampler its scheduler_config.json names.
 * @throws UserError for settings that contradict each other
 */
export function objectiveOf(
  settings: ObjectiveSettings,
  given: Readonly<Record<string, unknown>>,
): Objective {
  const isOfEDM = isEDM(given._class_name);
  if (isOfEDM && (settings.prediction_type || settings.zero_terminal_snr))
    throw new UserError(
      `the model was trained under EDM's noise (${given._class_name}), which says what it predicts: leave objective.prediction_type and objective.zero_terminal_snr out`,
    );
  const scheduler = completeConfig(
    isOfEDM ? 'EDMEulerScheduler' : 'DDPMScheduler',
    parseSchedulerConfig(trainedScheduler(given, settings)),
  );
  const edm = isOfEDM ? edmTables(scheduler) : undefined;
  const prediction_type = edm ? 'v_prediction' : scheduler.prediction_type;
  if (prediction_type === 'sample')
    throw new UserError(
      'the model predicts the picture itself (prediction_type "sample"), which is not trained here: teach it another with objective.prediction_type',
    );
  if (scheduler.rescale_betas_zero_snr && prediction_type === 'epsilon') {
    const asker = settings.zero_terminal_snr
      ? 'objective.zero_terminal_snr'
      : "the model's rescale_betas_zero_snr";
    throw new UserError(
      `${asker} needs objective.prediction_type "v_prediction": at the last timestep there is nothing but noise, so predicting it teaches nothing`,
    );
  }
  refuseTogether({ ...settings, prediction_type });
  const { alphasCumprod } = edm ?? trainingTables(scheduler);
  const [first, last] = drawable(settings, alphasCumprod.length);
  if (last > alphasCumprod.length || first >= last)
    throw new UserError(
      `objective.min_timestep ${settings.min_timestep} and objective.max_timestep ${settings.max_timestep} leave none of the schedule's ${alphasCumprod.length} timesteps; begin below the end, and end at ${alphasCumprod.length} at most`,
    );
  return { settings: { ...settings, prediction_type }, alphasCumprod, edm };
}

/** @throws UserError for settings that contradict each other, or what the model predicts */
function refuseTogether(settings: ObjectiveSettings): void {
  if (settings.snr_gamma > 0 && settings.debiased)
    throw new UserError('objective.snr_gamma and objective.debiased are two weightings; choose one');
  if (settings.masked_loss && settings.loss === 'huber')
    throw new UserError(
      'objective.masked_loss weighs each place of a picture, and objective.loss "huber" tells of all at once; set it to "mse" or "pseudo_huber", or leave the mask out',
    );
  const v = settings.prediction_type === 'v_prediction';
  if (settings.scale_v_pred_loss_like_noise_pred && !v)
    throw new UserError(
      'objective.scale_v_pred_loss_like_noise_pred weighs the loss of v, and the model predicts noise; leave it out, or set objective.prediction_type to "v_prediction"',
    );
  if (settings.v_pred_like_loss > 0 && v)
    throw new UserError(
      'objective.v_pred_like_loss adds a loss like that of v, which the model predicts; leave it out, or set objective.prediction_type to "epsilon"',
    );
  const [begin, end] = settings.timestep_range;
  if (begin > end)
    throw new UserError(
      `objective.timestep_range begins at ${begin} and ends at ${end}; write the smaller share first`,
    );
}

/** Draws timesteps and noise for a batch and makes what the network sees and what it should say. */
export function noiseBatch(objective: Objective, batch: LatentBatch, seed: number): NoisedBatch {
  const { ids, epoch, latents, height, width } = batch;
  const size = latents.length / ids.length;
  const shape = [ids.length, height, width, size / (height * width)];
  const timesteps = Float32Array.from(ids, (id) => drawTimestep(objective, seed, epoch, id));
  const noise = new Float32Array(latents.length);
  const seen = objective.settings.input_perturbation > 0 ? new Float32Array(latents.length) : noise;
  ids.forEach((id, i) => {
    const one = drawNoise(objective.settings, [height, width, shape[3]], seed, epoch, id);
    noise.set(one, i * size);
    if (seen !== noise) {
      const more = draws(seed, epoch, id, 'perturbation').normals(size);
      seen.set(weighted(1, one, perturbation(objective.settings, seed, epoch, id), more), i * size);
    }
  });
  const made = addNoise(objective, { latents, shape, timesteps, noise, seen });
  if (!batch.weights) return made;
  return { ...made, weights: batch.weights.map((weight, i) => weight * (made.weights?.[i] ?? 1)) };
}

/** How strong the noise is that the network sees besides. */
function perturbation(
  { input_perturbation, input_perturbation_random_strength: drawn }: ObjectiveSettings,
  seed: number,
  epoch: number,
  id: number,
): number {
  return input_perturbation * (drawn ? draws(seed, epoch, id, 'perturbation_strength').uniform() : 1);
}

/** Scaled latents, and what is drawn for them. All but the timesteps is of their shape. */
interface DrawnBatch {
  shape: readonly number[];
  latents: Float32Array;
  timesteps: Float32Array;
  noise: Float32Array;
  /** The noise that is added, where it is other than what the network is to say. */
  seen?: Float32Array;
}

/** The sample, target and weights that given timesteps and noise make. */
export function addNoise(
  { settings, alphasCumprod, edm }: Objective,
  { shape, latents: scaled, timesteps, noise, seen = noise }: DrawnBatch,
): NoisedBatch {
  const [n] = shape;
  const latents = edm ? scaled.map((z) => z / edm.sigma_data) : scaled;
  const size = latents.length / n;
  const sample = new Float32Array(latents.length);
  const target = settings.prediction_type === 'epsilon' ? noise : new Float32Array(latents.length);
  for (let i = 0; i < n; i++) {
    const image = (values: Float32Array) => values.subarray(i * size, (i + 1) * size);
    const abar = alphasCumprod[timesteps[i]];
    sample.set(noised(image(latents), image(seen), abar), i * size);
    if (target !== noise) target.set(velocity(image(latents), image(noise), abar), i * size);
  }
  if (edm?.sign === -1) target.forEach((v, i) => void (target[i] = -v));
  const { snr_gamma, debiased, scale_v_pred_loss_like_noise_pred, v_pred_like_loss } = settings;
  const isWeighted = snr_gamma > 0 || debiased || scale_v_pred_loss_like_noise_pred || v_pred_like_loss > 0;
  const weights = isWeighted ? timesteps.map((t) => lossWeight(settings, alphasCumprod[t])) : undefined;
  const thresholdAt = (t: number) => huberThreshold(settings, t, alphasCumprod.length, alphasCumprod[t]);
  const huber_c = hasThreshold(settings) ? timesteps.map(thresholdAt) : undefined;
  const told = edm ? timesteps.map((t) => edm.told[t]) : timesteps;
  return { shape, sample, timesteps: told, target, weights, huber_c };
}

/**
 * The weight of an image's loss at signal-to-noise ratio s = abar / (1 - abar).
 * Min-SNR: min(s, gamma) / s for epsilon and min(s, gamma) / (s + 1) for v, the paper's (diffengine has s + 1 in both
 * places for v). Debiased estimation: the paper weighs the error of epsilon by 1 / sqrt(s), unclamped; the same weight on
 * the error of v, whose square is (s + 1) / s times as large, is sqrt(s) / (s + 1). Peers put 1 / sqrt(s + 1) or
 * 1 / (s + 1) there, and some clamp s at 1000.
 */
export function lossWeight(settings: ObjectiveSettings, abar: number): number {
  const { prediction_type, snr_gamma, debiased, scale_v_pred_loss_like_noise_pred, v_pred_like_loss } =
    settings;
  const s = signalToNoise(abar);
  const v = prediction_type === 'v_prediction';
  // s / (s + 1), s at most 1000, as kohya's.
  const ofV = Math.min(s, 1000) / (Math.min(s, 1000) + 1);
  const more =
    (scale_v_pred_loss_like_noise_pred ? ofV : 1) * (v_pred_like_loss > 0 ? 1 + v_pred_like_loss / ofV : 1);
  if (debiased) return more * (v ? Math.sqrt(s) / (s + 1) : 1 / Math.sqrt(s));
  if (snr_gamma > 0) return more * (v ? Math.min(s, snr_gamma) / (s + 1) : Math.min(1, snr_gamma / s));
  return more;
}

/** How many times likelier a preferred timestep is; diffengine's default. */
const BIAS = 5;

/** The timesteps that may be drawn: begin and, exclusive, end. */
const drawable = ({ min_timestep, max_timestep }: ObjectiveSettings, count: number): [number, number] => [
  min_timestep,
  max_timestep || count,
];

/**
 * A timestep in [0, T), or of the part that may be drawn, where others keep their odds against each other. `cubic` is (1 - u^3) T (Mou
 * et al. 2023, section 3.4), which prefers noisy ones.
 */
export function drawTimestep(
  { settings, alphasCumprod: { length: count } }: Objective,
  seed: number,
  epoch: number,
  sample: number,
): number {
  const u = draws(seed, epoch, sample, 'timestep').uniform();
  const [first, last] = drawable(settings, count);
  const between = (a: number, b: number) => a + u * (b - a);
  const whole = (t: number) => Math.max(first, Math.min(last - 1, Math.floor(t)));
  if (settings.timesteps === 'uniform') return whole(between(first, last));
  if (settings.timesteps === 'cubic') {
    const [low, high] = [last, first].map((t) => Math.cbrt(1 - t / count));
    return whole((1 - between(low, high) ** 3) * count);
  }
  const [begin, end] = preferred(settings, count);
  // Along a line on which each preferred timestep takes up BIAS, any other 1.
  const place = (t: number) => t + (BIAS - 1) * (Math.min(Math.max(t, begin), end) - begin);
  const at = between(place(first), place(last));
  if (at < begin) return whole(at);
  const inside = begin + (at - begin) / BIAS;
  return whole(inside < end ? inside : at - (BIAS - 1) * (end - begin));
}

/** The timesteps that a biased choice prefers: begin and, exclusive, end. */
function preferred(settings: ObjectiveSettings, count: number): [number, number] {
  const portion = Math.floor(settings.timestep_bias * count);
  if (settings.timesteps === 'earlier') return [0, portion];
  if (settings.timesteps === 'later') return [count - portion, count];
  return [Math.floor(settings.timestep_range[0] * count), Math.floor(settings.timestep_range[1] * count)];
}

/** A noised batch as inputs of a pass; the network sees its sample in `dtype`. */
export function noisedInputs(
  { shape, sample, timesteps, target, weights, huber_c }: NoisedBatch,
  dtype: FloatDType,
): PassInputs {
  const perImage = (values: Float32Array): HostTensor => ({ shape: [shape[0]], values, dtype: 'float32' });
  return {
    sample: { shape, values: sample, dtype },
    timesteps: perImage(timesteps),
    target: { shape, values: target, dtype: 'float32' },
    ...(weights && { weights: perImage(weights) }),
    ...(huber_c && { huber_c: perImage(huber_c) }),
  };
}

/** The UNet, or the UNet under what controls it. */
export type Network = (sample: Tensor, timesteps: Tensor, conditioning: Conditioning) => Tensor;

/** The weighted mean loss of a batch (noisedInputs, as tensors), [1] float32, on the tape. */
export const diffusionLoss = (
  network: Network,
  { settings }: Objective,
  inputs: Tensors,
  conditioning: Conditioning,
): Tensor =>
  distance(
    settings,
    cast(network(inputs.sample, inputs.timesteps, conditioning), 'float32'),
    inputs.target,
    inputs,
  );

/**
 * How far `given` is from `wanted` [n, ...], of one type, by the loss of a run: its mean over images, [1] float32. Of a pass's inputs
 * `weights` are the images', and `mask` is the root of what each place counts (controls/mask.ts).
 */
export function distance(
  { loss, huber_delta }: Pick<ObjectiveSettings, 'loss' | 'huber_delta'>,
  given: Tensor,
  wanted: Tensor,
  { weights, mask, huber_c: c }: Tensors,
): Tensor {
  if (hasThreshold({ loss })) {
    const each = pseudoHuber(sub(given, wanted), c);
    const factors = loss === 'pseudo_huber' ? scale(c, 2) : scale(c, 0, 2);
    return weighedMean(mask ? mul(each, square(mask)) : each, weights ? mul(factors, weights) : factors);
  }
  const seen = (x: Tensor): Tensor => (mask ? mul(x, mask) : x);
  return loss === 'huber'
    ? huber(given, wanted, weights, huber_delta)
    : mse(seen(given), seen(wanted), weights);
}
