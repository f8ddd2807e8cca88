// The flags of `sdxl export`. Values are read and bounded as they are typed; options.ts says what goes together.
import { type Command, Option } from 'commander';
import { ggufTypes } from '../../models/formats/export_gguf.ts';
import { below } from '../help.ts';
import { bytes, devices, number, oneOf, repeated, texts } from '../option_values.ts';
import { formats, shareOf, usualRank } from './options.ts';

const examples = `
Examples:
  sdxl export runs/pokemon-blip/checkpoints/step-00010400 ./pokemon --save-keys unet --dtype float16
  sdxl export runs/emoji/checkpoints/step-00020000 ./emoji --ema
  sdxl export ./sdxl-base model.safetensors --dtype float16
  sdxl export ./sdxl-base sdxl-q8_0.gguf --type q8_0 --dtype float16
  sdxl export ./sdxl-base ./fused --lora style.safetensors:0.8 --lora detail.safetensors
  sdxl export realistic.safetensors mix.safetensors --merge painted.safetensors:0.3 --merge ./other:0.1
  sdxl export ./sdxl-inpainting ./my-inpainting --merge mine.safetensors:1 --merge-base ./sdxl-base
  sdxl export sdxl-q8_0.gguf ./model --dtype bfloat16
  sdxl export adapter.safetensors kohya.safetensors --format lora-kohya
  sdxl export tuned.safetensors lora.safetensors --format lora-kohya --base ./sdxl-base --rank 64 --conv-rank 32
  sdxl export ./sdxl-base both.safetensors --format lora-kohya --base ./sdxl-base --lora style.safetensors:0.8 --lora detail.safetensors

Weights are streamed, read back and compared; one forward pass through the result equals the source's, or in GGUF is near it.
GGUF is laid out as stable-diffusion.cpp's convert does, and with --save-keys unet as ComfyUI-GGUF's tools do.
A LoRA is extracted of all linear layers and convolutions of the UNet and the text encoders that differ, with alpha its rank. Of a model and
itself with --lora it is one of several adapters, or one of another rank.`;

const rank = (flag: string) => number(flag, { min: 1, whole: true });

const formatOptions = (command: Command): Command =>
  command
    .option(
      '--save-keys <NAMES>',
      'components, with commas between: unet,vae,text_encoder,... or all (default: all)',
    )
    .option(
      '--format <NAME>',
      `${formats.join(', ')} (default: by the ending of OUT: gguf, single-file for .safetensors, else diffusers, a folder)`,
      oneOf('--format', formats),
    )
    .option(
      '--dtype <NAME>',
      'float32, bfloat16 or float16 (default: as it is stored; float32 for what is quantised; in GGUF of a UNet alone 16 bits, as ComfyUI-GGUF)',
      oneOf('--dtype', ['float32', 'bfloat16', 'float16']),
    )
    .option(
      '--type <NAME>',
      `in GGUF, of the weights that take it: ${ggufTypes.join(', ')} (the rest, or all without it: see --dtype)`,
      oneOf('--type', ggufTypes),
    )
    .addOption(
      new Option('--max-shard-size <SIZE>', 'of a weight file in a folder')
        .argParser(bytes('--max-shard-size'))
        .default(10e9, '10GB'),
    );

/** What is taken of a model, put in the place of its own, or merged into it. */
const weightOptions = (command: Command): Command =>
  command
    .option('--ema', 'the moving averages instead of the last weights')
    .option('--unet <DIR|FILE|HUB_ID>', "another UNet than the model has, such as one of ComfyUI's in .gguf")
    .option(
      '--merge <MODEL:RATIO>',
      'a model, B, to be merged into this one, A: A (1 - RATIO) + B RATIO; may be given more than once, as several share what they leave of A. Two ratios with a comma between are of the text encoders and of the UNet, 20 of BASE, IN00 to IN08, M00, OUT00 to OUT08. The VAE stays',
      repeated(shareOf),
    )
    .option(
      '--merge-base <DIR|FILE|HUB_ID>',
      'the model, C, whose difference from those of --merge is added: A + (B - C) RATIO',
    )
    .option(
      '--lora <FILE[:SCALE]>',
      'an adapter to be merged into the weights for good, after the models of --merge, or its folder or hub id; may be given more than once',
      texts,
    );

const extractionOptions = (command: Command): Command =>
  command
    .option(
      '--base <DIR|FILE|HUB_ID>',
      'the model that this one was tuned from: a LoRA is extracted of what differs (--format lora-kohya, lora-peft)',
    )
    .option(
      '--rank <N>',
      `of an extracted LoRA, which is its alpha too (default: ${usualRank})`,
      rank('--rank'),
    )
    .option(
      '--conv-rank <N>',
      'of its convolutions larger than 1x1 (default: as the others)',
      rank('--conv-rank'),
    );

export const addExportOptions = (command: Command): Command =>
  extractionOptions(weightOptions(formatOptions(command)))
    .option('--configs <DIR>', 'diffusers folder that lends its configs to a single file or a LoRA')
    .option(
      '--device <NAME>',
      `where the forward passes run that are compared, models are merged, or a LoRA is extracted: ${devices}`,
      'auto',
    )
    .option('--json', 'one JSON object on stdout')
    .option('--quiet', 'no progress')
    .addHelpText('after', below(examples))
    .allowExcessArguments(); // told of by refuseFurther(), as people put spaces between names
