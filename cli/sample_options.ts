// The flags of `sdxl sample`: diffusers' words, and beside them the names that users of stable-diffusion.cpp and of A1111
// type. What can be known to be wrong with a request is refused here, before any weight is read.
import type { Command } from 'commander';
import { UserError } from '../io/errors.ts';
import { assertWritable } from '../io/files.ts';
import type { Size } from '../models/conditioning.ts';
import type { SchedulerConfig } from '../models/samplers/config.ts';
import { createSampler } from '../models/samplers/registry.ts';
import { corner, devices, number, side, size } from './options.ts';

export interface SampleOptions {
  model?: string;
  from?: string;
  configs?: string;
  prompt?: string;
  prompt2?: string;
  negativePrompt?: string;
  negativePrompt2?: string;
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
  sdxl sample --prompt "red heart"
  sdxl sample --model ./sdxl-base --prompt "yoda pokemon" --seed 1
  sdxl sample --model stabilityai/stable-diffusion-xl-base-1.0 --vae madebyollin/sdxl-vae-fp16-fix --prompt "a red fox"
  sdxl sample --model ./base --refiner ./refiner --denoising-end 0.8 --prompt "a castle on a hill"
  sdxl sample --model ./base --image photo.png --mask mask.png --strength 0.75 --prompt "a wooden door"

The same seed gives the picture that diffusers gives with a CPU generator.`;

/** Other programs' words for our flags. */
const aliases: Readonly<Record<string, string>> = {
  '--cfg-scale': '--guidance-scale',
  '--sampling-method': '--scheduler',
  '--sampler': '--scheduler',
  '--batch-count': '--num-images',
  '--init-img': '--image',
  '--num-inference-steps': '--steps',
};

/** The command line with other programs' flags (`--flag value` and `--flag=value`) put into ours. */
export const spelledOut = (argv: readonly string[]): string[] =>
  argv.map((word) => {
    const [flag, ...rest] = word.split('=');
    return Object.hasOwn(aliases, flag) ? [aliases[flag], ...rest].join('=') : word;
  });

/** Declares every flag on `command`; values are read and bounded here, before anything is loaded. */
export function addSampleOptions(command: Command): Command {
  const fraction = (flag: string) => number(flag, { min: 0, max: 1 });
  return command
    .option(
      '-m, --model <DIR|FILE|HUB_ID>',
      'diffusers folder, original .safetensors file, or Hugging Face id (default: a small emoji model)',
    )
    .option('--configs <DIR>', 'diffusers folder that lends configs and tokenizers to a single-file model')
    .option('-p, --prompt <TEXT>', 'what to draw')
    .option('--prompt-2 <TEXT>', 'prompt for the second text encoder (default: the prompt)')
    .option('-n, --negative-prompt <TEXT>', 'what not to draw')
    .option('--negative-prompt-2 <TEXT>', 'the same for the second text encoder')
    .option('-W, --width <N>', "pixels, divisible by 8 (default: the model's size)", side('--width'))
    .option('-H, --height <N>', "pixels, divisible by 8 (default: the model's size)", side('--height'))
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
      '-s, --seed <N>',
      'default: random, and printed',
      number('--seed', { min: 0, max: Number.MAX_SAFE_INTEGER, whole: true }),
    )
    .option(
      '-b, --num-images <N>',
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
    .option('-i, --image <FILE>', 'start from this picture')
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
    .option('--vae <DIR|FILE|HUB_ID>', 'another VAE than the model has')
    .option('--vae-tiling', 'decode in tiles, for large pictures')
    .option(
      '--lora <FILE[:SCALE]>',
      'an adapter; may be given more than once',
      (text, all: string[]) => [...all, text],
      [],
    )
    .option('--device <NAME>', devices, 'auto')
    .option(
      '--dtype <NAME>',
      'auto, float32, bfloat16 or float16; auto is bfloat16 for the full-size model on cpu',
      'auto',
    )
    .option(
      '--from <FILE.png>',
      'take the settings that a picture of ours (or of A1111) carries; flags go before them',
    )
    .option('-o, --output <FILE>', 'PNG to write; several pictures are numbered', 'out.png')
    .option('--save-latents <FILE>', 'also write the final latents as .safetensors')
    .option('--json', 'one JSON object on stdout')
    .option('--quiet', 'no progress')
    .addHelpText('after', examples);
}

/** What can be known to be wrong before anything is read. */
export function checkSample(options: SampleOptions): void {
  if (options.prompt === undefined)
    throw new UserError('no prompt given; say what to draw with --prompt "a red fox"');
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
