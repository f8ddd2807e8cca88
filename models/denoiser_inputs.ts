// What a denoiser is asked for, and what its passes read: rows of prompts, sizes, times and pictures, placed once and kept for all steps.
// In a guided pass they are [unconditional; text; perturbed], of several texts of one picture [unconditional; text; text; ...], of
// InstructPix2Pix [without both; with both; with the picture], as many of each as there are images; a pass without guidance reads those
// from the text's on.
import type { Seamless } from '../engine/circular.ts';
import type { Device } from '../engine/device.ts';
import { concat, slice } from '../engine/ops/move.ts';
import { keep, tensorsIn } from '../engine/scope.ts';
import { empty, type Tensor, tensor, zeros } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import type { Control } from './control/control_request.ts';
import { type AnyControlNet, isLLLite } from './control/controlnet_kinds.ts';
import { steeringBy } from './control/lllite.ts';
import type { PlacedControl } from './control/multicontrolnet.ts';
import { type Followed, featuresOf, type T2IAdapter } from './control/t2i_adapter.ts';
import { type ImagePrompt, imageTokens } from './ip_adapter/image_prompt.ts';
import type { IPAdapter } from './ip_adapter/ip_adapter.ts';
import { type Encoded, encodePrompts, type Prompts, type TextStack } from './text/conditioning.ts';
import type { Scheduled } from './text/prompt_schedule.ts';
import type { Caching } from './unet/deepcache.ts';
import type { FreeU } from './unet/freeu.ts';
import type { GuidanceInterval, GuidanceNumbers } from './unet/guidance.ts';
import type { PAG } from './unet/pag.ts';
import type { ImageTokens } from './unet/transformer.ts';
import type { UNet, UNetConfig } from './unet/unet.ts';
import { type Latents, toDevice } from './vae/latents.ts';

/** The part of a request that says what to denoise towards, and how strongly. */
export interface GuidanceRequest extends Prompts, GuidanceInterval, GuidanceNumbers {
  /** FreeU's four numbers, as diffusers' enable_freeu takes them; without it where absent. */
  freeu?: FreeU;
  /** 1 where absent. Images of one prompt follow each other in the batch. */
  num_images_per_prompt?: number;
  /** The pipeline denoises nothing after this: text encoders are freed when the prompts are encoded, the UNet at the end. */
  last?: boolean;
}

/** The part of a pipeline that predicts from prompts. */
export interface GuidedModel {
  device: Device;
  dtype: FloatDType;
  text: TextStack;
  unet: UNet;
  unetConfig: UNetConfig;
  /** What controls the UNet, if anything does. */
  controlnet: readonly AnyControlNet[];
  /** T2I-Adapters, which are asked but once. */
  adapter: readonly T2IAdapter[];
  /** What pictures to draw by go through, if any do. */
  ipAdapter: readonly IPAdapter[];
}

/** What a denoiser is for, beside a request. */
export interface DenoiserPlan {
  /** Those of all calls. */
  timesteps: Float32Array;
  /** The latents' [n, c, h, w]. */
  shape: readonly number[];
  /** What each call is told of the request's prompts. */
  told: Scheduled;
  /** The rows of time ids. */
  ids: number[][];
  guided: boolean;
  /** How many texts an image is drawn of together. */
  texts: number;
  /** The guidance w that the UNet is told, where it is. */
  embedded?: number;
  pag?: PAG;
  controls: readonly Control[];
  followed: readonly Followed[];
  /** In how many of the calls, from the first on, what T2I-Adapters give is added. */
  followedCalls: number;
  imagePrompts: readonly ImagePrompt[];
  /** What an inpainting or an InstructPix2Pix model sees beside the latents. */
  beside?: Latents;
  /** Of an InstructPix2Pix model, which has a third part where it is guided, of the picture without the text. */
  imageGuidanceScale?: number;
  /** How many calls the controls' parts are parts of: those that a refiner will do count. */
  calls: number;
  /** In which calls all of the network runs, and how much of it in the others. */
  caching: Caching;
  /** The axes along which what is drawn goes on at its other side. */
  seamless?: Seamless;
}

/** How many predictions a pass makes for each image. */
export const predictionsOf = ({ texts, pag, imageGuidanceScale }: DenoiserPlan, guided: boolean): number =>
  texts + Number(guided) + Number(pag !== undefined) + Number(guided && imageGuidanceScale !== undefined);

/** All rows `times` times, one after the other. */
export const repeatedRows = (x: Tensor, times: number): Tensor =>
  times > 1 ? concat(Array<Tensor>(times).fill(x), 0) : x;

/** What a pass reads of its rows: as many of each part of a guided pass as there are images. */
export interface Rows {
  timeIds: Tensor;
  /** [calls, rows]. */
  times: Tensor;
  guidance?: Tensor;
  /** By text. */
  texts: readonly Encoded[];
  features?: readonly Tensor[];
  seen?: Tensor;
  tokens: readonly ImageTokens[];
}

/** `count` rows of all from the `first` on. */
function someRows(all: Rows, first: number, count: number): Rows {
  const some = (t: Tensor, axis = 0): Tensor => slice(t, axis, first, count);
  return {
    timeIds: some(all.timeIds),
    times: some(all.times, 1),
    texts: all.texts.map(({ context, pooled }) => ({ context: some(context), pooled: some(pooled) })),
    features: all.features?.map((t) => some(t)),
    seen: all.seen && some(all.seen),
    tokens: all.tokens.map((each): ImageTokens => {
      const entries = [...each].map(
        ([at, [k, v, mask]]) => [at, [some(k), some(v), mask && some(mask)]] as const,
      );
      return new Map(entries);
    }),
  };
}

const tensorsOf = ({ timeIds, times, guidance, texts, features = [], seen, tokens }: Rows): Tensor[] => {
  const images = tokens.flatMap((image) => [...image.values()].flat());
  const others = [...texts.flatMap(({ context, pooled }) => [context, pooled]), ...features, ...images];
  return [timeIds, times, guidance, seen, ...others].filter((t) => t !== undefined);
};

export type Inputs = ReturnType<typeof placeInputs>;

/** The rows of a pass that is guided where the plan is, pictures that are prompts encoded among them. */
function allRows(
  { device, dtype, unet }: GuidedModel,
  encoded: readonly Encoded[],
  plan: DenoiserPlan,
): Rows {
  const { timesteps, shape, ids, guided, texts, embedded, pag, imagePrompts, beside } = plan;
  const [images] = shape;
  const predictions = predictionsOf(plan, guided);
  const rows = predictions * images;
  const each = (time: number) => Array<number>(rows).fill(time);
  // Rows that are perturbed are of the text, once more.
  const withPerturbed = (t: Tensor, times = Number(pag !== undefined)) =>
    times ? concat([t, ...Array<Tensor>(times).fill(slice(t, 0, t.shape[0] - images, images))], 0) : t;
  // A picture to draw by is of each text.
  const again = texts - 1 + Number(pag !== undefined);
  const byPicture = guided && plan.imageGuidanceScale !== undefined;
  const withPicture = (t: Tensor) => (byPicture ? concat([t, slice(t, 0, 0, images)], 0) : t);
  const placed = beside && toDevice(beside, device, dtype);
  const tokens = imagePrompts
    .flatMap((each) => imageTokens(each, unet, { guided, shape, rows }))
    .map((all): ImageTokens => {
      const entries = [...all].map(
        ([at, [k, v, mask]]) => [at, [withPerturbed(k, again), withPerturbed(v, again), mask]] as const,
      );
      return new Map(entries);
    });
  // Unconditional is without the picture, too.
  const seen =
    placed &&
    (byPicture
      ? concat([zeros(placed.shape, { device, dtype }), placed, placed], 0)
      : repeatedRows(placed, predictions));
  return {
    timeIds: tensor(ids.flat(), [ids.length, ids[0].length], { device }),
    times: tensor([...timesteps].flatMap(each), [timesteps.length, rows], { device }),
    guidance: embedded === undefined ? undefined : tensor(each(embedded), [rows], { device }),
    texts: encoded.map(({ context, pooled }) => ({
      context: withPicture(withPerturbed(context)),
      pooled: withPicture(withPerturbed(pooled)),
    })),
    features: featuresOf(plan.followed, rows, device, dtype),
    seen,
    tokens,
  };
}

/** Encodes the prompts, pictures among them, and places and keeps what the steps read: where `isCut` its rows without guidance, too. */
export function placeInputs(
  model: GuidedModel,
  request: GuidanceRequest,
  plan: DenoiserPlan,
  isCut: boolean,
) {
  const { device, dtype, text } = model;
  const { timesteps, shape, guided, pag, controls } = plan;
  const [images] = shape;
  const copies = request.num_images_per_prompt ?? 1;
  const encoded = plan.told.prompts.map((prompts) =>
    encodePrompts(text, prompts, { guided, copies, device, dtype }),
  );
  const inputs = {
    latents: empty(shape, { device }),
    step: empty([1], { device, dtype: 'int32' }),
    pagScales: tensor([...timesteps].map(pag?.scaleAt ?? (() => 0)), [timesteps.length, 1], { device }),
  };
  const placed = controls.map((control): PlacedControl => {
    const { net, image, scale } = control;
    const picture = toDevice(image, device, dtype);
    const steering = isLLLite(net) ? steeringBy(net, net(picture), model, scale) : undefined;
    return { ...control, picture, steering };
  });
  const all = allRows(model, encoded, plan);
  // Without guidance the text's rows are left, and the perturbed ones behind them.
  const unguided = isCut ? someRows(all, images, pag ? 2 * images : images) : all;
  const ofControls = placed.flatMap((each) => [...tensorsIn([each.picture, each.steering])]);
  const kept = [...Object.values(inputs), ...ofControls, ...tensorsOf(all), ...tensorsOf(unguided)].map(keep);
  const truncated = [...new Set(encoded.flatMap((each) => each.truncated))];
  return { ...inputs, placed, rows: { guided: all, unguided }, kept, truncated };
}
