// From prompts to pictures: text to image, image to image, inpainting, and the refiner's share of an ensemble. The
// request decides which: an image makes it image-to-image, a mask inpainting, latents a continuation. The denoising loop
// is a generator, so the caller owns progress. Draws come from torch's CPU generator in diffusers' order.
import type { Device } from '../engine/device.ts';
import { holding } from '../engine/memory.ts';
import { unload } from '../engine/module.ts';
import { built } from '../engine/scope.ts';
import type { FloatDType } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import type { ModelSource } from './checkpoint.ts';
import { parseTextConfig, textEncoder } from './clip.ts';
import { type MicroConditioning, type Prompts, type Size, type TextStack, timeIds } from './conditioning.ts';
import { openDenoiser } from './denoiser.ts';
import { decodeLatents, encodeImage, type Latents, stacked } from './latents.ts';
import { parseSchedulerConfig, type SchedulerConfig } from './samplers/config.ts';
import { createSampler } from './samplers/registry.ts';
import type { Plan, Sampler } from './samplers/sampler.ts';
import { loadTokenizer } from './tokenizer.ts';
import type { TorchGenerator } from './torch_random.ts';
import { parseUNetConfig, type UNet, type UNetConfig, unet } from './unet.ts';
import { parseVaeConfig, type Vae, vae } from './vae.ts';

export interface Pipeline {
  device: Device;
  dtype: FloatDType;
  text: TextStack;
  unet: UNet;
  unetConfig: UNetConfig;
  vae: Vae;
  /** Wants an aesthetic score instead of the target size: the refiner. */
  aesthetic: boolean;
  scheduler: Partial<SchedulerConfig> & { _class_name?: string };
  /** Pixels per latent. */
  ratio: number;
  /** The side that the model was trained at, in pixels. */
  sampleSize: number;
  release(): void;
}

/** Loads every component of a model; `vaeSource` replaces its VAE. The VAE runs in float32: in half precision it overflows. */
export const loadPipeline = (source: ModelSource, options: LoadOptions): Pipeline =>
  built(() => load(source, options));

interface LoadOptions {
  device: Device;
  dtype: FloatDType;
  vaeSource?: ModelSource;
  /** For training: the UNet runs its blocks again in backward instead of keeping their activations. */
  gradientCheckpointing?: boolean;
}

function load(source: ModelSource, options: LoadOptions): Pipeline {
  const { device, dtype, vaeSource = source, gradientCheckpointing } = options;
  const components = ['text_encoder', 'text_encoder_2'].filter((name) => source.has(name));
  if (!components.includes('text_encoder_2'))
    throw new UserError(`${source.path} has no text_encoder_2; is it an SDXL model?`);
  const encoders = components.map((name) => {
    const encoder = textEncoder(parseTextConfig(source.config(name)));
    holding(name, () => source.load(name, encoder, device, dtype));
    return { encoder, tokenizer: loadTokenizer(source.folder(name.replace('text_encoder', 'tokenizer'))) };
  });
  const unetConfig = parseUNetConfig(source.config('unet'));
  const denoiser = unet(unetConfig, { gradientCheckpointing });
  holding('unet', () => source.load('unet', denoiser, device, dtype));
  const coder = vae(parseVaeConfig(vaeSource.config('vae')));
  holding('vae', () => vaeSource.load('vae', coder.module, device, 'float32'));
  const ratio = 2 ** (coder.config.block_out_channels.length - 1);
  return {
    device,
    dtype,
    text: { encoders, forceZeros: source.modelIndex.force_zeros_for_empty_prompt !== false },
    unet: denoiser,
    unetConfig,
    vae: coder,
    aesthetic: source.modelIndex.requires_aesthetics_score === true,
    scheduler: parseSchedulerConfig(source.config('scheduler')),
    ratio,
    sampleSize: ((source.config('unet').sample_size as number | undefined) ?? 128) * ratio,
    release() {
      for (const { encoder } of encoders) unload(encoder);
      unload(denoiser);
      unload(coder.module);
    },
  };
}

export interface Request extends Prompts, MicroConditioning {
  /** Pixels; for image-to-image the picture's own size counts. */
  height: number;
  width: number;
  num_inference_steps: number;
  guidance_scale: number;
  guidance_rescale?: number;
  num_images_per_prompt?: number;
  eta?: number;
  /** One generator for all images, or one each. */
  generators: readonly TorchGenerator[];
  /** Replaces the checkpoint's scheduler or parts of its config. */
  scheduler?: { name?: string; config?: Partial<SchedulerConfig> };
  /** [1, 3, h, w] in [-1, 1]. */
  image?: Latents;
  /** [1, 1, h, w], 1 where to paint anew. */
  mask?: Latents;
  strength?: number;
  /** Latents of a base run that stopped at `denoising_start`. */
  latents?: Latents;
  denoising_start?: number;
  denoising_end?: number;
  vae_tiling?: boolean;
  /** The pipeline denoises nothing after this: text encoders are freed when the prompts are encoded, the UNet at the end. */
  last?: boolean;
}

export interface Progress {
  /** Counted from 1. */
  step: number;
  steps: number;
  timestep: number;
  /** Scaled latents after the step, [n, c, h, w]. */
  latents: Latents;
}

export interface Denoised {
  latents: Latents;
  timeIds: number[][];
  timesteps: Float32Array;
  /** Prompt text past the 77 tokens. */
  truncated: string[];
}

/** The sampler that a request names, over the checkpoint's scheduler config. */
export function samplerFor(
  pipeline: Pick<Pipeline, 'scheduler'>,
  request: Pick<Request, 'scheduler'>,
): Sampler {
  const { _class_name: own = 'EulerDiscreteScheduler', ...config } = pipeline.scheduler;
  return createSampler(request.scheduler?.name ?? own, { ...config, ...request.scheduler?.config });
}

/** Runs the denoising loop, yielding after each call of the UNet; the return value feeds decode(). */
export function* denoise(pipeline: Pipeline, request: Request): Generator<Progress, Denoised> {
  const sampler = samplerFor(pipeline, request);
  const plan = sampler.plan(request.num_inference_steps, planOptions(request));
  const images = request.prompt.length * (request.num_images_per_prompt ?? 1);
  const guided = request.guidance_scale > 1;
  const start = startingLatents(pipeline, request, sampler, plan, images);
  const { shape } = start.latents;
  const size: Size = [shape[2] * pipeline.ratio, shape[3] * pipeline.ratio];
  const ids = timeIds(request, size, {
    aesthetic: pipeline.aesthetic,
    guided,
    images,
    interleaved: request.image === undefined && request.latents === undefined,
  });
  const { predict, truncated, release } = openDenoiser(pipeline, request, shape, ids, guided);
  try {
    const loop = sampler.run(plan, start.latents.data, predict, start.draw);
    let turn = loop.next();
    while (!turn.done) {
      const x = start.afterStep?.(turn.value.x, turn.value.index) ?? turn.value.x;
      const step = turn.value.index - plan.begin + 1;
      yield { step, steps: plan.steps, timestep: turn.value.timestep, latents: { shape, data: x } };
      turn = loop.next(x);
    }
    const timesteps = plan.timesteps.slice(plan.begin, plan.end);
    return { latents: { shape, data: turn.value }, timeIds: ids, timesteps, truncated };
  } finally {
    release();
    if (request.last) {
      unload(pipeline.unet);
      pipeline.device.memory.trim();
    }
  }
}

/** Latents → pictures [n, 3, h, w], about [-1, 1]. */
export const decode = (pipeline: Pipeline, latents: Latents, tiling = false): Latents =>
  decodeLatents(pipeline.vae, latents, pipeline.device, tiling);

function planOptions(request: Request) {
  const strength =
    request.image && request.denoising_start === undefined ? (request.strength ?? 0.3) : undefined;
  return {
    strength,
    denoisingStart: request.denoising_start,
    denoisingEnd: request.denoising_end,
    // Diffusers' pipelines hand every sampler that takes eta a 0, and so overrule TCD's own default of 0.3.
    eta: request.eta ?? 0,
  };
}

interface Start {
  latents: Latents;
  draw: () => Float32Array;
  /** Inpainting puts the known part back, noised to the level of the next step. */
  afterStep?: (x: Float32Array, index: number) => Float32Array;
}

/** Standard normal noise of a batch: one stream, or one per image. */
function drawNoise(generators: readonly TorchGenerator[], count: number): Float32Array {
  if (generators.length === 1) return generators[0].randn(count) as Float32Array;
  const out = new Float32Array(count);
  const each = count / generators.length;
  generators.forEach((generator, i) => {
    out.set(generator.randn(each) as Float32Array, i * each);
  });
  return out;
}

function startingLatents(
  pipeline: Pipeline,
  request: Request,
  sampler: Sampler,
  plan: Plan,
  images: number,
): Start {
  const { generators, image } = request;
  const channels = pipeline.vae.config.latent_channels;
  if (request.latents) {
    const { latents } = request;
    return { latents, draw: () => drawNoise(generators, latents.data.length) };
  }
  if (!image) {
    const shape = [images, channels, request.height / pipeline.ratio, request.width / pipeline.ratio];
    const count = shape.reduce((a, b) => a * b, 1);
    const data = drawNoise(generators, count).map((x) => x * plan.initNoiseSigma);
    return { latents: { shape, data }, draw: () => drawNoise(generators, count) };
  }
  return startingFromImage(pipeline, { ...request, image }, sampler, plan, images);
}

/** Image-to-image and inpainting; the order of draws is diffusers'. */
function startingFromImage(
  pipeline: Pipeline,
  request: Request & { image: Latents },
  sampler: Sampler,
  plan: Plan,
  images: number,
): Start {
  const { generators, image, mask, strength = 0.3, vae_tiling: tiling = false } = request;
  // Of several generators each draws its own image's encoding, but inpainting encodes once, with the first.
  const encoders = mask ? generators.slice(0, 1) : generators;
  const encoded = encoders.map((own) =>
    encodeImage(pipeline.vae, image, pipeline.device, (count) => drawNoise([own], count), tiling),
  );
  const known = stacked(encoded.length === images ? encoded : Array<Latents>(images).fill(encoded[0]));
  const draw = () => drawNoise(generators, known.data.length);
  // Told where to start, diffusers takes the picture for one that has its noise already.
  const noisy = request.denoising_start !== undefined;
  if (!mask) {
    const data = noisy ? known.data : sampler.addNoise(plan, known.data, draw());
    return { latents: { shape: known.shape, data }, draw };
  }
  const noise = draw();
  // Diffusers also encodes the masked picture for a UNet of nine channels; with four only its draw remains.
  drawNoise(encoders, known.data.length / images);
  const pure = () => noise.map((x) => x * plan.initNoiseSigma);
  const noised = () => (strength >= 1 ? pure() : sampler.addNoise(plan, known.data, noise));
  const knownAt = (i: number) => (i < plan.end ? sampler.addNoise(plan, known.data, noise, i) : known.data);
  return {
    latents: { shape: known.shape, data: noisy ? known.data : noised() },
    draw,
    afterStep: keepKnown(mask, known, knownAt),
  };
}

function keepKnown(mask: Latents, { shape }: Latents, knownAt: (index: number) => Float32Array) {
  const [, , h, w] = shape;
  const [, , mh, mw] = mask.shape;
  // Nearest, as torch's interpolate picks them.
  const small = Float32Array.from(
    { length: h * w },
    (_, p) => mask.data[Math.floor((Math.floor(p / w) * mh) / h) * mw + Math.floor(((p % w) * mw) / w)],
  );
  return (x: Float32Array, index: number): Float32Array => {
    const known = knownAt(index + 1);
    return x.map((value, i) => (1 - small[i % (h * w)]) * known[i] + small[i % (h * w)] * value);
  };
}
