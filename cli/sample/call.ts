// What a call of `sdxl sample` comes to on the models that it names: how large, from which seed, in which steps. All that can be wrong
// with it is found here, by the models' configs, before any weight is read.
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { checkControlModes } from '../../models/control/control_request.ts';
import { checkInpainting } from '../../models/control/inpainting.ts';
import { checkInstructPix2Pix } from '../../models/control/instruct_pix2pix.ts';
import { checkLLLiteSize, isLLLiteSource, llliteConfig } from '../../models/control/lllite.ts';
import { checkSquares, t2iAdapterConfig } from '../../models/control/t2i_adapter.ts';
import { askedPictures } from '../../models/ip_adapter/image_prompt.ts';
import type { AdapterFile } from '../../models/lora/lora.ts';
import { isGuided, sizesOf } from '../../models/pipeline.ts';
import { planOf, samplerFor } from '../../models/plan.ts';
import type { Request } from '../../models/request.ts';
import { parseSchedulerConfig } from '../../models/samplers/config_checks.ts';
import type { Sampler } from '../../models/samplers/sampler.ts';
import { checkAPG } from '../../models/unet/apg.ts';
import { cachingOf } from '../../models/unet/deepcache.ts';
import { checkComposed } from '../../models/unet/guidance.ts';
import { pagOf } from '../../models/unet/pag.ts';
import { parseUNetConfig, unet } from '../../models/unet/unet.ts';
import { autoencoder, checkDecode } from '../../models/vae/autoencoder.ts';
import type { Latents } from '../../models/vae/latents.ts';
import { oneOrAll } from './control_options.ts';
import { hiresSize, type Larger, planSecondPass, type Sides } from './hires_options.ts';
import type { SampleOptions } from './options.ts';
import type { Prompt } from './prompt_loras.ts';
import {
  baseRequests,
  type Canvas,
  canvasOf,
  type Inputs,
  plannedSecond,
  promptAt,
  refinerRequest,
  wholeSide,
} from './request.ts';
import type { Sources } from './sources.ts';
import { writtenSize } from './upscale_options.ts';

export interface SampleCall {
  /** As typed, but that a subseed is a number, and there only where it counts. */
  options: SampleOptions;
  /** The base's, in the order in which they are drawn. */
  requests: Request[];
  /** The prompt of each as it was typed, with the LoRAs that it names. */
  typed: readonly string[];
  /** What the base has merged into it for each: those of all prompts, and then those that the prompt names. */
  adapters: readonly (readonly AdapterFile[])[];
  canvas: Canvas;
  /** The size of the second pass, where there is one. */
  larger?: Larger;
  /** The size of the files. */
  written: Sides;
  /** That of the first picture. */
  seed: number;
  /** The one that runs. */
  sampler: Sampler;
  /** That of the second pass, where it has its own. */
  hiresSampler?: Sampler;
}

/** @throws UserError for what the models cannot do */
export function planCall(
  typed: SampleOptions,
  { source, refinerSource, vaeSource, upscalers, under }: Sources,
  inputs: Inputs,
  prompts: readonly Prompt[],
): SampleCall {
  const seed = seedFor(typed.seed);
  const options = { ...typed, subseed: typed.subseedStrength ? seedFor(typed.subseed) : undefined };
  checkControlModes(under.controlnet, oneOrAll(options.controlMode));
  const sizes = sizesOf(source, vaeSource);
  const canvas = canvasOf(options, sizes, inputs);
  const larger = hiresSize(options, canvas, wholeSide(options, sizes));
  for (const { width, height } of larger ? [canvas, larger] : [canvas]) {
    for (const each of under.adapter) checkSquares(t2iAdapterConfig(each), [height, width]);
    for (const each of under.controlnet.filter(isLLLiteSource))
      checkLLLiteSize(llliteConfig(each), [height, width]);
  }
  const written = writtenSize(larger ?? canvas.written, options, upscalers);
  const decoder = autoencoder((vaeSource ?? refinerSource ?? source).config('vae'));
  checkDecode(decoder, larger ?? canvas, options.vaeTiling);
  const texts = prompts.map(({ text }) => text);
  const requests = baseRequests(options, canvas, texts, seed);
  const named = requests.map((_, i) => prompts[promptAt(options, i)]);
  const [first] = requests;
  askedPictures(under.ipAdapter.length, first, parseUNetConfig(source.config('unet')));
  const none: Latents = { shape: [], data: new Float32Array() };
  const { sampler } = planned(source, first);
  if (refinerSource) planned(refinerSource, refinerRequest(options, first, none));
  const second = larger && plannedSecond(options, first, larger);
  const scheduler = parseSchedulerConfig(source.config('scheduler'));
  const hiresSampler = second?.base_scheduler && samplerFor({ scheduler }, second);
  if (second) planSecondPass(options, first.num_inference_steps, () => void planned(source, second));
  return {
    ...{ options, requests, canvas, larger, written, seed, sampler, hiresSampler },
    typed: named.map(({ typed }) => typed),
    adapters: named.map(({ lora }) => [...under.lora, ...lora]),
  };
}

/** A random one where none is given. */
export const seedFor = (asked = -1): number => (asked < 0 ? Math.floor(Math.random() * 2 ** 32) : asked);

/** The steps of a request. @throws UserError where the model cannot do them, has no such layers or no guidance, or is for another request */
function planned(from: ModelSource, asked: Request) {
  const config = parseUNetConfig(from.config('unet'));
  checkInpainting(config, asked);
  checkInstructPix2Pix(config, asked);
  cachingOf(asked, config);
  checkAPG(asked, isGuided(config, asked));
  checkComposed(asked, isGuided(config, asked));
  if (asked.pag_scale) pagOf(asked, unet(config)); // thousands of modules, for their names alone
  const scheduler = parseSchedulerConfig(from.config('scheduler'));
  return planOf({ scheduler, unetConfig: config }, asked);
}
