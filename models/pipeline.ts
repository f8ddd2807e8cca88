// SDXL's pipelines (diffusers' StableDiffusionXL*Pipeline) as one: text to image, image to image, inpainting and refining
// differ in the latents they start from and in what follows a step. Latents stay on the host between steps, in torch's
// NCHW order so that noise is drawn as torch draws it; they are turned to channels last on their way to the device.
import type { Device } from '../engine/device.ts';
import { openDevice } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import { unload } from '../engine/module.ts';
import { scope } from '../engine/scope.ts';
import { type Tensor, tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { type Mask, type Picture, preprocess, preprocessMask, toPictures } from '../io/image.ts';
import type { ModelSource } from './checkpoint.ts';
import { parseTextConfig, textEncoder } from './clip.ts';
import {
  encodePrompt,
  type MicroConditioning,
  type PromptEmbedding,
  type TextTower,
  timeIds,
  zeroEmbedding,
} from './conditioning.ts';
import { guide } from './guidance.ts';
import { keepUnmasked, latentMask } from './inpaint.ts';
import { parseSchedulerConfig, type SchedulerConfig } from './samplers/config.ts';
import { createSampler } from './samplers/registry.ts';
import type { Plan, Sampler } from './samplers/sampler.ts';
import { loadTokenizer } from './tokenizer.ts';
import { TorchGenerator } from './torch_random.ts';
import { newContextCache, parseUNetConfig, type UNetConfig, unet } from './unet.ts';
import { parseVaeConfig, type Vae, vae } from './vae.ts';

/** Latents [n, 4, h, w] on the host. */
export interface Latents {
  data: Float32Array;
  shape: [number, number, number, number];
}

export interface Step {
  /** Steps done, of how many. */
  done: number;
  total: number;
  timestep: number;
  latents: Latents;
}

export interface GenerateOptions extends MicroConditioning {
  prompt: string | readonly string[];
  prompt2?: string | readonly string[];
  negativePrompt?: string | readonly string[];
  negativePrompt2?: string | readonly string[];
  /** Pixels, divisible by 8. Default: the picture's size, else what the model was trained for. */
  width?: number;
  height?: number;
  steps?: number;
  guidanceScale?: number;
  guidanceRescale?: number;
  scheduler?: string;
  /** Overrides of the checkpoint's scheduler config. */
  schedulerConfig?: Partial<SchedulerConfig>;
  eta?: number;
  /** One for all images, or one per image. */
  seed: number | readonly number[];
  imagesPerPrompt?: number;
  clipSkip?: number;
  /** Image to image: a picture, or latents from another run. */
  image?: Picture | Latents;
  /** Inpainting: white is repainted. */
  mask?: Mask;
  strength?: number;
  denoisingStart?: number;
  denoisingEnd?: number;
  vaeTiling?: boolean;
  onStep?: (step: Step) => void;
  onTruncated?: (cutOff: string) => void;
  /** Draws go on from these generators in place of `seed` (a refiner after its base). */
  generators?: readonly TorchGenerator[];
}

export interface Generated {
  latents: Latents;
  /** The rows handed to the UNet, unconditional ones first as far as diffusers orders them so. */
  timeIds: number[][];
  /** All timesteps of the plan, before strength or denoising cut it. */
  timesteps: Float32Array;
  generators: readonly TorchGenerator[];
}

export interface Pipeline {
  readonly device: Device;
  readonly unetConfig: UNetConfig;
  /** The loaded modules, for adapters. */
  readonly modules: { unet: ReturnType<typeof unet>; towers: readonly TextTower[] };
  /** Everything up to the final latents. */
  generate(options: GenerateOptions): Promise<Generated>;
  /** Final latents to pictures. */
  decode(latents: Latents, options?: { tiling?: boolean }): Picture[];
  /** As `decode`, the values in [-1, 1] before they are rounded: [n, 3, h, w]. */
  decodeFloats(latents: Latents, options?: { tiling?: boolean }): Latents;
  unload(): void;
}

export interface PipelineOptions {
  device?: Device | string;
  dtype?: FloatDType;
  /** Takes the VAE from another model. */
  vae?: ModelSource;
}

/** Loads text encoders, UNet and VAE. @throws UserError when the model is incomplete or damaged */
export function createPipeline(source: ModelSource, options: PipelineOptions = {}): Pipeline {
  const device = typeof options.device === 'object' ? options.device : openDevice(options.device ?? 'auto');
  const dtype = options.dtype ?? 'float32';
  const unetConfig = parseUNetConfig(source.config('unet'));
  if (unetConfig.in_channels !== 4)
    throw new UserError(
      `the UNet of ${source.path} takes ${unetConfig.in_channels} channels; give a base or refiner model with 4`,
    );
  const towers = loadTowers(source, device, dtype);
  const model = unet(unetConfig);
  source.load('unet', model, device, dtype);
  const autoencoder = loadVae(options.vae ?? source, device);
  return pipeline(source, { device, dtype, unetConfig, towers, model, autoencoder });
}

function loadTowers(source: ModelSource, device: Device, dtype: FloatDType): TextTower[] {
  const suffixes =
    source.modelIndex.text_encoder !== undefined && source.has('text_encoder') ? ['', '_2'] : ['_2'];
  return suffixes.map((suffix) => {
    const encoder = textEncoder(parseTextConfig(source.config(`text_encoder${suffix}`)));
    source.load(`text_encoder${suffix}`, encoder, device, dtype);
    return { tokenizer: loadTokenizer(source.folder(`tokenizer${suffix}`)), encoder };
  });
}

// SDXL's published VAE overflows in float16 and loses detail in bfloat16; it is small, so it always runs in float32.
function loadVae(source: ModelSource, device: Device): Vae {
  const model = vae(parseVaeConfig(source.config('vae')));
  source.load('vae', model.module, device, 'float32');
  return model;
}

interface Parts {
  device: Device;
  dtype: FloatDType;
  unetConfig: UNetConfig;
  towers: readonly TextTower[];
  model: ReturnType<typeof unet>;
  autoencoder: Vae;
}

function pipeline(source: ModelSource, parts: Parts): Pipeline {
  const { device, autoencoder } = parts;
  const decodeFloats = ({ data, shape }: Latents, { tiling = false } = {}): Latents =>
    noGrad(() =>
      scope(() => {
        const scaled = data.map((value) => value / autoencoder.config.scaling_factor);
        return download(autoencoder.decode(upload({ data: scaled, shape }, device), { tiling }));
      }),
    );
  return {
    device,
    unetConfig: parts.unetConfig,
    modules: { unet: parts.model, towers: parts.towers },
    generate: (options) => generate(source, parts, options),
    decodeFloats,
    decode(latents, options) {
      const { data, shape } = decodeFloats(latents, options);
      return toPictures(data, shape);
    },
    unload() {
      for (const { encoder } of parts.towers) unload(encoder);
      unload(parts.model);
      unload(autoencoder.module);
    },
  };
}

const list = (value: string | readonly string[]): readonly string[] =>
  typeof value === 'string' ? [value] : value;

/** Positive and, under guidance, negative embeddings, one per image. */
function embedPrompts(
  source: ModelSource,
  { towers, device }: Parts,
  options: GenerateOptions,
  guided: boolean,
): { positive: PromptEmbedding[]; negative: PromptEmbedding[] } {
  const prompts = list(options.prompt);
  const { negativePrompt, imagesPerPrompt = 1, clipSkip, onTruncated } = options;
  const at = (value: string | readonly string[], i: number) => list(value)[i] ?? list(value)[0];
  const repeat = (all: PromptEmbedding[]) =>
    all.flatMap((one) => Array.from({ length: imagesPerPrompt }, () => one));
  const positive = prompts.map((prompt, i) => {
    const second = at(options.prompt2 ?? prompt, i) || prompt;
    return encodePrompt(towers, [prompt, second], { device, clipSkip, onTruncated });
  });
  if (!guided) return { positive: repeat(positive), negative: [] };
  const zeros = negativePrompt === undefined && source.modelIndex.force_zeros_for_empty_prompt === true;
  const negative = positive.map((like, i) => {
    if (zeros) return zeroEmbedding(like);
    const text = at(negativePrompt ?? '', i);
    const second = at(options.negativePrompt2 ?? text, i) || text;
    return encodePrompt(towers, [text, second], { device, onTruncated });
  });
  return { positive: repeat(positive), negative: repeat(negative) };
}

async function generate(source: ModelSource, parts: Parts, options: GenerateOptions): Promise<Generated> {
  const count = list(options.prompt).length * (options.imagesPerPrompt ?? 1);
  const { guidanceScale = 5, guidanceRescale } = options;
  const guided = guidanceScale > 1;
  const sampler = samplerOf(source, options);
  const plan = planOf(sampler, options);
  const [height, width] = sizeOf(parts, options);
  const shape: Latents['shape'] = [count, 4, height / 8, width / 8];
  const random = generatorsOf(options);
  const draw = () => drawNoise(random, shape);
  const start = noGrad(() => startLatents(parts, sampler, plan, shape, options, random));
  const { positive, negative } = noGrad(() => embedPrompts(source, parts, options, guided));
  const rows = timeIdRows(source, options, [height, width], count, guided);
  const denoise = denoiser(parts, [...negative, ...positive], rows, shape);
  const guidance = { scale: guidanceScale, rescale: guidanceRescale };
  try {
    const run = sampler.run(
      plan,
      start.latents,
      (x, timestep) => {
        const output = noGrad(() => denoise.run(x, timestep));
        return guided ? guide(output, count, guidance) : output;
      },
      draw,
    );
    let next = run.next();
    while (!next.done) {
      const { index, timestep } = next.value;
      const x = start.restore?.(next.value.x, index) ?? next.value.x;
      options.onStep?.({
        done: index - plan.begin + 1,
        total: plan.steps,
        timestep,
        latents: { data: x, shape },
      });
      await new Promise((resolve) => setImmediate(resolve)); // lets progress be drawn and Ctrl-C be heard
      next = run.next(x);
    }
    const latents = { data: next.value, shape };
    return { latents, timeIds: rows, timesteps: plan.timesteps, generators: random };
  } finally {
    denoise.release();
  }
}

function samplerOf(source: ModelSource, options: GenerateOptions): Sampler {
  const config = parseSchedulerConfig(source.config('scheduler'));
  return createSampler(options.scheduler ?? config._class_name ?? 'EulerDiscreteScheduler', {
    ...config,
    ...options.schedulerConfig,
  });
}

function planOf(sampler: Sampler, options: GenerateOptions): Plan {
  const { steps = 50, denoisingStart, denoisingEnd, eta, image } = options;
  const strength = image ? (options.strength ?? 0.3) : undefined;
  return sampler.plan(steps, { strength, denoisingStart, denoisingEnd, eta });
}

/** Height and width of the pictures. */
function sizeOf({ unetConfig }: Parts, options: GenerateOptions): readonly [number, number] {
  const { image } = options;
  if (image && 'shape' in image) return [8 * image.shape[2], 8 * image.shape[3]];
  const cut = (side: number) => side - (side % 8);
  const trained = 8 * unetConfig.sample_size;
  const height = options.height ?? (image ? cut(image.height) : trained);
  const width = options.width ?? (image ? cut(image.width) : trained);
  for (const [name, side] of Object.entries({ height, width }))
    if (!Number.isInteger(side) || side < 8 || side % 8 !== 0)
      throw new UserError(`the ${name} is ${side}: give a number of pixels divisible by 8`);
  return [height, width];
}

const generatorsOf = ({ generators, seed }: GenerateOptions): readonly TorchGenerator[] =>
  generators ?? [seed].flat().map((one) => new TorchGenerator(one as number));

/** Standard normal numbers: one stream for the batch, or one for each image. */
function drawNoise(random: readonly TorchGenerator[], [n, c, h, w]: Latents['shape']): Float32Array {
  if (random.length === 1) return random[0].randn(n * c * h * w);
  const out = new Float32Array(n * c * h * w);
  for (let i = 0; i < n; i++) out.set(random[i].randn(c * h * w), i * c * h * w);
  return out;
}

interface Start {
  latents: Float32Array;
  /** Inpainting: what the mask keeps, put back after call i. */
  restore?: (x: Float32Array, i: number) => Float32Array;
}

function startLatents(
  parts: Parts,
  sampler: Sampler,
  plan: Plan,
  shape: Latents['shape'],
  options: GenerateOptions,
  random: readonly TorchGenerator[],
): Start {
  const { image, mask, strength = 0.3 } = options;
  const pure = (noise: Float32Array) => noise.map((value) => value * plan.initNoiseSigma);
  if (!image) return { latents: pure(drawNoise(random, shape)) };
  const [, , h, w] = shape;
  const one = 'shape' in image ? image.data : encodePicture(parts, image, [h, w], options, random);
  const original = repeatTo(one, shape[0] * shape[1] * h * w);
  if (options.denoisingStart !== undefined) return { latents: original };
  const noise = drawNoise(random, shape);
  if (!mask) return { latents: sampler.addNoise(plan, original, noise) };
  drawNoise(random, [1, shape[1], h, w]); // diffusers samples the masked picture too, for UNets that take it
  const kept = latentMask(preprocessMask(mask, 8 * w, 8 * h).data, 8 * h, 8 * w);
  return {
    latents: strength === 1 ? pure(noise) : sampler.addNoise(plan, original, noise),
    restore(x, i) {
      const level = i + 1 < plan.end ? sampler.addNoise(plan, original, noise, i + 1) : original;
      return keepUnmasked(x, level, kept);
    },
  };
}

function repeatTo(values: Float32Array, length: number): Float32Array {
  const out = new Float32Array(length);
  for (let i = 0; i < length; i += values.length) out.set(values, i);
  return out;
}

/** A sample of the VAE's distribution for the picture, scaled: [1, 4, h, w]. */
function encodePicture(
  { device, autoencoder }: Parts,
  image: Picture,
  [h, w]: readonly [number, number],
  { vaeTiling: tiling }: GenerateOptions,
  random: readonly TorchGenerator[],
): Float32Array {
  const x = preprocess(image, 8 * w, 8 * h);
  const { mean, logvar } = scope(() => {
    const moments = autoencoder.encode(upload(x, device), { tiling });
    return { mean: download(moments.mean), logvar: download(moments.logvar).data };
  });
  const noise = random[0].randn(mean.data.length);
  const factor = autoencoder.config.scaling_factor;
  return mean.data.map((value, i) => {
    const deviation = Math.fround(Math.exp(0.5 * Math.min(20, Math.max(-30, logvar[i]))));
    return Math.fround(value + Math.fround(deviation * noise[i])) * factor;
  });
}

/** Time ids, a row for each of the UNet's. */
function timeIdRows(
  source: ModelSource,
  options: GenerateOptions,
  size: readonly [number, number],
  count: number,
  guided: boolean,
): number[][] {
  const aesthetic = source.modelIndex.requires_aesthetics_score === true;
  const fromText = options.image === undefined;
  const { positive, negative } = timeIds(options, size, { aesthetic, negativeNeedsBoth: fromText });
  const times = (row: number[]) => Array.from({ length: count }, () => row);
  if (!guided) return times(positive);
  // diffusers' text-to-image repeats the pair and not each half, so with several images the rows alternate.
  return fromText
    ? times(negative).flatMap((row) => [row, positive])
    : [...times(negative), ...times(positive)];
}

/** The UNet over all rows; what does not change from step to step stays on the device until release(). */
function denoiser(
  { device, dtype, model }: Parts,
  embeddings: readonly PromptEmbedding[],
  rows: readonly number[][],
  [, c, h, w]: Latents['shape'],
): { run(x: Float32Array, timestep: number): Float32Array; release(): void } {
  const n = embeddings.length;
  const { tokens, hidden, pooled } = embeddings[0];
  const cache = newContextCache();
  const join = (parts: readonly Float32Array[]) => Float32Array.from(parts.flatMap((part) => [...part]));
  const context = join(embeddings.map((one) => one.hidden));
  const pooledRows = join(embeddings.map((one) => one.pooled));
  const run = (x: Float32Array, timestep: number) =>
    scope(() => {
      const data = repeatTo(x, n * c * h * w);
      const output = model(
        upload({ data, shape: [n, c, h, w] }, device, dtype),
        tensor(new Float32Array(n).fill(timestep), [n], { device }),
        {
          context: tensor(context, [n, tokens, hidden.length / tokens], { device, dtype }),
          textEmbeds: tensor(pooledRows, [n, pooled.length], { device, dtype }),
          timeIds: tensor(rows.flat(), [n, rows[0].length], { device }),
          cache,
        },
      );
      return download(output).data;
    });
  return { run, release: () => cache.release() };
}

type Planes = { data: Float32Array; shape: readonly number[] };

/** [n, c, h, w] on the host to [n, h, w, c] on the device. */
function upload(
  { data, shape: [n, c, h, w] }: Planes,
  device: Device,
  dtype: FloatDType = 'float32',
): Tensor {
  const out = new Float32Array(data.length);
  const area = h * w;
  for (let i = 0; i < n * c; i++) {
    const base = Math.floor(i / c) * c * area + (i % c);
    for (let p = 0; p < area; p++) out[base + p * c] = data[i * area + p];
  }
  return tensor(out, [n, h, w, c], { device, dtype });
}

/** The inverse of `upload`. */
function download(t: Tensor): Latents {
  const [n, h, w, c] = t.shape;
  const values = t.floats();
  const data = new Float32Array(values.length);
  const area = h * w;
  for (let i = 0; i < n * c; i++) {
    const base = Math.floor(i / c) * c * area + (i % c);
    for (let p = 0; p < area; p++) data[i * area + p] = values[base + p * c];
  }
  return { data, shape: [n, c, h, w] };
}
