// From prompts to pictures: text to image, image to image, inpainting, and the refiner's share of an ensemble. The
// request decides which: an image makes it image-to-image, a mask inpainting, denoising_start a continuation. The denoising loop
// is a generator, so the caller owns progress. Draws come from torch's generators in diffusers' order.
import type { Device } from '../engine/device.ts';
import { holding } from '../engine/memory.ts';
import { type AnyModule, type Parameter, unload } from '../engine/module.ts';
import { built, keep, scope } from '../engine/scope.ts';
import type { Tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { inTurns } from '../io/turns.ts';
import type { ModelSource } from './checkpoint/checkpoint.ts';
import { loadAndClose } from './checkpoint/weights.ts';
import { controlsOf } from './control/control_request.ts';
import { loadControlNets } from './control/controlnet_kinds.ts';
import { checkInpainting } from './control/inpainting.ts';
import { checkInstructPix2Pix, imageGuidanceOf } from './control/instruct_pix2pix.ts';
import { followedOf, loadT2IAdapters } from './control/t2i_adapter.ts';
import { type Denoiser, openDenoiser } from './denoiser.ts';
import type { GuidedModel } from './denoiser_inputs.ts';
import { imagePromptsOf } from './ip_adapter/image_prompt.ts';
import { loadIPAdapters } from './ip_adapter/ip_adapter.ts';
import {
  checkChannels,
  checkedLoad,
  checkTexts,
  type LoadOptions,
  type Part,
  textParts,
} from './load_options.ts';
import { type AdapterFile, adapterSetter } from './lora/lora.ts';
import { type Planned, planOf, promptsThrough } from './plan.ts';
import { checkLoaded, checkPrompts } from './prompts.ts';
import { type Asked, complete, type Request } from './request.ts';
import { parseSchedulerConfig } from './samplers/config_checks.ts';
import type { Denoise, Plan, Sampler, StepResult } from './samplers/sampler.ts';
import { type Start, startOf } from './start.ts';
import { parseTextConfig, textEncoder, tokenizerFor } from './text/clip.ts';
import { pictureCount, type Size, timeIds } from './text/conditioning.ts';
import { checkAPG } from './unet/apg.ts';
import { cachingOf } from './unet/deepcache.ts';
import { feedForwardToFp8 } from './unet/fp8.ts';
import { checkComposed } from './unet/guidance.ts';
import { pagOf } from './unet/pag.ts';
import { keepInQ8 } from './unet/q8.ts';
import { parseUNetConfig, trainedSides, type UNetConfig, unet } from './unet/unet.ts';
import { type Autoencoder, autoencoder, pixelsPerLatent, vaeFor } from './vae/autoencoder.ts';
import {
  checkVaeRequest,
  type DecodedPicture,
  decodePictures,
  type Latents,
  type VaeRequest,
} from './vae/latents.ts';

export interface Sizes {
  /** Pixels per latent. */
  ratio: number;
  /** The side that the model was trained at, in pixels: the height where it has two. */
  sampleSize: number;
  /** The width; as the height where absent. */
  sampleWidth?: number;
}

/** A loaded model: what `denoise` and `decode` draw with. It holds the device's memory until `release`. */
export interface Pipeline extends GuidedModel, Planned, Sizes {
  vae: Autoencoder;
  /** Wants an aesthetic score instead of the target size: the refiner. */
  aesthetic: boolean;
  /**
   * Has these adapters in place of the ones that it was loaded with, or that were set last: what either change is read from the model
   * again, a tensor at a time. What mergeLora has merged may be lost.
   * @throws UserError before anything is changed, for an adapter that does not fit; after another error it has to be called again
   */
  setAdapters(files: readonly AdapterFile[]): void;
  release(): void;
}

/** What a model says of sizes before its weights are read. */
export function sizesOf(source: ModelSource, vaeSource: ModelSource = source): Sizes {
  const ratio = pixelsPerLatent(vaeSource.config('vae'));
  const [height, width] = trainedSides(source.config('unet'));
  return { ratio, sampleSize: height * ratio, sampleWidth: width * ratio };
}

/**
 * Loads every component of a model onto a device; `vaeSource` replaces its VAE. Release the pipeline when done.
 * @throws UserError for a model that is incomplete or no SDXL model
 */
export function loadPipeline(source: ModelSource, options: LoadOptions): Pipeline {
  const checked = checkedLoad(source, options);
  return built(() => load(source, checked));
}

function load(source: ModelSource, options: LoadOptions): Pipeline {
  const { device, dtype, vaeSource = source, gradientCheckpointing, q8, fp8, only } = options;
  const { components, textConfigs, unetConfig, aesthetic } = checkedParts(source, options);
  const coder = autoencoder(vaeFor(source, vaeSource));
  const overflows = coder.config.force_upcast && dtype === 'float16';
  const { vaeDtype = overflows ? 'float32' : dtype } = options;
  checkChannels(source.path, unetConfig, coder);
  const sizes = sizesOf(source, vaeSource);
  const fitting = { unet: unetConfig, ratio: sizes.ratio };
  const controlnet = loadControlNets(options.controlnet ?? [], fitting, device, dtype, { q8 });
  const adapter = loadT2IAdapters(options.adapter ?? [], fitting, device, dtype);
  const encoders = components.map((name, i) => ({
    encoder: textEncoder(textConfigs[i]),
    tokenizer: tokenizerFor(source.folder(name.replace('text_encoder', 'tokenizer')), textConfigs[i]),
  }));
  const denoiser = unet(unetConfig, { gradientCheckpointing });
  if (q8) keepInQ8(denoiser);
  const texts = Object.fromEntries(components.map((name, i) => [name, encoders[i].encoder]));
  const ipAdapter = loadIPAdapters(options.ipAdapter ?? [], { unet: denoiser, unetConfig }, device, dtype);
  const merge = adapterSetter({ ...texts, unet: denoiser, unetConfig }, (some) => {
    components.forEach((name, i) => void readPart(source, name, encoders[i].encoder, options, dtype, some));
    readPart(source, 'unet', denoiser, options, dtype, some);
  });
  const setAdapters = (files: readonly AdapterFile[]): void => {
    merge(files);
    if (fp8 && (only ?? ['unet']).includes('unet')) feedForwardToFp8(denoiser);
  };
  setAdapters(options.lora ?? []);
  readPart(vaeSource, 'vae', coder.module, options, vaeDtype);
  return {
    ...{ device, dtype, unet: denoiser, unetConfig, controlnet, adapter, ipAdapter, vae: coder, aesthetic },
    text: { encoders, forceZeros: source.modelIndex.force_zeros_for_empty_prompt !== false },
    scheduler: parseSchedulerConfig(source.config('scheduler')),
    ...sizes,
    setAdapters,
    release() {
      for (const { encoder } of [...encoders, ...ipAdapter]) unload(encoder);
      for (const { module } of [...adapter, ...ipAdapter]) unload(module);
      for (const module of [denoiser, ...controlnet, coder.module]) unload(module);
    },
  };
}

/** What a model's configs say, before any weight is read. @throws UserError for no SDXL model, or one that IP-Adapters are not for */
function checkedParts(source: ModelSource, { ipAdapter }: LoadOptions) {
  const components = textParts(source);
  if (!components.includes('text_encoder_2'))
    throw new UserError(`${source.path} has no text_encoder_2; is it an SDXL model?`);
  const unetConfig = parseUNetConfig(source.config('unet'));
  const textConfigs = components.map((name) => parseTextConfig(source.config(name)));
  const aesthetic = source.modelIndex.requires_aesthetics_score === true;
  checkTexts(source, unetConfig, textConfigs, aesthetic);
  if (aesthetic && ipAdapter?.length)
    throw new UserError(
      `${source.path} is a refiner, for which there are no IP-Adapters; use them with the base`,
    );
  return { components, textConfigs, unetConfig, aesthetic };
}

/** A part's weights, all or `some`, where the part is one that is asked for. */
function readPart(
  from: ModelSource,
  name: Part,
  module: AnyModule,
  { device, only }: LoadOptions,
  dtype: FloatDType,
  some?: ReadonlySet<Parameter>,
): void {
  if (only && !only.includes(name)) return;
  holding(name, () =>
    some
      ? loadAndClose(module, from.weights(name), device, dtype, some)
      : from.load(name, module, device, dtype),
  );
}

/** What `denoise` tells after each call of the UNet. */
export interface Progress {
  /** Counted from 1. */
  step: number;
  steps: number;
  timestep: number;
  /** Scaled latents after the step, [n, c, h, w]. Brought from the device when it is read, before the loop goes on. */
  readonly latents: Latents;
  /** The finished latents as this step's output has them, scaled: what the picture will be. Made when asked for, before the loop goes on. */
  predOriginalSample(): Latents;
  /** Prompt text past the tokens that are read, the same at each step. */
  truncated: readonly string[];
}

/** What comes of a request, for `decode`. */
export interface Denoised {
  /** Scaled, [n, c, h, w]. */
  latents: Latents;
  /** What the UNet was told of sizes, a row for each row of the batch. */
  timeIds: number[][];
  /** Those of the steps that were done. */
  timesteps: Float32Array;
}

/**
 * Whether a step has a pass without the prompt, as several that are drawn together always have; a model that is told its guidance needs
 * none.
 */
export const isGuided = (config: UNetConfig, request: Request): boolean =>
  (request.guidance_scale > 1 || request.prompt_weights !== undefined) &&
  (imageGuidanceOf(config, request) ?? 1) >= 1 &&
  !config.time_cond_proj_dim;

/**
 * Runs the denoising loop, yielding after each call of the UNet; the return value feeds decode().
 * @throws UserError for a request that contradicts itself, or leaves no step to do
 */
export function* denoise(pipeline: Pipeline, asked: Asked): Generator<Progress, Denoised> {
  const request = complete(pipeline, asked);
  checkLoaded(pipeline.unet);
  const planned = planOf(pipeline, request);
  const { sampler, plan } = planned;
  checkPrompts(pipeline, request);
  checkInpainting(pipeline.unetConfig, request);
  checkInstructPix2Pix(pipeline.unetConfig, request);
  checkVaeRequest(request);
  const caching = cachingOf(request, pipeline.unetConfig);
  const pag = pagOf(request, pipeline.unet);
  const images = pictureCount(request) * (request.num_images_per_prompt ?? 1);
  checkCounts(request, images, pipeline.ratio);
  const imageGuidanceScale = imageGuidanceOf(pipeline.unetConfig, request);
  const embedded = pipeline.unetConfig.time_cond_proj_dim ? request.guidance_scale - 1 : undefined;
  const guided = isGuided(pipeline.unetConfig, request);
  checkAPG(request, guided);
  checkComposed(request, guided);
  const texts = request.prompt_weights?.length ?? 1;
  const start = startOf(pipeline, request, sampler, plan, images);
  try {
    const { shape, beside } = start;
    const size: Size = [shape[2] * pipeline.ratio, shape[3] * pipeline.ratio];
    const ids = timeIds(request, size, {
      aesthetic: pipeline.aesthetic,
      ...{ guided, texts },
      perturbed: pag !== undefined || (guided && imageGuidanceScale !== undefined),
      images,
      interleaved: !goesOn(request),
    });
    const timesteps = plan.timesteps.slice(plan.begin, plan.end);
    const denoiser = openDenoiser(pipeline, request, {
      ...{ timesteps, shape, ids, guided, texts, embedded, pag, caching, beside, imageGuidanceScale },
      told: promptsThrough(request, planned),
      controls: controlsOf(pipeline.controlnet, request, size),
      followed: followedOf(pipeline.adapter, request, size),
      followedCalls: Math.trunc(timesteps.length * (request.adapter_conditioning_factor ?? 1)),
      imagePrompts: imagePromptsOf(pipeline, request),
      calls: plan.timesteps.length - plan.begin,
      seamless: request.seamless,
    });
    const latents = yield* steps(pipeline.device, sampler, plan, start, denoiser);
    if (request.last) {
      for (const module of [pipeline.unet, ...pipeline.controlnet]) unload(module);
      pipeline.device.memory.trim(); // decoding takes other sizes, and a GPU may be another program's too
    }
    return { latents, timeIds: ids, timesteps };
  } finally {
    start.release();
  }
}

/** The loop itself: tells of each step when it is done, and gives the last latents. Releases the denoiser. */
function* steps(
  device: Device,
  sampler: Sampler,
  plan: Plan,
  start: Start,
  { predict, truncated, release }: Denoiser,
): Generator<Progress, Latents> {
  const denoiseAt: Denoise = (x, _, i) => predict(x, i - plan.begin);
  const loop = sampler.run(plan, start.begin, denoiseAt, start.draw);
  try {
    let turn = loop.next();
    while (!turn.done) {
      const { x: made, index } = turn.value;
      const x = keep(start.afterStep?.(made, index) ?? made.handle());
      try {
        // A GPU is at the next step while the caller looks at this one.
        const landed = device.driver.mark?.();
        const next = landed && index + 1 < plan.end ? loop.next(x) : undefined;
        landed?.();
        yield* told({ ...turn.value, x }, plan, start.shape, truncated);
        turn = next ?? loop.next(x);
      } finally {
        x.release();
      }
    }
    const last = turn.value;
    try {
      return { shape: start.shape, data: last.floats() };
    } finally {
      last.release();
    }
  } finally {
    loop.return(undefined as never);
    release();
  }
}

/** Tells of one step, whose tensors may be read until the caller goes on. */
function* told(
  { index, timestep, x, predOriginalSample }: StepResult,
  plan: Plan,
  shape: readonly number[],
  truncated: readonly string[],
): Generator<Progress, void> {
  const step = index - plan.begin + 1;
  let past = false;
  const read = (make: () => Tensor): Latents => {
    if (!past) return { shape, data: scope(() => make().floats()) };
    throw new UserError(`step ${step} is past: read what it tells of before the loop goes on, and keep that`);
  };
  try {
    yield {
      ...{ step, steps: plan.steps, timestep, truncated },
      get latents() {
        return read(() => x);
      },
      predOriginalSample: () => read(predOriginalSample),
    };
  } finally {
    past = true;
  }
}

/** @throws UserError where there is no generator to each image, nothing to go on from, or sides are not whole latents */
function checkCounts(request: Request, images: number, ratio: number): void {
  const { generators, width, height, image, latents } = request;
  if (request.denoising_start !== undefined && !image && !latents)
    throw new UserError(
      'denoising_start goes on from what has its noise already, and there is nothing: give latents, or an image',
    );
  if (generators.length !== 1 && generators.length !== images)
    throw new UserError(`${generators.length} generators for ${images} images: give one, or one to each`);
  const isWhole = (side: number) => side >= ratio && side % ratio === 0;
  if (!image && !(isWhole(width) && isWhole(height)))
    throw new UserError(`${width}x${height} pixels are not whole latents: give sides divisible by ${ratio}`);
}

/** denoise() to its end, with turns for others between the steps. `onStep` is waited for, and may leave by throwing. */
export const denoiseToEnd = (
  pipeline: Pipeline,
  asked: Asked,
  onStep?: (progress: Progress) => unknown,
): Promise<Denoised> => inTurns(denoise(pipeline, asked), onStep);

/** Latents → pictures, with whether each is finite; as the request that they are of has its VAE run, which may be given itself. */
export function decode({ vae }: Pipeline, latents: Latents, how: VaeRequest = {}): DecodedPicture[] {
  checkLoaded(vae.module);
  return decodePictures(vae, latents, how);
}

/** Whether it begins at more than noise: diffusers' other pipelines. */
const goesOn = ({ image, denoising_start }: Request): boolean =>
  image !== undefined || denoising_start !== undefined;
