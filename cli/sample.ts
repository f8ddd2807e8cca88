// `sdxl sample`: prompt to PNG. Everything that can be wrong with the request is checked before weights are read, and a
// picture appears under its name only once it is whole.
import { existsSync } from 'node:fs';
import { extname } from 'node:path';
import type { Command } from 'commander';
import { type Device, openDevice } from '../engine/device.ts';
import { encodeNumbers, type FloatDType } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { preprocess, preprocessMask, readMask, readPicture, toPictures, writePng } from '../io/image.ts';
import type { Picture } from '../io/pixels.ts';
import { writeSafetensors } from '../io/safetensors.ts';
import type { ModelSource } from '../models/checkpoint.ts';
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
import { TorchGenerator } from '../models/torch_random.ts';
import { locateModel, locateVae, shippedModel } from './model.ts';
import { number } from './options.ts';
import { applySettings, pictureText } from './picture_settings.ts';
import { progressBar } from './progress.ts';
import { addSampleOptions, checkSample, type SampleOptions } from './sample_options.ts';
import type { Terminal } from './terminal.ts';

export function addSample(program: Command, terminal: Terminal): void {
  const command = program.command('sample').description('draw pictures from a prompt');
  addSampleOptions(command).action(async (options: SampleOptions) => {
    if (options.from) applySettings(command, options.from);
    await sample(command.opts<SampleOptions>(), terminal);
  });
}

async function sample(given: SampleOptions, terminal: Terminal): Promise<void> {
  checkSample(given);
  const { quiet = false, model = shippedModel } = given;
  const options = { ...given, model };
  if (!given.model && !quiet)
    terminal.err('using the emoji model that comes with sdxl (64x64 pixels); name another with --model\n');
  const inputs = await readInputs(options);
  const device = openDevice(options.device, (line) => terminal.err(`warning: ${line}\n`));
  const locate = { terminal, quiet, configs: options.configs };
  const source = await locateModel(model, locate);
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
    const text = pictureText(options, request, seed, samplerFor(base, request).name);
    const files = writeAll(images, result.latents, options, text);
    const seconds = { load: loaded - started, sample: sampled - loaded, decode: Date.now() - sampled };
    report(options, terminal, files, seed, request, dtype, device, seconds);
  } finally {
    base.release();
  }
}

interface Inputs {
  image?: Picture;
  mask?: Latents;
}

async function readInputs(options: SampleOptions): Promise<Inputs> {
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
  return device.name !== 'reference' && channels[0] >= 256 ? 'bfloat16' : 'float32';
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

function makeRequest(
  options: SampleOptions,
  pipeline: Pipeline,
  { image, mask }: Inputs,
  seed: number,
): Request {
  const floored = (pixels: number | undefined) =>
    pixels === undefined ? undefined : pixels - (pixels % pipeline.ratio);
  const width = options.width ?? floored(image?.width) ?? pipeline.sampleSize;
  const height = options.height ?? floored(image?.height) ?? pipeline.sampleSize;
  const config: Partial<SchedulerConfig> = {};
  if (options.karras) config.use_karras_sigmas = true;
  if (options.timestepSpacing) config.timestep_spacing = options.timestepSpacing;
  return {
    prompt: [options.prompt as string],
    prompt_2: options.prompt2 === undefined ? undefined : [options.prompt2],
    negative_prompt: options.negativePrompt === undefined ? undefined : [options.negativePrompt],
    negative_prompt_2: options.negativePrompt2 === undefined ? undefined : [options.negativePrompt2],
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
    last: true,
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
  options: SampleOptions,
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
  options: SampleOptions,
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

function writeAll(
  images: Latents,
  latents: Latents,
  options: SampleOptions,
  text: Record<string, string>,
): string[] {
  const pictures = toPictures(images.data, images.shape);
  const extension = extname(options.output);
  const stem = options.output.slice(0, options.output.length - extension.length);
  const files = pictures.map((picture, i) => {
    const file = pictures.length === 1 ? options.output : `${stem}-${i}${extension}`;
    writePng(file, picture, text);
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
  options: SampleOptions,
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
    terminal.out(
      `${JSON.stringify({ ...result, peak_bytes: device.memory.peak, peak_process_bytes: process.resourceUsage().maxRSS * 1024 })}\n`,
    );
  } else if (!options.quiet) {
    terminal.err(
      `${files.join(', ')} in ${((milliseconds.load + milliseconds.sample + milliseconds.decode) / 1000).toFixed(1)} s\n`,
    );
  }
}
