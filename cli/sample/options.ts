// What the flags of `sdxl sample` (flags.ts) give. What can be known to be wrong with a request is refused here, before any
// weight is read.
import { existsSync } from 'node:fs';
import { extname } from 'node:path';
import type { Seamless } from '../../engine/circular.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { assertWritable, listFolder, readLines } from '../../io/files.ts';
import { hubPath } from '../../io/hub.ts';
import { locateAdapter } from '../../models/lora/lora_file.ts';
import { type SchedulerConfig, takesSchedule } from '../../models/samplers/config.ts';
import { createSampler } from '../../models/samplers/registry.ts';
import { mostChunks, type Size } from '../../models/text/conditioning.ts';
import { type Emphasis, parsePromptAttention } from '../../models/text/emphasis.ts';
import { readTextualInversion } from '../../models/text/textual_inversion.ts';
import { checkVaeRequest } from '../../models/vae/latents.ts';
import { readFor, scaledFile } from '../option_values.ts';
import { type AdapterOptions, checkAdapters } from './adapter_options.ts';
import { type ControlOptions, checkControl } from './control_options.ts';
import { checkGuidance, type GuidanceOptions } from './guidance_options.ts';
import { checkHires, type HiresOptions } from './hires_options.ts';
import { checkIPAdapters, type IPAdapterOptions } from './ip_adapter_options.ts';
import { checkMask, type MaskOptions } from './mask_options.ts';
import type { PreviewOptions } from './preview.ts';
import { loraTagsIn, type Prompt, readPrompts } from './prompt_loras.ts';
import { checkUpscale, type UpscaleOptions } from './upscale_options.ts';

export interface SampleOptions
  extends ControlOptions,
    AdapterOptions,
    GuidanceOptions,
    IPAdapterOptions,
    HiresOptions,
    MaskOptions,
    PreviewOptions,
    UpscaleOptions {
  model?: string;
  from?: string;
  configs?: string;
  variant?: string;
  prompt?: readonly string[];
  promptFile?: string;
  prompt2?: string;
  negativePrompt?: string;
  negativePrompt2?: string;
  style?: readonly string[];
  stylesFile?: string;
  width?: number;
  height?: number;
  seamless?: Seamless;
  steps: number;
  timesteps?: number[];
  sigmas?: number[];
  cacheInterval?: number;
  cacheBranchId?: number;
  scheduler?: string;
  karras?: boolean;
  timestepSpacing?: SchedulerConfig['timestep_spacing'];
  eta?: number;
  etaAncestral?: number;
  seed?: number;
  subseed?: number;
  subseedStrength?: number;
  seedResizeFromW?: number;
  seedResizeFromH?: number;
  rng: 'cpu' | 'cuda';
  numImages: number;
  batchCount: number;
  clipSkip?: number;
  emphasis: Emphasis;
  maxTokenLength?: number;
  originalSize?: Size;
  cropsCoordsTopLeft?: [number, number];
  targetSize?: Size;
  negativeOriginalSize?: Size;
  negativeCropsCoordsTopLeft?: [number, number];
  negativeTargetSize?: Size;
  image?: string;
  strength?: number;
  refiner?: string;
  denoisingEnd?: number;
  denoisingStart?: number;
  refinerGuidanceScale?: number;
  aestheticScore: number;
  negativeAestheticScore: number;
  unet?: string;
  vae?: string;
  vaeDtype: FloatDType | 'auto';
  lora?: string[];
  loraModelDir?: string;
  textualInversion?: string[];
  device: string;
  dtype: FloatDType | 'auto';
  fp8?: boolean;
  q8?: boolean;
  output: string;
  saveLatents?: string;
  json?: boolean;
  quiet?: boolean;
}

/** What a refiner is told where nothing is typed. */
export const usualScores: readonly [aesthetic: number, negative: number] = [6, 2.5];

/** `FILE:SCALE` as typed after --lora. */
export function loraOf(text: string): { file: string; scale: number } {
  const { file, scale = 1 } = scaledFile('--lora', text);
  return { file, scale };
}

/** `FILE:TOKEN` as typed after --textual-inversion. A file's own name may have a colon. */
export function textualInversionOf(text: string): { file: string; token?: string } {
  if (existsSync(text)) return { file: text };
  const [, file, token] = /^(.*?)(?::([^:/\\]*))?$/s.exec(text) as RegExpExecArray;
  return { file, token };
}

/** All prompts as typed, in the order they come. @throws UserError */
export function typedPrompts({ prompt = [], promptFile }: SampleOptions): string[] {
  const lines = promptFile === undefined ? [] : readFor('--prompt-file', () => readLines(promptFile));
  if (promptFile !== undefined && lines.length === 0)
    throw new UserError(`--prompt-file: ${promptFile} has no prompt; write one a line`);
  return [...prompt, ...lines];
}

/** The same as they are read. @throws UserError */
export const promptsOf = (options: SampleOptions): Prompt[] =>
  readPrompts(typedPrompts(options), options.loraModelDir);

/** Warnings of sizes that diffusers' text-to-image pipeline passes over. */
export function checkSizes(options: SampleOptions): string[] {
  const { negativeOriginalSize: original, negativeTargetSize: target, image, refiner } = options;
  const given = [original, options.negativeCropsCoordsTopLeft, target].some((each) => each !== undefined);
  if (!given || (original && target) || image || refiner) return [];
  return [
    "what is told of the negative prompt's picture counts only where --negative-original-size and --negative-target-size are both given, as in diffusers",
  ];
}

/** @throws UserError for scores that nothing is told of; `taken` by the model itself, if it is a refiner */
export function checkScores(
  options: Pick<SampleOptions, 'refiner' | 'aestheticScore' | 'negativeAestheticScore'>,
  taken: boolean,
): void {
  if (taken || options.refiner) return;
  const { aestheticScore, negativeAestheticScore } = options;
  for (const [flag, score, usual] of [
    ['--aesthetic-score', aestheticScore, usualScores[0]],
    ['--negative-aesthetic-score', negativeAestheticScore, usualScores[1]],
  ])
    if (score !== usual)
      throw new UserError(`${flag} is told to a refiner, and there is none: give --refiner, or leave it out`);
}

/** All that is told to the text encoders. */
export function textsOf(options: SampleOptions, prompts: readonly Prompt[]): string[] {
  const { prompt2 = '', negativePrompt = '', negativePrompt2 = '' } = options;
  const { hiresPrompt = '', hiresNegativePrompt = '' } = options;
  const others = [prompt2, negativePrompt, negativePrompt2, hiresPrompt, hiresNegativePrompt];
  return [...prompts.map(({ text }) => text), ...others];
}

/** Warnings of a request's texts. @throws UserError for a weight that is no number, where weights are read */
export function checkTexts(options: SampleOptions, prompts: readonly Prompt[]): string[] {
  const { emphasis } = options;
  const texts = textsOf(options, prompts);
  if (emphasis !== 'none') for (const text of texts) parsePromptAttention(text);
  const said = texts.join('\n').toLowerCase();
  const tags = [...new Set(texts.flatMap(loraTagsIn))];
  const instead =
    options.loraModelDir === undefined
      ? 'leave it out, and give --lora FILE:SCALE, or --lora-model-dir with the folder that has it'
      : 'LoRAs are named in --prompt alone';
  const unsaid = (options.textualInversion ?? [])
    .map(textualInversionOf)
    .map(({ file, token }) => ({ file, ...readTextualInversion(file, token) }))
    .filter(({ token }) => !said.includes(token.toLowerCase()));
  return [
    ...tags.map((tag) => `"${tag}" is read as words of the prompt; ${instead}`),
    ...unsaid.map(
      ({ file, token }) => `no prompt has "${token}", by which --textual-inversion ${file} is called`,
    ),
  ];
}

/** @throws UserError for flags of a variation that say nothing */
function checkVariation({ subseed, subseedStrength, batchCount, ...options }: SampleOptions): void {
  if (subseed !== undefined && subseedStrength === undefined)
    throw new UserError(
      '--subseed needs --subseed-strength: how far to go to its noise, 0 to 1, such as 0.2',
    );
  if (subseedStrength && (subseed ?? 0) > Number.MAX_SAFE_INTEGER - batchCount + 1)
    throw new UserError(`--subseed ${subseed} has no ${batchCount - 1} seeds after it; take a smaller one`);
  if ((options.seedResizeFromW === undefined) !== (options.seedResizeFromH === undefined))
    throw new UserError('--seed-resize-from-w and --seed-resize-from-h are the sides of one size: give both');
}

/** @throws UserError for steps that are laid out in two ways, or in one that the scheduler has not, and guidance that cannot hold */
function checkSteps(options: SampleOptions): void {
  const sampler = options.scheduler ? createSampler(options.scheduler) : undefined;
  if (sampler && options.karras && !takesSchedule(sampler.name, 'karras'))
    throw new UserError(
      `--karras: ${sampler.name} has no Karras sigmas; leave it out, or use dpm++2m or euler`,
    );
  const { use_exponential_sigmas, use_beta_sigmas, sigma_schedule = 'karras' } = sampler?.config ?? {};
  if (options.karras && (use_exponential_sigmas || use_beta_sigmas || sigma_schedule !== 'karras'))
    throw new UserError(
      `--karras and --scheduler ${options.scheduler} lay out the noise levels, each in its way; give one of them`,
    );
  if (options.timesteps && options.sigmas)
    throw new UserError('--timesteps and --sigmas both lay out the steps; give one of them');
  checkGuidance(options);
  if (options.cacheBranchId !== undefined && options.cacheInterval === undefined)
    throw new UserError(
      '--cache-branch-id needs --cache-interval: how many steps there are to one that is done in full, such as 3',
    );
}

/** @throws UserError for what needs a picture or a refiner, and for parts of the way that leave nothing to do */
function checkStart(options: SampleOptions): void {
  if (options.imageGuidanceScale !== undefined && !options.image)
    throw new UserError('--image-guidance-scale needs --image: the picture to keep to');
  if (options.mask && !options.image) throw new UserError('--mask needs --image: the picture to paint in');
  checkMask(options);
  if (options.strength !== undefined && !options.image && !options.refiner)
    throw new UserError('--strength needs --image or --refiner');
  const start = options.denoisingStart !== undefined ? '--denoising-start' : '--denoising-end';
  if (options.strength !== undefined && !options.image && (options.denoisingStart ?? options.denoisingEnd))
    throw new UserError(`--strength and ${start} both say where the refiner begins; give one of them`);
  if (options.refinerGuidanceScale !== undefined && !options.refiner)
    throw new UserError('--refiner-guidance-scale needs --refiner; without one there is --guidance-scale');
  if (options.denoisingStart !== undefined && !options.image && !options.refiner)
    throw new UserError('--denoising-start needs --refiner or --image: something to go on from');
  if (options.denoisingStart === 0 && options.refiner)
    throw new UserError(
      '--denoising-start 0 leaves the base nothing to do; give a part of the way such as 0.8',
    );
  if (options.denoisingEnd === 0)
    throw new UserError('--denoising-end 0 leaves nothing to do; give a part of the way such as 0.8');
}

/** What can be known to be wrong before anything is read. */
export function checkSample(options: SampleOptions): void {
  if (options.prompt === undefined && options.promptFile === undefined)
    throw new UserError('no prompt given; say what to draw with --prompt "a red fox"');
  if (options.maxTokenLength !== undefined) mostChunks(options.maxTokenLength, '--max-token-length');
  checkSteps(options);
  checkStart(options);
  if ((options.seed ?? 0) > Number.MAX_SAFE_INTEGER - options.batchCount + 1)
    throw new UserError(
      `--seed ${options.seed} has no ${options.batchCount - 1} seeds after it; take a smaller one`,
    );
  checkVariation(options);
  checkControl(options);
  checkAdapters(options);
  checkIPAdapters(options);
  checkHires(options);
  checkUpscale(options);
  checkVaeRequest({ vae_tiling: options.vaeTiling, seamless: options.seamless });
  for (const { file } of (options.lora ?? []).map(loraOf)) if (!hubPath(file)) locateAdapter(file);
  const { loraModelDir, saveLatents } = options;
  if (loraModelDir !== undefined) readFor('--lora-model-dir', () => listFolder(loraModelDir));
  for (const { file } of (options.textualInversion ?? []).map(textualInversionOf))
    if (!existsSync(file)) throw new UserError(`--textual-inversion: no file ${file}`);
  if (!/\.png$/i.test(options.output))
    throw new UserError(
      `--output ${options.output}: pictures are written as PNG; give a name that ends in .png`,
    );
  if (saveLatents === undefined) return;
  if (!/^(\.safetensors)?$/i.test(extname(saveLatents)))
    throw new UserError(
      `--save-latents ${saveLatents}: latents are written as safetensors; give a name that ends in .safetensors`,
    );
  readFor('--save-latents', () => assertWritable(saveLatents));
}
