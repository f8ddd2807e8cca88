// One prediction of those that a pass makes for a picture: classifier-free guidance (Ho & Salimans 2022), also by a picture (Brooks et al.
// 2023), perturbed-attention guidance (Ahn et al. 2024) and the rescaling of the first (Lin et al. 2023), as diffusers' pipelines have them.
// What goes by sums over an image is left to the host: the rescaling, and the projection of apg.ts.
import { add, mul, sub } from '../../engine/ops/binary.ts';
import { concat, slice } from '../../engine/ops/move.ts';
import { broadcast } from '../../engine/ops/reduce.ts';
import { scale } from '../../engine/ops/unary.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import { type APGRequest, projection } from './apg.ts';

/** In which calls classifier-free guidance holds (Kynkäänniemi et al. 2024); the names are those of diffusers' guiders, behind `guidance_`. */
export interface GuidanceInterval {
  /** The part of the calls before which there is none, 0 to 1; 0 where absent. A call without it has half the rows. */
  guidance_start?: number;
  /** The part from which on there is none; 1 where absent. */
  guidance_stop?: number;
}

/** The first of `calls` that is guided, and the first that is no longer. @throws UserError for a stop before the start */
export function guidedCalls(
  { guidance_start: start = 0, guidance_stop: stop = 1 }: GuidanceInterval,
  calls: number,
): [from: number, to: number] {
  if (start > stop)
    throw new UserError(
      `guidance_start (--guidance-start) is ${start} and guidance_stop (--guidance-stop) ${stop}: give a stop behind the start`,
    );
  return [Math.trunc(start * calls), Math.trunc(stop * calls)];
}

/** The part of a request that says how strongly classifier-free guidance holds. */
export interface GuidanceNumbers extends APGRequest {
  /** How strongly to leave the unconditional prediction; 1 or less switches guidance off. */
  guidance_scale: number;
  /** The part, 0 to 1, by which the guided prediction is scaled back to the spread of the prompt's; 0 where absent. */
  guidance_rescale?: number;
}

/** What of a request goes, or does not, with several texts of one picture. */
interface Composed extends GuidanceInterval, GuidanceNumbers {
  prompt_weights?: readonly number[];
  image_guidance_scale?: number;
  pag_scale?: number;
  guess_mode?: boolean;
  control_balance?: unknown;
}

export interface Guidance {
  /** Of classifier-free guidance; undefined without, and then there are no unconditional rows. */
  guidanceScale?: number;
  /** Of InstructPix2Pix; undefined for other models. Its rows come with classifier-free guidance alone. */
  imageGuidanceScale?: number;
  /** Of perturbed-attention guidance, [1, 1] on the device, as it may change from call to call; undefined without. */
  pagScale?: Tensor;
  /** Of several texts of one picture how much each counts; undefined where there is one. */
  textWeights?: readonly number[];
  /** Puts the text's prediction after the guided one, for rescaled(). */
  withText: boolean;
  /** Puts what the prompt changes, text - uncond, after the guided prediction in place of adding it, and then the text's: for projection(). */
  apart?: boolean;
}

/** @throws UserError for what has one text's prediction in it, where a picture is drawn of several */
export function checkComposed(request: Composed, guided: boolean): void {
  if (!request.prompt_weights) return;
  const together = 'prompts that are drawn together (AND, or prompt_weights)';
  if (!guided)
    throw new UserError(
      `${together} are weighed by guidance, and this UNet's steps have none: give one prompt, or another model`,
    );
  const { guidance_start: start = 0, guidance_stop: stop = 1, control_balance: balance } = request;
  const wanted = {
    ...{ image_guidance_scale: request.image_guidance_scale, pag_scale: request.pag_scale },
    ...{ guidance_rescale: request.guidance_rescale, apg: request.adaptive_projected_guidance },
    ...{ guidance_start: start > 0, guidance_stop: stop < 1, guess_mode: request.guess_mode },
    control_balance: [balance].flat().includes('more_control'),
  };
  const [key] = Object.entries(wanted).find(([, value]) => value) ?? [];
  if (key)
    throw new UserError(
      `${together} do not go with ${key} (--${key.replaceAll('_', '-')}): give one prompt, or leave that out`,
    );
}

/**
 * uncond + s (text - uncond) + pag (text - perturbed) of rows [unconditional; text; perturbed], as many of each as there are images. Where
 * the first or the last are not there the text stands for them. Of InstructPix2Pix uncond + s (text - image) + image guidance (image -
 * uncond), of rows [without the picture; with it and the text; with the picture alone]. Of several texts uncond + s sum(weight (text -
 * uncond)), of rows [unconditional; text; text; ...] (Liu et al. 2022, arXiv:2206.01714, as A1111 has it).
 */
export function guide(
  said: Tensor,
  images: number,
  { guidanceScale, imageGuidanceScale, pagScale, textWeights, withText, apart = false }: Guidance,
): Tensor {
  const part = (i: number) => slice(said, 0, i * images, images);
  const first = part(0);
  if (guidanceScale !== undefined && textWeights)
    return textWeights.reduce(
      (sum, weight, i) => add(sum, scale(sub(part(i + 1), first), weight * guidanceScale)),
      first,
    );
  const text = guidanceScale === undefined ? first : part(1);
  let guided = apart ? first : text;
  if (guidanceScale !== undefined && !apart) {
    const without = imageGuidanceScale === undefined ? first : part(2);
    guided = add(first, scale(sub(text, without), guidanceScale));
    if (imageGuidanceScale !== undefined)
      guided = add(guided, scale(sub(without, first), imageGuidanceScale));
  }
  if (pagScale) {
    const away = sub(text, part(said.shape[0] / images - 1));
    guided = add(guided, mul(away, broadcast(pagScale.reshape(1), 0, away.size).reshape(...away.shape)));
  }
  if (apart) return concat([guided, sub(text, first), text], 0);
  return withText ? concat([guided, text], 0) : guided;
}

/** What is left of guidance for the host to do to what guide() gives in each call of a run: the guided prediction; undefined where all is done. */
export function finishing(
  { guidance_scale, guidance_rescale = 0, adaptive_projected_guidance: apg }: GuidanceNumbers,
  shape: readonly number[],
): ((said: Float32Array) => Float32Array) | undefined {
  if (!apg && guidance_rescale === 0) return undefined;
  const projected = apg ? projection(apg, guidance_scale, shape) : (said: Float32Array) => said;
  return (said) => {
    const both = projected(said);
    if (guidance_rescale === 0) return both.subarray(0, both.length / 2);
    return rescaled(both, shape[0], guidance_rescale);
  };
}

/** Of a guided prediction and the text's behind it the first, scaled toward the spread of the other, image by image (Lin et al. 2023). */
export function rescaled(both: Float32Array, images: number, guidanceRescale: number): Float32Array {
  const half = both.length / 2;
  const [guided, text] = [both.slice(0, half), both.subarray(half)];
  const size = half / images;
  for (let i = 0; i < images; i++) {
    const mine = guided.subarray(i * size, (i + 1) * size);
    const ratio = deviation(text.subarray(i * size, (i + 1) * size)) / deviation(mine);
    const factor = guidanceRescale * ratio + (1 - guidanceRescale);
    for (let j = 0; j < size; j++) mine[j] *= factor;
  }
  return guided;
}

/** Unbiased standard deviation, as torch's std. */
function deviation(values: Float32Array): number {
  let mean = 0;
  for (const x of values) mean += x / values.length;
  let spread = 0;
  for (const x of values) spread += (x - mean) ** 2;
  return Math.sqrt(spread / (values.length - 1));
}
