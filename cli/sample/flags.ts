// The flags of `sdxl sample`, group by group: diffusers' words (other programs' are in aliases.ts). Values are read and bounded as
// they are typed; options.ts says what they come to.
import type { Command } from 'commander';
import { seamlessAxes } from '../../engine/circular.ts';
import { sigmaSchedules } from '../../models/samplers/config.ts';
import { shortSchedulerNames as schedulerNames } from '../../models/samplers/registry.ts';
import { emphases } from '../../models/text/emphasis.ts';
import { below } from '../help.ts';
import { devices, fraction, number, numbers, oneOf, pair, side, size, texts } from '../option_values.ts';
import { addAdapterOptions } from './adapter_options.ts';
import { addControlOptions } from './control_options.ts';
import { addGuidanceOptions } from './guidance_options.ts';
import { addHiresOptions } from './hires_options.ts';
import { addIPAdapterOptions } from './ip_adapter_options.ts';
import { addMaskOptions } from './mask_options.ts';
import { usualScores } from './options.ts';
import { addPreviewOptions } from './preview.ts';
import { addUpscaleOptions } from './upscale_options.ts';

/** What --dtype and its like take. */
const dtypes = ['auto', 'float32', 'bfloat16', 'float16'] as const;

export const schedulersHelp = `Schedulers: ${schedulerNames.join(', ')}; most of them may be followed by how their noise levels are laid
out, _${sigmaSchedules.join(', _')},
and the spellings of other programs are taken, such as "DPM++ 2M Karras" or "Euler a Align Your Steps".`;

const examples = `
Examples:
  sdxl sample --prompt "red heart"
  sdxl sample --model ./sdxl-base --prompt "yoda pokemon" --seed 1
  sdxl sample --model stabilityai/stable-diffusion-xl-base-1.0 --vae madebyollin/sdxl-vae-fp16-fix --prompt "a red fox"
  sdxl sample --model sdxl-q8_0.gguf --prompt "a red fox"
  sdxl sample --model ./base --refiner ./refiner --denoising-end 0.8 --prompt "a castle on a hill"
  sdxl sample --model ./base --prompt-file prompts.txt --output fox.png
  sdxl sample --model ./base --hires --hires-scale 1.5 --prompt "a wide valley"
  sdxl sample --model ./base --emphasis original --prompt "a (red:1.3) fox, [snow], (((moon)))"
  sdxl sample --model ./base --emphasis original --prompt "a [fox:hare:0.4] in the snow"
  sdxl sample --model ./base --lora-model-dir ./loras --prompt "a castle <lora:watercolour:0.8>"
  sdxl sample --model ./base --controlnet diffusers/controlnet-canny-sdxl-1.0:0.5 --control-image photo.png --canny --prompt "a bird"
  sdxl sample --model ./base --adapter TencentARC/t2i-adapter-canny-sdxl-1.0:0.8 --adapter-image edges.png --prompt "a bird"
  sdxl sample --model ./base --ip-adapter h94/IP-Adapter/sdxl_models/ip-adapter_sdxl.safetensors:0.6 --ip-adapter-image statue.png --prompt "a cat"
  sdxl sample --model ./base --ip-adapter h94/IP-Adapter/sdxl_models/ip-adapter_sdxl.safetensors:up.block_0=0,1,0 --ip-adapter-image painting.png --prompt "a cat"
  sdxl sample --model ./base --image photo.png --mask mask.png --strength 0.75 --prompt "a wooden door"

${schedulersHelp}

The same seed gives the picture that diffusers gives with a CPU generator, or with --rng cuda with one on a GPU.`;

/** What the model is made of. */
const partOptions = (command: Command): Command =>
  command
    .optionsGroup('Model:')
    .option(
      '-m, --model <DIR|FILE|HUB_ID>',
      'diffusers folder, original .safetensors or .gguf file, or Hugging Face id, perhaps with such a file in it: OWNER/NAME/FILE (default: a small emoji model)',
    )
    .option(
      '--variant <NAME>',
      'which weights of a folder or hub id, such as fp16: half the download (default: the plain ones)',
    )
    .option('--configs <DIR>', 'diffusers folder that lends configs and tokenizers to a single-file model')
    .option(
      '--unet <DIR|FILE|HUB_ID>',
      "another UNet than the model has, such as one of ComfyUI's in .gguf or latent-consistency/lcm-sdxl",
    )
    .option(
      '--vae <DIR|FILE|HUB_ID>',
      'another VAE than the model has, or a tiny autoencoder such as madebyollin/taesdxl: coarser, in a fraction of the time',
    )
    .option(
      '--lora <FILE[:SCALE]>',
      'an adapter (LoRA, DoRA, LoHa, LoKr, OFT or whole differences) merged into the weights, such as style.safetensors:0.8, or the folder or hub id of one; may be given more than once',
      texts,
    )
    .option(
      '--lora-model-dir <DIR>',
      'the folder of those that prompts name, as in A1111 and stable-diffusion.cpp: <lora:NAME:0.8> (default: such tags are text)',
    )
    .option(
      '--textual-inversion <FILE[:TOKEN]>',
      "an embedding for SDXL (clip_l and clip_g, or the folder of diffusers' script or of a run), called by TOKEN in prompts (default: the file's name); may be given more than once",
      texts,
    );

/** Where it runs, and in which numbers. */
const numberOptions = (command: Command): Command =>
  command
    .option('--device <NAME>', devices, 'auto')
    .option(
      '--dtype <NAME>',
      'auto, float32, bfloat16 or float16; auto is bfloat16 for the full-size model on cpu and cuda',
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
    .option(
      '--q8',
      'the UNet and ControlNets in 8-bit integers, as Q8_0: half their memory, a little less exact and a little slower',
    );

export const modelOptions = (command: Command): Command => numberOptions(partOptions(command));

const promptOptions = (command: Command): Command =>
  textOptions(
    command
      .optionsGroup('Prompt:')
      .option(
        '-p, --prompt <TEXT>',
        'what to draw, up to 77 tokens (but see --max-token-length); given more than once, a picture of each, all from one seed',
        texts,
      )
      .option('--prompt-file <FILE>', 'more prompts, one a line')
      .option('--prompt-2 <TEXT>', "prompt for the second of the base's text encoders (default: the prompt)")
      .option('-n, --negative-prompt <TEXT>', 'what not to draw')
      .option('--negative-prompt-2 <TEXT>', 'the same for the second text encoder')
      .option(
        '--style <NAME>',
        'draw in a style of --styles-file: what it says stands around the prompt, by {prompt} in it, or behind; may be given more than once',
        texts,
      ),
  );

/** How texts are read. */
export const textOptions = (command: Command): Command =>
  command
    .option('--styles-file <FILE>', "the styles that there are by their names, as A1111's styles.csv")
    .option(
      '--max-token-length <N>',
      'a multiple of 75: read longer prompts too, in chunks of 75 tokens, as A1111 and ComfyUI (default: 75, as diffusers)',
      number('--max-token-length', { min: 75, whole: true }),
    )
    .option(
      '--emphasis <NAME>',
      'how brackets in prompts are read. none: as plain text, as diffusers does. original: as A1111 does: (word:1.2), (word) and [word] are weights, BREAK begins a new chunk, and the prompt may change: [from:to:0.5] after half of the steps, [to:10] and [from::10] after ten, [a|b] at every step; AND stands between prompts of one picture, a cat AND a dog :0.8. no-norm: the same, without scaling the mean back. ignore: the weights are taken out and not applied',
      oneOf('--emphasis', emphases),
      'none',
    )
    .option(
      '--clip-skip <N>',
      'layers to skip before the one that SDXL takes; 0 is what other programs call 2',
      number('--clip-skip', { min: 0, whole: true }),
    );

const pictureOptions = (command: Command): Command =>
  sizeOptions(command.optionsGroup('Picture:'))
    .option(
      '-s, --seed <N>',
      'what the noise is made from: the same seed and settings give the same picture (default, or -1: a random one, which is printed)',
      number('--seed', { min: -1, max: Number.MAX_SAFE_INTEGER, whole: true }),
    )
    .option(
      '--subseed <N>',
      'a variation: the noise lies between that of --seed and this one (default, or -1: random, and printed)',
      number('--subseed', { min: -1, max: Number.MAX_SAFE_INTEGER, whole: true }),
    )
    .option(
      '--subseed-strength <F>',
      'how far from the first to the second, 0 to 1 (default: 0)',
      fraction('--subseed-strength'),
    )
    .option(
      '--seed-resize-from-w <N>',
      'the noise of a picture so wide, in the middle of the own',
      side('--seed-resize-from-w'),
    )
    .option('--seed-resize-from-h <N>', 'and so high', side('--seed-resize-from-h'))
    .option(
      '-b, --batch-count <N>',
      'how many pictures of each prompt to draw, one after the other, each from the next seed, or with --subseed-strength from the next subseed',
      number('--batch-count', { min: 1, max: 10000, whole: true }),
      1,
    )
    .option(
      '--num-images <N>',
      "how many pictures to draw at once from one seed, as diffusers' num_images_per_prompt, which takes more memory",
      number('--num-images', { min: 1, max: 64, whole: true }),
      1,
    );

/** How large a picture is, by whose noise, and how it is decoded. */
export const sizeOptions = (command: Command): Command =>
  command
    .option('-W, --width <N>', "pixels, divisible by 8 (default: the model's size)", side('--width'))
    .option('-H, --height <N>', "pixels, divisible by 8 (default: the model's size)", side('--height'))
    .option(
      '--rng <NAME>',
      "whose numbers the noise is: cpu, as diffusers mostly, or cuda, as A1111, stable-diffusion.cpp and a GPU's generator",
      oneOf('--rng', ['cpu', 'cuda']),
      'cpu',
    )
    .option('--vae-tiling', 'decode in tiles, for large pictures')
    .option(
      '--seamless <AXES>',
      'draw a pattern that goes on at its other side: to the sides (x), up and down (y), or both (xy)',
      oneOf('--seamless', seamlessAxes),
    );

export const stepOptions = (command: Command): Command =>
  cachingOptions(scheduleOptions(addGuidanceOptions(stepsOption(command.optionsGroup('Steps:')))));

const stepsOption = (command: Command): Command =>
  command.option(
    '--steps <N>',
    'denoising steps: 20 to 50 for most models, 1 to 8 for distilled ones (LCM, TCD, Lightning)',
    number('--steps', { min: 1, max: 1000, whole: true }),
    50,
  );

/** Where the steps lie. */
const scheduleOptions = (command: Command): Command =>
  command
    .option('--scheduler <NAME>', "diffusers class or a short name of those below (default: the model's)")
    .option(
      '--karras',
      "lay out the noise levels as Karras et al. do (diffusers' use_karras_sigmas, A1111's DPM++ 2M Karras)",
    )
    .option(
      '--timestep-spacing <NAME>',
      "where in the model's 1000 training timesteps the steps lie: leading, trailing (for SDXL Lightning and Turbo) or linspace (default: as the model's scheduler says)",
      oneOf('--timestep-spacing', ['leading', 'trailing', 'linspace']),
    )
    .option(
      '--timesteps <N,...>',
      'own timesteps in place of --steps, such as 999,850,700,... (a distilled model, Align Your Steps); not for DDIM, PNDM and those of EDM',
      numbers('--timesteps'),
    )
    .option(
      '--sigmas <F,...>',
      "the same as noise levels, with the last one to end at (Euler and EDM's alone)",
      numbers('--sigmas'),
    );

/** What of a step is left out, and its noise. */
const cachingOptions = (command: Command): Command =>
  command
    .option(
      '--cache-interval <N>',
      'DeepCache: run all of the UNet in every N-th step alone, and its first and last layers in the others; faster, and another picture (default: 1, off)',
      number('--cache-interval', { min: 1, whole: true }),
    )
    .option(
      '--cache-branch-id <N>',
      'how many more layers run in the others, 0 to 8: slower, and nearer to the picture without (default: 0)',
      number('--cache-branch-id', { min: 0, whole: true }),
    )
    .option('--eta <F>', 'noise of DDIM, or gamma of TCD, 0 to 1 (default: 0)', fraction('--eta'))
    .option(
      '--eta-ancestral <F>',
      'how much noise euler_a, dpm2_a, dpm++2s_a, dpm++sde, dpm++2m_sde and dpm++3m_sde put into each step, 0 to 1, as A1111\'s "Eta for k-diffusion samplers" (default: 1)',
      fraction('--eta-ancestral'),
    );

const microConditioningOptions = (command: Command): Command =>
  command
    .optionsGroup('Micro-conditioning (what the model is told of the training picture):')
    .option(
      '--original-size <WxH>',
      "its size before scaling (default: the picture's)",
      size('--original-size'),
    )
    .option(
      '--crops-coords-top-left <Y,X>',
      'where it was cropped: TOP,LEFT (default: 0,0)',
      pair('--crops-coords-top-left', 'TOP,LEFT such as 0,0'),
    )
    .option('--target-size <WxH>', "its size after (default: the picture's)", size('--target-size'))
    .option(
      '--negative-original-size <WxH>',
      'the same for the negative prompt',
      size('--negative-original-size'),
    )
    .option(
      '--negative-crops-coords-top-left <Y,X>',
      'the same for the negative prompt',
      pair('--negative-crops-coords-top-left', 'TOP,LEFT such as 0,0'),
    )
    .option(
      '--negative-target-size <WxH>',
      'the same for the negative prompt',
      size('--negative-target-size'),
    );

const overPictureOptions = (command: Command): Command =>
  addMaskOptions(
    command
      .optionsGroup('Over a picture:')
      .option(
        '-i, --image <FILE>',
        'start from this picture; an InstructPix2Pix model, such as diffusers/sdxl-instructpix2pix-768, edits it as --prompt tells',
      )
      .option(
        '--image-guidance-scale <F>',
        'of an InstructPix2Pix model: how strongly to keep to the picture, and below 1 no guidance at all (default: 1.5)',
        number('--image-guidance-scale', { min: 0 }),
      ),
  ).option(
    '--strength <F>',
    "how far to leave the picture, 0 to 1 (default, as diffusers': 0.3; with --controlnet 0.8; with --mask 0.9999)",
    fraction('--strength'),
  );

export const refinerOptions = (command: Command): Command =>
  command
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
      'how closely the refiner follows the prompt (default: as --guidance-scale)',
      number('--refiner-guidance-scale', { min: 0 }),
    )
    .option('--aesthetic-score <F>', 'told to the refiner', number('--aesthetic-score'), usualScores[0])
    .option(
      '--negative-aesthetic-score <F>',
      'told to the refiner',
      number('--negative-aesthetic-score'),
      usualScores[1],
    );

const fileOptions = (command: Command): Command =>
  command
    .optionsGroup('Files:')
    .option(
      '--from <FILE.png>',
      'take the settings that a picture of ours (or of A1111) carries; flags beside it win',
    )
    .option(
      '-o, --output <FILE>',
      'PNG to write, in the place of what is there; several pictures are numbered',
      'out.png',
    )
    .option(
      '--save-latents <FILE>',
      'also write the final latents to this .safetensors file: one float32 tensor "latents", as diffusers gives them with output_type="latent"',
    )
    .option('--json', 'one JSON object on stdout: pictures (file, seed, prompt), size, seconds, peak memory')
    .option('--quiet', 'no progress');

/** Declares every flag on `command`; values are read and bounded here, before anything is loaded. */
export function addSampleFlags(command: Command): Command {
  const groups = [
    ...[
      modelOptions,
      promptOptions,
      pictureOptions,
      stepOptions,
      microConditioningOptions,
      overPictureOptions,
    ],
    ...[
      addHiresOptions,
      addUpscaleOptions,
      addControlOptions,
      addAdapterOptions,
      addIPAdapterOptions,
      refinerOptions,
      addPreviewOptions,
      fileOptions,
    ],
  ];
  for (const add of groups) add(command);
  return command.allowExcessArguments(); // told of by the command, which knows what they are
}

export const addSampleOptions = (command: Command): Command =>
  addSampleFlags(command).addHelpText('after', below(examples));
