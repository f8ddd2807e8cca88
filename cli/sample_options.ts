// The flags of `sdxl sample`: diffusers' words (other programs' are in aliases.ts). What can be known to be wrong with a
// request is refused here, before any weight is read.
import { existsSync } from 'node:fs';
import { resolve } from 'node:path';
import type { Command } from 'commander';
import type { FloatDType } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { assertWritable, readLines } from '../io/files.ts';
import { mostChunks, type Size } from '../models/conditioning.ts';
import { type Emphasis, emphases, parsePromptAttention } from '../models/emphasis.ts';
import type { SchedulerConfig } from '../models/samplers/config.ts';
import { createSampler, shortSchedulerNames as schedulerNames } from '../models/samplers/registry.ts';
import { readTextualInversion } from '../models/textual_inversion.ts';
import { addControlOptions, type ControlOptions, checkControl } from './control_options.ts';
import { addIPAdapterOptions, checkIPAdapters, type IPAdapterOptions } from './ip_adapter_options.ts';
import { corner, devices, number, numbers, oneOf, repeated, scaledFile, side, size } from './options.ts';

export interface SampleOptions extends ControlOptions, IPAdapterOptions {
  model?: string;
  from?: string;
  configs?: string;
  variant?: string;
  prompt?: readonly string[];
  promptFile?: string;
  prompt2?: string;
  negativePrompt?: string;
  negativePrompt2?: string;
  width?: number;
  height?: number;
  steps: number;
  timesteps?: number[];
  sigmas?: number[];
  guidanceScale: number;
  guidanceRescale: number;
  scheduler?: string;
  karras?: boolean;
  timestepSpacing?: SchedulerConfig['timestep_spacing'];
  eta?: number;
  seed?: number;
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
  vaeDtype: FloatDType | 'auto';
  lora?: string[];
  textualInversion?: string[];
  device: string;
  dtype: FloatDType | 'auto';
  fp8?: boolean;
  output: string;
  saveLatents?: string;
  json?: boolean;
  quiet?: boolean;
}

/** What --dtype and its like take. */
const dtypes = ['auto', 'float32', 'bfloat16', 'float16'] as const;

const examples = `
Examples:
  sdxl sample --prompt "red heart"
  sdxl sample --model ./sdxl-base --prompt "yoda pokemon" --seed 1
  sdxl sample --model stabilityai/stable-diffusion-xl-base-1.0 --vae madebyollin/sdxl-vae-fp16-fix --prompt "a red fox"
  sdxl sample --model ./base --refiner ./refiner --denoising-end 0.8 --prompt "a castle on a hill"
  sdxl sample --model ./base --prompt-file prompts.txt --output fox.png
  sdxl sample --model ./base --emphasis original --prompt "a (red:1.3) fox, [snow], (((moon)))"
  sdxl sample --model ./base --controlnet diffusers/controlnet-canny-sdxl-1.0:0.5 --control-image edges.png --prompt "a bird"
  sdxl sample --model ./base --ip-adapter h94/IP-Adapter/sdxl_models/ip-adapter_sdxl.safetensors:0.6 --ip-adapter-image statue.png --prompt "a cat"
  sdxl sample --model ./base --image photo.png --mask mask.png --strength 0.75 --prompt "a wooden door"

Schedulers: ${schedulerNames.join(', ')}; most of them may be followed by _karras, _exponential or _beta,
and the spellings of other programs are taken, such as "DPM++ 2M Karras".

The same seed gives the picture that diffusers gives with a CPU generator, or with --rng cuda with one on a GPU.`;

/** Declares every flag on `command`; values are read and bounded here, before anything is loaded. */
export function addSampleOptions(command: Command): Command {
  const fraction = (flag: string) => number(flag, { min: 0, max: 1 });
  command
    .allowExcessArguments() // told of by the command, which knows what they are
    .optionsGroup('Model:')
    .option(
      '-m, --model <DIR|FILE|HUB_ID>',
      'diffusers folder, original .safetensors file, or Hugging Face id (default: a small emoji model)',
    )
    .option(
      '--variant <NAME>',
      'which weights of a folder or hub id, such as fp16: half the download (default: the plain ones)',
    )
    .option('--configs <DIR>', 'diffusers folder that lends configs and tokenizers to a single-file model')
    .option('--vae <DIR|FILE|HUB_ID>', 'another VAE than the model has')
    .option(
      '--lora <FILE[:SCALE]>',
      'an adapter (LoRA, DoRA, LoHa, LoKr or whole differences) merged into the weights, such as style.safetensors:0.8, or the folder of one; may be given more than once',
      repeated((text) => text),
    )
    .option(
      '--textual-inversion <FILE[:TOKEN]>',
      "an embedding for SDXL (clip_l and clip_g, or the folder of diffusers' script), called by TOKEN in prompts (default: the file's name); may be given more than once",
      repeated((text) => text),
    )
    .option('--device <NAME>', devices, 'auto')
    .option(
      '--dtype <NAME>',
      'auto, float32, bfloat16 or float16; auto is bfloat16 for the full-size model on cpu',
      oneOf('--dtype', dtypes),
      'auto',
    )
    .option(
      '--vae-dtype <NAME>',
      'the same for the VAE; auto is --dtype, but float32 for a VAE that would overflow in float16',
      oneOf('--vae-dtype', dtypes),
      'auto',
    )
    .option(
      '--fp8',
      "the UNet's feed-forward layers in 8-bit floats: faster on Hopper alone, less exact anywhere",
    )
    .optionsGroup('Prompt:')
    .option(
      '-p, --prompt <TEXT>',
      'what to draw, up to 77 tokens (but see --max-token-length); given more than once, a picture of each, all from one seed',
      repeated((text) => text),
    )
    .option('--prompt-file <FILE>', 'more prompts, one a line')
    .option('--prompt-2 <TEXT>', "prompt for the second of the base's text encoders (default: the prompt)")
    .option('-n, --negative-prompt <TEXT>', 'what not to draw')
    .option('--negative-prompt-2 <TEXT>', 'the same for the second text encoder')
    .option(
      '--max-token-length <N>',
      'a multiple of 75: read longer prompts too, in chunks of 75 tokens, as A1111 and ComfyUI (default: 75, as diffusers)',
      number('--max-token-length', { min: 75, whole: true }),
    )
    .option(
      '--emphasis <NAME>',
      'weights in prompts, as (word:1.2), (word) or [word], and BREAK: original or no-norm, as A1111 applies them; ignore, read and not applied; none, text as it stands, as diffusers',
      oneOf('--emphasis', emphases),
      'none',
    )
    .option(
      '--clip-skip <N>',
      'layers to skip before the one that SDXL takes; 0 is what other programs call 2',
      number('--clip-skip', { min: 0, whole: true }),
    )
    .optionsGroup('Picture:')
    .option('-W, --width <N>', "pixels, divisible by 8 (default: the model's size)", side('--width'))
    .option('-H, --height <N>', "pixels, divisible by 8 (default: the model's size)", side('--height'))
    .option(
      '-s, --seed <N>',
      'default, or -1: random, and printed',
      number('--seed', { min: -1, max: Number.MAX_SAFE_INTEGER, whole: true }),
    )
    .option(
      '--rng <NAME>',
      "whose numbers the noise is: cpu, as diffusers mostly, or cuda, as A1111, stable-diffusion.cpp and a GPU's generator",
      oneOf('--rng', ['cpu', 'cuda']),
      'cpu',
    )
    .option(
      '-b, --batch-count <N>',
      'so many times, one after the other, each from the next seed',
      number('--batch-count', { min: 1, max: 10000, whole: true }),
      1,
    )
    .option(
      '--num-images <N>',
      'pictures at once from one seed, as num_images_per_prompt',
      number('--num-images', { min: 1, max: 64, whole: true }),
      1,
    )
    .option('--vae-tiling', 'decode in tiles, for large pictures')
    .optionsGroup('Steps:')
    .option('--steps <N>', 'num_inference_steps', number('--steps', { min: 1, max: 1000, whole: true }), 50)
    .option(
      '--guidance-scale <F>',
      'how closely to follow the prompt; 1 or less switches guidance off',
      number('--guidance-scale', { min: 0 }),
      5,
    )
    .option(
      '--guidance-rescale <F>',
      'against overexposure at high guidance, 0 to 1',
      fraction('--guidance-rescale'),
      0,
    )
    .option('--scheduler <NAME>', "diffusers class or a short name of those below (default: the model's)")
    .option('--karras', 'use_karras_sigmas, as in DPM++ 2M Karras')
    .option(
      '--timestep-spacing <NAME>',
      'leading, trailing or linspace',
      oneOf('--timestep-spacing', ['leading', 'trailing', 'linspace']),
    )
    .option(
      '--timesteps <N,...>',
      'own timesteps in place of --steps, such as 999,850,700,... (a distilled model, Align Your Steps)',
      numbers('--timesteps'),
    )
    .option(
      '--sigmas <F,...>',
      'the same as noise levels, with the last one to end at (Euler alone)',
      numbers('--sigmas'),
    )
    .option('--eta <F>', 'noise of DDIM, or gamma of TCD, 0 to 1 (default: 0)', fraction('--eta'))
    .optionsGroup('Micro-conditioning (what the model is told of the training picture):')
    .option(
      '--original-size <WxH>',
      "its size before scaling (default: the picture's)",
      size('--original-size'),
    )
    .option(
      '--crops-coords-top-left <TOP,LEFT>',
      'where it was cropped (default: 0,0)',
      corner('--crops-coords-top-left'),
    )
    .option('--target-size <WxH>', "its size after (default: the picture's)", size('--target-size'))
    .option(
      '--negative-original-size <WxH>',
      'the same for the negative prompt',
      size('--negative-original-size'),
    )
    .option(
      '--negative-crops-coords-top-left <TOP,LEFT>',
      'the same for the negative prompt',
      corner('--negative-crops-coords-top-left'),
    )
    .option(
      '--negative-target-size <WxH>',
      'the same for the negative prompt',
      size('--negative-target-size'),
    )
    .optionsGroup('Over a picture:')
    .option('-i, --image <FILE>', 'start from this picture')
    .option('--mask <FILE>', 'paint anew where this is white (needs --image)')
    .option(
      '--strength <F>',
      "how far to leave the picture, 0 to 1 (default, as diffusers': 0.3; with --controlnet 0.8; with --mask 0.9999)",
      fraction('--strength'),
    );
  return addIPAdapterOptions(addControlOptions(command))
    .optionsGroup('Refiner:')
    .option(
      '--refiner <DIR|FILE|HUB_ID>',
      'a refiner that finishes: over the whole picture at --strength, or from --denoising-end on',
    )
    .option(
      '--denoising-end <F>',
      'where the base stops and hands over its latents, 0 to 1',
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
    .optionsGroup('Files:')
    .option(
      '--from <FILE.png>',
      'take the settings that a picture of ours (or of A1111) carries; flags beside it win',
    )
    .option('-o, --output <FILE>', 'PNG to write; several pictures are numbered', 'out.png')
    .option(
      '--save-latents <FILE>',
      'also write the final latents, as diffusers gives them with output_type="latent"',
    )
    .option('--json', 'one JSON object on stdout: files, seed, size, seconds, peak memory')
    .option('--quiet', 'no progress')
    .addHelpText('after', examples);
}

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

/** All prompts, in the order they come. @throws UserError */
export function promptsOf({ prompt = [], promptFile }: SampleOptions): string[] {
  if (promptFile === undefined) return [...prompt];
  const lines = readLines(promptFile);
  if (lines.length === 0) throw new UserError(`--prompt-file: ${promptFile} has no prompt; write one a line`);
  return [...prompt, ...lines];
}

/** Warnings of a request's texts. @throws UserError for a weight that is no number, where weights are read */
export function checkTexts(options: SampleOptions, prompts: readonly string[]): string[] {
  const { emphasis, prompt2 = '', negativePrompt = '', negativePrompt2 = '' } = options;
  const texts = [...prompts, prompt2, negativePrompt, negativePrompt2];
  if (emphasis !== 'none') for (const text of texts) parsePromptAttention(text);
  const said = texts.join('\n').toLowerCase();
  const tags = [...new Set(texts.flatMap((text) => text.match(/<(lora|lyco):[^<>]+>/g) ?? []))];
  const unsaid = (options.textualInversion ?? [])
    .map(textualInversionOf)
    .map(({ file, token }) => ({ file, ...readTextualInversion(file, token) }))
    .filter(({ token }) => !said.includes(token.toLowerCase()));
  return [
    ...tags.map((tag) => `"${tag}" is read as words of the prompt; leave it out, and give --lora FILE:SCALE`),
    ...unsaid.map(
      ({ file, token }) => `no prompt has "${token}", by which --textual-inversion ${file} is called`,
    ),
  ];
}

/** What can be known to be wrong before anything is read. */
export function checkSample(options: SampleOptions): void {
  if (options.prompt === undefined && options.promptFile === undefined)
    throw new UserError('no prompt given; say what to draw with --prompt "a red fox"');
  if (options.maxTokenLength !== undefined) mostChunks(options.maxTokenLength, '--max-token-length');
  const sampler = options.scheduler ? createSampler(options.scheduler) : undefined;
  if (sampler && options.karras && !('use_karras_sigmas' in sampler.config))
    throw new UserError(
      `--karras: ${sampler.name} has no Karras sigmas; leave it out, or use dpm++2m or euler`,
    );
  if (options.mask && !options.image) throw new UserError('--mask needs --image: the picture to paint in');
  if (options.strength !== undefined && !options.image && !options.refiner)
    throw new UserError('--strength needs --image or --refiner');
  if (options.denoisingStart !== undefined && !options.image && !options.refiner)
    throw new UserError('--denoising-start needs --refiner or --image: something to go on from');
  if (options.timesteps && options.sigmas)
    throw new UserError('--timesteps and --sigmas both lay out the steps; give one of them');
  if ((options.seed ?? 0) > Number.MAX_SAFE_INTEGER - options.batchCount + 1)
    throw new UserError(
      `--seed ${options.seed} has no ${options.batchCount - 1} seeds after it; take a smaller one`,
    );
  if (options.denoisingEnd === 0)
    throw new UserError('--denoising-end 0 leaves nothing to do; give a part of the way such as 0.8');
  checkControl(options);
  checkIPAdapters(options);
  for (const { file } of (options.lora ?? []).map(loraOf))
    if (!existsSync(file)) throw new UserError(`--lora: no file ${file}`);
  for (const { file } of (options.textualInversion ?? []).map(textualInversionOf))
    if (!existsSync(file)) throw new UserError(`--textual-inversion: no file ${file}`);
  if (!/\.png$/i.test(options.output))
    throw new UserError(
      `--output ${options.output}: pictures are written as PNG; give a name that ends in .png`,
    );
  if (options.saveLatents && resolve(options.saveLatents) === resolve(options.output))
    throw new UserError('--save-latents and --output name one file; give the latents a name of their own');
  if (options.saveLatents) assertWritable(options.saveLatents);
}
