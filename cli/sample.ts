// `sdxl sample`: prompt to PNG. Everything that can be wrong with the request is checked before weights are read, and a
// picture appears under its name only once it is whole.
import { existsSync } from 'node:fs';
import { extname } from 'node:path';
import type { Command } from 'commander';
import { type Device, openDevice } from '../engine/device.ts';
import { encodeNumbers, type FloatDType } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { assertWritable } from '../io/files.ts';
import {
  type Picture,
  preprocess,
  preprocessMask,
  readMask,
  readPicture,
  toPictures,
  writePng,
} from '../io/image.ts';
import { writeSafetensors } from '../io/safetensors.ts';
import type { ModelSource } from '../models/checkpoint.ts';
import type { Size } from '../models/conditioning.ts';
import type { Latents } from '../models/latents.ts';
import { mergeLora } from '../models/lora.ts';
import {
  type Denoised,
  decode,
  denoise,
  loadPipeline,
  type Pipeline,
  type Request,
  samplerFor,
} from '../models/pipeline.ts';
import type { SchedulerConfig } from '../models/samplers/config.ts';
import { createSampler } from '../models/samplers/registry.ts';
import { TorchGenerator } from '../models/torch_random.ts';
import { version } from './about.ts';
import type { Terminal } from './main.ts';
import { locateModel, locateVae } from './model.ts';
import { corner, number, side, size } from './options.ts';
import { progressBar } from './progress.ts';

interface Options {
  model?: string;
  configs?: string;
  prompt: string;
  prompt_2?: string;
  negativePrompt?: string;
  negativePrompt_2?: string;
  width?: number;
  height?: number;
  steps: number;
  guidanceScale: number;
  guidanceRescale: number;
  scheduler?: string;
  karras?: boolean;
  timestepSpacing?: SchedulerConfig['timestep_spacing'];
  eta?: number;
  seed?: number;
  numImages: number;
  clipSkip?: number;
  originalSize?: Size;
  cropsCoordsTopLeft?: [number, number];
  targetSize?: Size;
  negativeOriginalSize?: Size;
  negativeCropsCoordsTopLeft?: [number, number];
  negativeTargetSize?: Size;
  image?: string;
  mask?: string;
  strength?: number;
  refiner?: string;
  denoisingEnd?: number;
  denoisingStart?: number;
  refinerGuidanceScale?: number;
  aestheticScore: number;
  negativeAestheticScore: number;
  vae?: string;
  vaeTiling?: boolean;
  lora: string[];
  device: string;
  dtype: string;
  output: string;
  saveLatents?: string;
  json?: boolean;
  quiet?: boolean;
}

const examples = `
Examples:
  sdxl sample --model ./sdxl-base --prompt "yoda pokemon" --seed 1
  sdxl sample --model stabilityai/stable-diffusion-xl-base-1.0 --vae madebyollin/sdxl-vae-fp16-fix --prompt "a red fox"
  sdxl sample --model ./base --refiner ./refiner --denoising-end 0.8 --prompt "a castle on a hill"
  sdxl sample --model ./base --image photo.png --mask mask.png --strength 0.75 --prompt "a wooden door"

The same seed gives the picture that diffusers gives with a CPU generator.`;

export function addSample(program: Command, terminal: Terminal): void {
  const fraction = (flag: string) => number(flag, { min: 0, max: 1 });
  program
    .command('sample')
    .description('draw pictures from a prompt')
    .option('--model <DIR|FILE|HUB_ID>', 'diffusers folder, original .safetensors file, or Hugging Face id')
    .option('--configs <DIR>', 'diffusers folder that lends configs and tokenizers to a single-file model')
    .requiredOption('--prompt <TEXT>', 'what to draw')
    .option('--prompt-2 <TEXT>', 'prompt for the second text encoder (default: the prompt)')
    .option('--negative-prompt <TEXT>', 'what not to draw')
    .option('--negative-prompt-2 <TEXT>', 'the same for the second text encoder')
    .option('--width <N>', "pixels, divisible by 8 (default: the model's size)", side('--width'))
    .option('--height <N>', "pixels, divisible by 8 (default: the model's size)", side('--height'))
    .option('--steps <N>', 'num_inference_steps', number('--steps', { min: 1, max: 1000, whole: true }), 50)
    .option(
      '--guidance-scale <F>',
      '1 or less switches guidance off',
      number('--guidance-scale', { min: 0 }),
      5,
    )
    .option('--guidance-rescale <F>', 'against overexposure, 0 to 1', fraction('--guidance-rescale'), 0)
    .option(
      '--scheduler <NAME>',
      "diffusers class or short name, e.g. euler_a, dpm++2m (default: the model's)",
    )
    .option('--karras', 'use_karras_sigmas')
    .option('--timestep-spacing <NAME>', 'leading, trailing or linspace')
    .option('--eta <F>', 'noise of DDIM, 0 to 1', fraction('--eta'))
    .option(
      '--seed <N>',
      'default: random, and printed',
      number('--seed', { min: 0, max: Number.MAX_SAFE_INTEGER, whole: true }),
    )
    .option(
      '--num-images <N>',
      'pictures from one seed',
      number('--num-images', { min: 1, max: 64, whole: true }),
      1,
    )
    .option('--clip-skip <N>', 'layers to skip from the end', number('--clip-skip', { min: 0, whole: true }))
    .option('--original-size <WxH>', 'micro-conditioning', size('--original-size'))
    .option('--crops-coords-top-left <TOP,LEFT>', 'micro-conditioning', corner('--crops-coords-top-left'))
    .option('--target-size <WxH>', 'micro-conditioning', size('--target-size'))
    .option('--negative-original-size <WxH>', 'micro-conditioning', size('--negative-original-size'))
    .option(
      '--negative-crops-coords-top-left <TOP,LEFT>',
      'micro-conditioning',
      corner('--negative-crops-coords-top-left'),
    )
    .option('--negative-target-size <WxH>', 'micro-conditioning', size('--negative-target-size'))
    .option('--image <FILE>', 'start from this picture')
    .option('--mask <FILE>', 'paint anew where this is white (needs --image)')
    .option('--strength <F>', 'how far to leave the picture, 0 to 1 (default: 0.3)', fraction('--strength'))
    .option('--refiner <DIR|FILE|HUB_ID>', 'a refiner to finish with')
    .option(
      '--denoising-end <F>',
      'where the base stops and hands over its latents',
      fraction('--denoising-end'),
    )
    .option(
      '--denoising-start <F>',
      'where the refiner starts (default: --denoising-end)',
      fraction('--denoising-start'),
    )
    .option(
      '--refiner-guidance-scale <F>',
      'default: --guidance-scale',
      number('--refiner-guidance-scale', { min: 0 }),
    )
    .option('--aesthetic-score <F>', 'told to the refiner', number('--aesthetic-score'), 6)
    .option(
      '--negative-aesthetic-score <F>',
      'told to the refiner',
      number('--negative-aesthetic-score'),
      2.5,
    )
    .option('--vae <DIR|HUB_ID>', 'another VAE than the model has')
    .option('--vae-tiling', 'decode in tiles, for large pictures')
    .option(
      '--lora <FILE[:SCALE]>',
      'an adapter; may be given more than once',
      (text, all: string[]) => [...all, text],
      [],
    )
    .option('--device <NAME>', 'auto, cpu or reference', 'auto')
    .option(
      '--dtype <NAME>',
      'auto, float32, bfloat16 or float16; auto is bfloat16 for the full-size model on cpu',
      'auto',
    )
    .option('--output <FILE>', 'PNG to write; several pictures are numbered', 'out.png')
    .option('--save-latents <FILE>', 'also write the final latents as .safetensors')
    .option('--json', 'one JSON object on stdout')
    .option('--quiet', 'no progress')
    .addHelpText('after', examples)
    .action((options: Options) => sample(renamed(options), terminal));
}

/** Commander spells `--prompt-2` as prompt-2 → prompt2; the request says prompt_2. */
function renamed(options: Options): Options {
  const raw = options as unknown as { prompt2?: string; negativePrompt2?: string };
  return { ...options, prompt_2: raw.prompt2, negativePrompt_2: raw.negativePrompt2 };
}

async function sample(options: Options, terminal: Terminal): Promise<void> {
  const { quiet = false } = options;
  check(options);
  const inputs = await readInputs(options);
  const device = openDevice(options.device, (line) => terminal.err(`warning: ${line}\n`));
  const locate = { terminal, quiet, configs: options.configs };
  const source = await locateModel(options.model as string, locate);
  const refinerSource = options.refiner ? await locateModel(options.refiner, locate) : undefined;
  const vaeSource = options.vae ? await locateVae(options.vae, locate) : undefined;
  const dtype = chooseDtype(options.dtype, source, device);
  const seed = options.seed ?? Math.floor(Math.random() * 2 ** 32);
  const started = Date.now();
  const load = (from: ModelSource) => loadPipeline(from, { device, dtype, vaeSource });
  const base = load(source);
  try {
    addLoras(base, options.lora);
    const request = makeRequest(options, base, inputs, seed);
    if (!quiet)
      terminal.err(`seed ${seed}, ${request.width}x${request.height}, ${dtype} on ${device.name}\n`);
    const loaded = Date.now();
    let result = await run(base, request, 'sampling', options, terminal);
    let last = base;
    if (refinerSource) {
      last = load(refinerSource);
      result = await refine(last, base, request, result, options, terminal);
    }
    const sampled = Date.now();
    const images = decode(last, result.latents, options.vaeTiling);
    if (last !== base) last.release();
    const parameters = describe(options, request, seed, samplerFor(base, request).name);
    const files = writeAll(images, result.latents, options, parameters);
    const seconds = { load: loaded - started, sample: sampled - loaded, decode: Date.now() - sampled };
    report(options, terminal, files, seed, request, dtype, device, seconds);
  } finally {
    base.release();
  }
}

/** What can be known to be wrong before anything is read. */
function check(options: Options): void {
  if (!options.model)
    throw new UserError(
      'no model given; name one with --model, such as --model stabilityai/stable-diffusion-xl-base-1.0',
    );
  if (options.scheduler) createSampler(options.scheduler);
  if (options.timestepSpacing && !['leading', 'trailing', 'linspace'].includes(options.timestepSpacing)) {
    throw new UserError(
      `--timestep-spacing takes leading, trailing or linspace, not "${options.timestepSpacing}"`,
    );
  }
  if (!['auto', 'float32', 'bfloat16', 'float16'].includes(options.dtype)) {
    throw new UserError(`--dtype takes auto, float32, bfloat16 or float16, not "${options.dtype}"`);
  }
  if (options.mask && !options.image) throw new UserError('--mask needs --image: the picture to paint in');
  if (options.strength !== undefined && !options.image && !options.refiner)
    throw new UserError('--strength needs --image or --refiner');
  if (options.denoisingEnd !== undefined && !options.refiner && options.denoisingEnd === 0) {
    throw new UserError('--denoising-end 0 leaves nothing to do; give a part of the way such as 0.8');
  }
  for (const file of [options.output, options.saveLatents]) if (file) assertWritable(file);
}

interface Inputs {
  image?: Picture;
  mask?: Latents;
}

async function readInputs(options: Options): Promise<Inputs> {
  if (!options.image) return {};
  const image = await readPicture(options.image);
  if (!options.mask) return { image };
  const mask = await readMask(options.mask);
  if (mask.width !== image.width || mask.height !== image.height) {
    throw new UserError(
      `${options.mask} is ${mask.width}x${mask.height} and ${options.image} is ${image.width}x${image.height}; make them the same size`,
    );
  }
  return { image, mask: preprocessMask(mask, options.width, options.height) };
}

/** The full-size model does not fit a small machine in float32, and the tests' models are too small to gain. */
function chooseDtype(asked: string, source: ModelSource, device: Device): FloatDType {
  if (asked !== 'auto') return asked as FloatDType;
  const channels = source.config('unet').block_out_channels as number[];
  return device.name === 'cpu' && channels[0] >= 256 ? 'bfloat16' : 'float32';
}

function addLoras(pipeline: Pipeline, adapters: readonly string[]): void {
  const { encoders } = pipeline.text;
  const [first, second] = encoders.length === 2 ? encoders : [undefined, encoders[0]];
  for (const text of adapters) {
    const [, file, scale] = /^(.*?)(?::(-?[\d.]+))?$/.exec(text) as RegExpExecArray;
    if (!existsSync(file)) throw new UserError(`--lora: no file ${file}`);
    mergeLora(
      {
        unet: pipeline.unet,
        unetConfig: pipeline.unetConfig,
        text_encoder: first?.encoder,
        text_encoder_2: second.encoder,
      },
      file,
      scale === undefined ? 1 : number('--lora FILE:SCALE')(scale),
    );
  }
}

function makeRequest(options: Options, pipeline: Pipeline, { image, mask }: Inputs, seed: number): Request {
  const floored = (pixels: number | undefined) =>
    pixels === undefined ? undefined : pixels - (pixels % pipeline.ratio);
  const width = options.width ?? floored(image?.width) ?? pipeline.sampleSize;
  const height = options.height ?? floored(image?.height) ?? pipeline.sampleSize;
  const config: Partial<SchedulerConfig> = {};
  if (options.karras) config.use_karras_sigmas = true;
  if (options.timestepSpacing) config.timestep_spacing = options.timestepSpacing;
  return {
    prompt: [options.prompt],
    prompt_2: options.prompt_2 === undefined ? undefined : [options.prompt_2],
    negative_prompt: options.negativePrompt === undefined ? undefined : [options.negativePrompt],
    negative_prompt_2: options.negativePrompt_2 === undefined ? undefined : [options.negativePrompt_2],
    clip_skip: options.clipSkip,
    width,
    height,
    num_inference_steps: options.steps,
    guidance_scale: options.guidanceScale,
    guidance_rescale: options.guidanceRescale,
    num_images_per_prompt: options.numImages,
    eta: options.eta,
    generators: [new TorchGenerator(seed)],
    scheduler: { name: options.scheduler, config },
    image: image && preprocess(image, width, height),
    mask,
    strength: options.strength,
    denoising_end: options.denoisingEnd,
    denoising_start: options.refiner ? undefined : options.denoisingStart,
    vae_tiling: options.vaeTiling,
    original_size: options.originalSize,
    crops_coords_top_left: options.cropsCoordsTopLeft,
    target_size: options.targetSize,
    negative_original_size: options.negativeOriginalSize,
    negative_crops_coords_top_left: options.negativeCropsCoordsTopLeft,
    negative_target_size: options.negativeTargetSize,
    aesthetic_score: options.aestheticScore,
    negative_aesthetic_score: options.negativeAestheticScore,
  };
}

/** Drives the loop, giving signals a chance between steps. */
async function run(
  pipeline: Pipeline,
  request: Request,
  label: string,
  options: Options,
  terminal: Terminal,
): Promise<Denoised> {
  const bar = progressBar(terminal, label, options.quiet ?? false);
  const loop = denoise(pipeline, request);
  for (;;) {
    const turn = loop.next();
    if (turn.done) {
      bar.end();
      for (const text of turn.value.truncated) {
        terminal.err(`warning: the prompt is longer than 77 tokens; this part was cut off: "${text}"\n`);
      }
      return turn.value;
    }
    bar.update(turn.value.step, turn.value.steps);
    await new Promise((resolve) => setImmediate(resolve));
  }
}

/** The refiner goes on from the base's latents, or works over the finished picture when the base went all the way. */
function refine(
  refiner: Pipeline,
  base: Pipeline,
  request: Request,
  { latents }: Denoised,
  options: Options,
  terminal: Terminal,
): Promise<Denoised> {
  const handover = options.denoisingStart ?? options.denoisingEnd;
  const shared: Request = {
    ...request,
    guidance_scale: options.refinerGuidanceScale ?? options.guidanceScale,
    scheduler: undefined,
    mask: undefined,
    image: undefined,
    denoising_end: undefined,
    denoising_start: handover,
  };
  if (handover !== undefined) return run(refiner, { ...shared, latents }, 'refining', options, terminal);
  if (options.numImages > 1)
    throw new UserError(
      'the refiner works over one finished picture at a time; give --denoising-end or --num-images 1',
    );
  return run(
    refiner,
    { ...shared, image: decode(base, latents, options.vaeTiling) },
    'refining',
    options,
    terminal,
  );
}

/** Automatic1111's `parameters` text, which picture sites and other programs read. */
function describe(options: Options, request: Request, seed: number, sampler: string): string {
  const negative = options.negativePrompt ? `\nNegative prompt: ${options.negativePrompt}` : '';
  const fields = [
    `Steps: ${request.num_inference_steps}`,
    `Sampler: ${sampler}`,
    `CFG scale: ${request.guidance_scale}`,
    `Seed: ${seed}`,
    `Size: ${request.width}x${request.height}`,
    `Version: sdxl ${version}`,
  ];
  return `${options.prompt}${negative}\n${fields.join(', ')}`;
}

function writeAll(images: Latents, latents: Latents, options: Options, parameters: string): string[] {
  const pictures = toPictures(images.data, images.shape);
  const extension = extname(options.output);
  const stem = options.output.slice(0, options.output.length - extension.length);
  const files = pictures.map((picture, i) => {
    const file = pictures.length === 1 ? options.output : `${stem}-${i}${extension}`;
    writePng(file, picture, { parameters });
    return file;
  });
  if (options.saveLatents) {
    const bytes = encodeNumbers(latents.data, 'float32');
    writeSafetensors(options.saveLatents, [
      { name: 'latents', dtype: 'float32', shape: latents.shape, bytes },
    ]);
  }
  return files;
}

function report(
  options: Options,
  terminal: Terminal,
  files: readonly string[],
  seed: number,
  request: Request,
  dtype: FloatDType,
  device: Device,
  milliseconds: Record<string, number>,
): void {
  const { width, height } = request;
  const seconds = Object.fromEntries(Object.entries(milliseconds).map(([name, ms]) => [name, ms / 1000]));
  if (options.json) {
    const result = {
      files,
      seed,
      width,
      height,
      steps: request.num_inference_steps,
      model: options.model,
      dtype,
      device: device.name,
      seconds,
    };
    terminal.out(`${JSON.stringify({ ...result, peak_bytes: device.memory.peak })}\n`);
  } else if (!options.quiet) {
    terminal.err(
      `${files.join(', ')} in ${((milliseconds.load + milliseconds.sample + milliseconds.decode) / 1000).toFixed(1)} s\n`,
    );
  }
}
