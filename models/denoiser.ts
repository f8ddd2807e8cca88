// The UNet as the sampler sees it: a function of scaled latents and the number of a call, under guidance. What is
// the same for all steps of an image is computed once: the encoded prompts, their keys and values, and what the resnets add for
// each call's time. A pass is a step of the device, which a GPU replays from a recording; under DeepCache there are two, the whole one
// and the shallow one. Where prompts change with the calls, all of this is made anew with each change.
import type { Step } from '../engine/capture.ts';
import type { Device } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import { unload } from '../engine/module.ts';
import { update } from '../engine/op.ts';
import { concat, copy, embedding, slice } from '../engine/ops/move.ts';
import { cast } from '../engine/ops/unary.ts';
import { keep, scope } from '../engine/scope.ts';
import { empty, type Tensor, tensor, zeros } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import {
  type AnyControlNet,
  type Control,
  type PlacedControl,
  partsOf,
  residualsOf,
} from './control/multicontrolnet.ts';
import { type Followed, featuresOf, type T2IAdapter } from './control/t2i_adapter.ts';
import { type ImagePrompt, imageTokens } from './ip_adapter/image_prompt.ts';
import type { IPAdapter } from './ip_adapter/ip_adapter.ts';
import { type Encoded, encodePrompts, type Prompts, type TextStack } from './text/conditioning.ts';
import type { Scheduled } from './text/prompt_schedule.ts';
import { type ContextCache, newContextCache } from './unet/context_cache.ts';
import { type Caching, deepCache } from './unet/deepcache.ts';
import { guide, rescaled } from './unet/guidance.ts';
import type { PAG } from './unet/pag.ts';
import type { ImageTokens } from './unet/transformer.ts';
import { type DeepFeature, featuresMade, type UNet } from './unet/unet.ts';
import { channelsFirst, channelsLast, type Latents, toDevice } from './vae/latents.ts';

/** The part of a request that says what to denoise towards, and how strongly. */
export interface GuidanceRequest extends Prompts {
  /** How strongly to leave the unconditional prediction; 1 or less switches guidance off. */
  guidance_scale: number;
  /** The part, 0 to 1, by which the guided prediction is scaled back to the spread of the prompt's; 0 where absent. */
  guidance_rescale?: number;
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
}

export interface Denoiser {
  /** The network's output at latents x [n, c, h, w] and the i-th time, guided. */
  predict(x: Tensor, i: number): Tensor;
  /** Prompt text past the tokens that are read. */
  truncated: string[];
  release(): void;
}

/** As many rows for each part of a guided pass. */
const forParts = (x: Tensor, parts: number): Tensor =>
  parts > 1 ? concat(Array<Tensor>(parts).fill(x), 0) : x;

/** Encodes the prompts, pictures among them, and places and keeps what the steps read. */
function placeInputs(
  { device, dtype, text, unet }: GuidedModel,
  request: GuidanceRequest,
  plan: DenoiserPlan,
  parts: number,
) {
  const { timesteps, shape, ids, guided, embedded, pag, controls, imagePrompts, beside } = plan;
  const [images] = shape;
  const rows = parts * images;
  const copies = request.num_images_per_prompt ?? 1;
  const each = (time: number) => Array<number>(rows).fill(time);
  const encoded = plan.told.prompts.map((prompts) =>
    encodePrompts(text, prompts, { guided, copies, device, dtype }),
  );
  // Rows that are perturbed are of the text, once more.
  const withPerturbed = (t: Tensor) => (pag ? concat([t, slice(t, 0, t.shape[0] - images, images)], 0) : t);
  const byPicture = guided && plan.imageGuidanceScale !== undefined;
  const withPicture = (t: Tensor) => (byPicture ? concat([t, slice(t, 0, 0, images)], 0) : t);
  const placed = beside && toDevice(beside, device, dtype);
  const told = encoded.map(({ context, pooled }) => ({
    context: withPicture(withPerturbed(context)),
    pooled: withPicture(withPerturbed(pooled)),
  }));
  const inputs = {
    timeIds: tensor(ids.flat(), [ids.length, ids[0].length], { device }),
    latents: empty(shape, { device }),
    times: tensor([...timesteps].flatMap(each), [timesteps.length, rows], { device }),
    step: empty([1], { device, dtype: 'int32' }),
    pagScales: tensor([...timesteps].map(pag?.scaleAt ?? (() => 0)), [timesteps.length, 1], { device }),
  };
  const pictures = controls.map(({ image }) => toDevice(image, device, dtype));
  const tokens = imagePrompts
    .flatMap((each) => imageTokens(each, unet, { guided, shape, rows }))
    .map((all): ImageTokens => {
      const entries = [...all].map(
        ([at, [k, v, mask]]) => [at, [withPerturbed(k), withPerturbed(v), mask]] as const,
      );
      return new Map(entries);
    });
  const features = featuresOf(plan.followed, rows, device, dtype);
  // Unconditional is without the picture, too.
  const seen =
    placed &&
    (byPicture
      ? concat([zeros(placed.shape, { device, dtype }), placed, placed], 0)
      : forParts(placed, parts));
  const guidance = embedded === undefined ? undefined : tensor(each(embedded), [rows], { device });
  const others = [seen, guidance].filter((t) => t !== undefined);
  const texts = told.flatMap(({ context, pooled }) => [context, pooled]);
  const more = [...texts, ...pictures, ...(features ?? []), ...others, ...tensorsOf(tokens)];
  const kept = [...Object.values(inputs), ...more].map(keep);
  const truncated = [...new Set(encoded.flatMap((each) => each.truncated))];
  return { ...inputs, told, guidance, pictures, features, seen, tokens, kept, truncated };
}

/** Encodes the prompts, pictures among them, and places what the steps read. The caller releases it. */
export function openDenoiser(model: GuidedModel, request: GuidanceRequest, plan: DenoiserPlan): Denoiser {
  const { device, dtype, text, unet, adapter, ipAdapter } = model;
  const { shape, guided, pag, controls, calls, caching } = plan;
  const [images] = shape;
  const imageGuidanceScale = guided ? plan.imageGuidanceScale : undefined;
  const parts = 1 + Number(guided) + Number(pag !== undefined) + Number(imageGuidanceScale !== undefined);
  const made = noGrad(() => scope(() => placeInputs(model, request, plan, parts)));
  if (request.last) {
    for (const { encoder } of [...text.encoders, ...ipAdapter]) unload(encoder);
    for (const { module } of [...adapter, ...ipAdapter]) unload(module);
    device.memory.trim();
  }
  const { timeIds, guidance, latents, times, step, pagScales } = made;
  const { pictures, features, seen, tokens } = made;
  const perturbed = pag && { layers: pag.layers, rows: images };
  const told = made.told.map((each): Told => ({ ...each, cache: newContextCache() }));
  const placed = controls.map((control, i): PlacedControl => ({ ...control, picture: pictures[i] }));
  const rescale = request.guidance_rescale ?? 0;
  // The layout changes, types are cast and the prediction is guided on the device, in the recording: it would wait for the host.
  const pass = ({ on, within, told: { pooled, ...ofTexts } }: Parts, deep?: DeepFeature): Tensor => {
    const shared = { timeIds, guidance, images: tokens, perturbed };
    const conditioning = { ...shared, ...ofTexts, textEmbeds: pooled };
    const sample = forParts(cast(channelsLast(latents), dtype), parts);
    const question = { sample, times: { times, step }, conditioning, count: featuresMade(deep) };
    const residuals = {
      ...residualsOf(on, question, guided),
      down_intrablock_additional_residuals: within,
    };
    const all = seen ? concat([sample, seen], 3) : sample; // ControlNets see the latents alone
    const said = unet(all, { times, step }, conditioning, residuals, deep);
    const y = cast(channelsFirst(said), 'float32');
    if (parts === 1) return y;
    return guide(y, images, {
      guidanceScale: guided ? request.guidance_scale : undefined,
      imageGuidanceScale,
      pagScale: pag && embedding(step, pagScales),
      withText: guided && rescale > 0,
    });
  };
  const deep = caching.interval > 1 ? deepCache(caching.branch) : undefined;
  const passUnder = (parts: Parts): Pass => {
    // The whole pass and the shallow one take turns.
    const reserve = deep && device.memory.openReserve();
    const [whole, shallow] = [deep?.whole, deep?.shallow].map((each) =>
      device.step(() => noGrad(() => pass(parts, each)), reserve),
    );
    return {
      at: (i) => (i % caching.interval === 0 ? whole : shallow),
      release() {
        for (const each of [whole, shallow]) each.release();
        reserve?.release();
      },
    };
  };
  const partsAt = (i: number): Parts => ({
    on: partsOf(placed, i, calls),
    within: i < plan.followedCalls ? features : undefined,
    told: told[plan.told.at[i]],
  });
  const passes = passesOf(partsAt, passUnder);
  return {
    predict(x, i) {
      update([copy(latents, x)]);
      step.set([i]);
      // The next pass writes where this one's output is.
      return passes
        .at(i)
        .run((y) =>
          guided && rescale > 0
            ? tensor(rescaled(y.floats(), images, rescale), shape, { device })
            : slice(y, 0, 0, images),
        );
    },
    truncated: made.truncated,
    release() {
      passes.release();
      deep?.release();
      for (const { cache } of told) cache.release();
      for (const t of made.kept) t.release();
    },
  };
}

const tensorsOf = (images: readonly ImageTokens[]): Tensor[] =>
  images.flatMap((image) => [...image.values()].flat()).filter((t) => t !== undefined);

/** The step of the i-th call. */
interface Pass {
  at(i: number): Step;
  release(): void;
}

/** Prompts as the network is told them, and what steps share as long as they hold. */
interface Told extends Encoded {
  cache: ContextCache;
}

/** What has a part in a call: ControlNets, what T2I-Adapters have given, and the prompts. */
interface Parts {
  on: readonly PlacedControl[];
  within?: readonly Tensor[];
  told: Told;
}

const isSame = (a: Parts, b: Parts): boolean =>
  a.within === b.within &&
  a.told === b.told &&
  a.on.length === b.on.length &&
  a.on.every(({ picture, scale }, k) => picture === b.on[k].picture && scale === b.on[k].scale);

/** Of each call the step. A recording is of one set of parts, and goes when the set changes: it hardly comes back. */
function passesOf(partsAt: (i: number) => Parts, passUnder: (parts: Parts) => Pass): Pass {
  let parts = partsAt(0);
  let pass = passUnder(parts);
  return {
    at(i) {
      const now = partsAt(i);
      if (!isSame(now, parts)) {
        pass.release();
        if (now.told !== parts.told) parts.told.cache.release();
        parts = now;
        pass = passUnder(parts);
      }
      return pass.at(i);
    },
    release: () => pass.release(),
  };
}
