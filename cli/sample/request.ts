// What the flags of `sdxl sample` come to: the pictures they name, read, and the requests for the base and the refiner.
import { canny } from '../../io/canny.ts';
import { UserError } from '../../io/errors.ts';
import { preprocess, preprocessMask, readPicture, toGrey } from '../../io/image.ts';
import { cutAndFill, maskWindow, overlay } from '../../io/mask_crop.ts';
import type { Mask, Picture, Pixels } from '../../io/pixels.ts';
import type { Sizes } from '../../models/pipeline.ts';
import { CudaGenerator } from '../../models/random/cuda_random.ts';
import type { NoiseGenerator } from '../../models/random/generator.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { VariedGenerator } from '../../models/random/variation.ts';
import { type Request, stepsOf } from '../../models/request.ts';
import type { SchedulerConfig } from '../../models/samplers/config.ts';
import { layoutOf } from '../../models/samplers/registry.ts';
import { latentContents } from '../../models/start.ts';
import { composed } from '../../models/text/composed.ts';
import type { Latents } from '../../models/vae/latents.ts';
import { readFor } from '../option_values.ts';
import { adapterRequest } from './adapter_options.ts';
import { controlnetOf, controlRequest } from './control_options.ts';
import { guidanceAt, guidanceRequest } from './guidance_options.ts';
import { hiresScheduler, hiresSteps, hiresTexts, type Larger, type Sides, shownOf } from './hires_options.ts';
import { type IPAdapterInputs, ipAdapterRequest } from './ip_adapter_options.ts';
import { contentUnder, preparedMask, wholeUnder } from './mask_options.ts';
import type { SampleOptions } from './options.ts';

export interface Inputs extends IPAdapterInputs {
  image?: Picture;
  mask?: Mask;
  /** One for each ControlNet. */
  controls?: readonly Picture[];
  /** One for each T2I-Adapter. */
  adapterImages?: readonly Picture[];
}

const readFile = (path: string, flag: string): Promise<Picture> => readFor(flag, () => readPicture(path));

/** Reads the pictures that the options name, each by `read`. @throws UserError */
export async function readInputs(
  options: SampleOptions,
  read: (path: string, flag: string) => Promise<Picture> = readFile,
): Promise<Inputs> {
  const readAll = async (flag: string, paths: readonly string[] = []): Promise<Picture[]> => {
    const pictures: Picture[] = [];
    for (const path of paths) pictures.push(await read(path, flag));
    return pictures;
  };
  const { canny: thresholds } = options;
  const followed = (picture: Picture) => (thresholds ? canny(picture, thresholds) : picture);
  const controls = (await readAll('--control-image', options.controlImage)).map(followed);
  const adapterImages = (await readAll('--adapter-image', options.adapterImage)).map(followed);
  const ipAdapterImages = await readAll('--ip-adapter-image', options.ipAdapterImage);
  const ipAdapterMasks = await readAll('--ip-adapter-mask', options.ipAdapterMask);
  const others = { controls, adapterImages, ipAdapterImages, ipAdapterMasks };
  if (!options.image) return others;
  const image = await read(options.image, '--image');
  if (!options.mask) return { image, ...others };
  const mask = preparedMask(options, toGrey(await read(options.mask, '--mask')));
  if (mask.width !== image.width || mask.height !== image.height) {
    throw new UserError(
      `${options.mask} is ${mask.width}x${mask.height} and ${options.image} is ${image.width}x${image.height}; make them the same size`,
    );
  }
  if (options.paddingMaskCrop !== undefined && !mask.data.some((grey) => grey > 0))
    throw new UserError(`${options.mask} is all black: make white what is to be painted anew`);
  return { image, mask, ...others };
}

/** What is drawn: how large, over and after which pictures, and what is made of the result. */
export interface Canvas {
  width: number;
  height: number;
  inputs: Inputs;
  finish(drawn: Picture): Picture;
  /** How large that is. */
  written: { width: number; height: number };
}

/** The side that sizes which nobody typed are cut to multiples of: a latent's, of T2I-Adapters the squares that these see. */
export const wholeSide = ({ adapter }: SampleOptions, { ratio }: Pick<Sizes, 'ratio'>): number =>
  adapter ? 2 * ratio : ratio;

/**
 * Where no size is given that of the picture to start from counts, or else of the first to follow, cut to whole latents; but a part of
 * a picture (--padding-mask-crop) is drawn at the model's size, and comes back into the picture.
 */
export function canvasOf(
  options: SampleOptions,
  { ratio, sampleSize, sampleWidth = sampleSize }: Sizes,
  inputs: Inputs,
): Canvas {
  const { image, mask, controls = [], adapterImages = [], ipAdapterMasks = [] } = inputs;
  const { paddingMaskCrop: padding } = options;
  const sized = padding === undefined ? (image ?? controls.at(0) ?? adapterImages.at(0)) : undefined;
  const whole = wholeSide(options, { ratio });
  const floored = (pixels: number) => pixels - (pixels % whole);
  const { width = floored(sized?.width ?? sampleWidth), height = floored(sized?.height ?? sampleSize) } =
    options;
  if (sized && width * height === 0)
    throw new UserError(
      `${options.image ?? options.controlImage?.[0] ?? options.adapterImage?.[0]} is ${sized.width}x${sized.height} and ${options.adapter ? 'a T2I-Adapter sees squares of' : 'a latent'} ${whole}x${whole} pixels: give --width and --height`,
    );
  const size = { width, height };
  if (!image || !mask) return { ...size, inputs, finish: (drawn) => drawn, written: size };
  if (padding === undefined) {
    const whole = wholeUnder(options, image, mask, width, height);
    return { ...size, inputs: { ...inputs, ...whole.inputs }, finish: whole.finish, written: size };
  }
  const window = maskWindow(mask, width, height, padding);
  const part = <P extends Picture | Mask>(of: P, flag: string): P => {
    if (of.width === mask.width && of.height === mask.height) return cutAndFill(of, window, width, height);
    throw new UserError(
      `--padding-mask-crop cuts a part of ${mask.width}x${mask.height} pixels, and ${flag} is ${of.width}x${of.height}; make them the same size`,
    );
  };
  const parts = <P extends Picture | Mask>(all: readonly P[], flag: string) =>
    all.map((each) => part(each, flag));
  const marked = part(mask, '--mask');
  return {
    ...size,
    inputs: {
      ...{ ...inputs, image: contentUnder(options, part(image, '--image'), marked), mask: marked },
      controls: parts(controls, '--control-image'),
      adapterImages: parts(adapterImages, '--adapter-image'),
      ipAdapterMasks: parts(ipAdapterMasks, '--ip-adapter-mask'),
    },
    finish: (drawn) => overlay(image, mask, window, drawn),
    written: { width: image.width, height: image.height },
  };
}

/** The base's requests, `batchCount` for each prompt, which share the pictures. */
export function baseRequests(
  options: SampleOptions,
  canvas: Canvas,
  prompts: readonly string[],
  seed: number,
): Request[] {
  const shared = sharedRequest(options, canvas);
  const count = prompts.length * options.batchCount;
  return Array.from({ length: count }, (_, i) => ({
    ...shared,
    ...composed(prompts[promptAt(options, i)], shared),
    generators: [generatorOf(options, seed, i)],
    last: i === count - 1 && !options.hires,
  }));
}

/** All of a request but its prompt and its noise. */
function sharedRequest(
  options: SampleOptions,
  { width, height, inputs }: Canvas,
): Omit<Request, 'prompt' | 'generators'> {
  const { image, mask, controls = [], adapterImages = [] } = inputs;
  const config: Partial<SchedulerConfig> = options.karras ? layoutOf('karras') : {};
  if (options.timestepSpacing) config.timestep_spacing = options.timestepSpacing;
  const { timesteps, sigmas } = options;
  return {
    ...textsRequest(options),
    width,
    height,
    timesteps,
    sigmas,
    num_inference_steps: stepsOf({ timesteps, sigmas, num_inference_steps: options.steps }) as number,
    ...guidanceRequest(options),
    cache_interval: options.cacheInterval,
    cache_branch_id: options.cacheBranchId,
    num_images_per_prompt: options.numImages,
    eta: options.eta,
    eta_ancestral: options.etaAncestral,
    scheduler: { name: options.scheduler, config },
    image: image && preprocess(image, width, height),
    mask: mask && preprocessMask(mask, width, height),
    masked_content: latentContents.find((each) => each === options.maskedContent),
    strength: options.strength,
    ...controlRequest(options, controls, width, height),
    ...adapterRequest(options, adapterImages),
    ...ipAdapterRequest(options, inputs, width, height),
    denoising_end: options.denoisingEnd ?? (options.refiner ? options.denoisingStart : undefined),
    denoising_start: options.refiner ? undefined : options.denoisingStart,
    vae_tiling: options.vaeTiling,
    seamless: options.seamless,
    ...sizesRequest(options),
  };
}

/** What is asked beside the prompt itself, and how they are read. */
const textsRequest = (options: SampleOptions): Partial<Request> => ({
  // An empty text is no second prompt, and yet a negative prompt.
  prompt_2: options.prompt2 ? [options.prompt2] : undefined,
  negative_prompt: options.negativePrompt === undefined ? undefined : [options.negativePrompt],
  negative_prompt_2: options.negativePrompt2 ? [options.negativePrompt2] : undefined,
  clip_skip: options.clipSkip,
  max_token_length: options.maxTokenLength,
  emphasis: options.emphasis,
});

/** What the network is told of a picture's sizes and looks. */
const sizesRequest = (options: SampleOptions): Partial<Request> => ({
  original_size: options.originalSize,
  crops_coords_top_left: options.cropsCoordsTopLeft,
  target_size: options.targetSize,
  negative_original_size: options.negativeOriginalSize,
  negative_crops_coords_top_left: options.negativeCropsCoordsTopLeft,
  negative_target_size: options.negativeTargetSize,
  aesthetic_score: options.aestheticScore,
  negative_aesthetic_score: options.negativeAestheticScore,
});

/** Which of the prompts the i-th request is of. */
export const promptAt = ({ batchCount }: SampleOptions, i: number): number => Math.floor(i / batchCount);

/** The seed of the i-th request: each prompt's batches begin at `seed` and count on, but for those that differ in their variation. */
export const seedOf = ({ batchCount, subseedStrength }: SampleOptions, seed: number, i: number): number =>
  seed + (subseedStrength ? 0 : i % batchCount);

/** The subseed of the i-th request, where there is one. */
export const subseedOf = ({ batchCount, subseed }: SampleOptions, i: number): number | undefined =>
  subseed === undefined ? undefined : subseed + (i % batchCount);

function generatorOf(options: SampleOptions, seed: number, i: number): NoiseGenerator {
  const Kind = options.rng === 'cuda' ? CudaGenerator : TorchGenerator;
  const { subseedStrength, seedResizeFromW: w, seedResizeFromH: h } = options;
  const own = seedOf(options, seed, i);
  if (!subseedStrength && w === undefined) return new Kind(own);
  const seed_resize_from = w === undefined || h === undefined ? undefined : ([h, w] as const);
  const variation = { subseed: subseedOf(options, i), subseed_strength: subseedStrength, seed_resize_from };
  return new VariedGenerator(own, variation, Kind);
}

/** The second pass of a request, but for what it is drawn over and follows. */
export const plannedSecond = (options: SampleOptions, base: Request, { width, height }: Sides): Request => ({
  ...base,
  ...{ width, height },
  ...hiresTexts(options, base),
  ...hiresScheduler(options, base),
  ...hiresSteps(options, base.num_inference_steps),
  base_steps: base.num_inference_steps,
  image: { shape: [], data: new Float32Array() },
});

/** What second passes have in common. */
export interface SecondPasses {
  options: SampleOptions;
  larger: Larger;
  /** As for the first. */
  inputs: Inputs;
  seed: number;
}

/** The second pass of the i-th request: over what `enlarge` makes of its latents, at the larger size and from its seed anew. */
export function hiresRequest(
  { options, larger, inputs, seed }: SecondPasses,
  requests: readonly Request[],
  i: number,
  enlarge: (draw: (count: number) => Float32Array) => Latents,
): Request {
  const generator = generatorOf(options, seed, i);
  const { width, height } = larger;
  const shown = <P extends Pixels>(pictures: readonly P[] = []) =>
    pictures.map((each) => shownOf(each, larger));
  const { ipAdapterImages, ipAdapterMasks } = inputs;
  const prompted = { ipAdapterImages, ipAdapterMasks: shown(ipAdapterMasks) };
  return {
    ...plannedSecond(options, requests[i], larger),
    image: enlarge((n) => generator.randn(n)),
    generators: [generator],
    ...controlRequest(options, shown(inputs.controls), width, height),
    ...adapterRequest(options, shown(inputs.adapterImages)),
    ...ipAdapterRequest(options, prompted, width, height),
    // As in the first pass: what is drawn over is no picture of the user's, over which ControlNets are followed less.
    controlnet_conditioning_scale: options.controlnet?.map((text) => controlnetOf(text).scale ?? 1),
    last: i === requests.length - 1,
  };
}

/** Where the refiner takes over the base's latents; undefined where it works over the finished picture. */
const handover = (options: SampleOptions): number | undefined =>
  options.denoisingStart ?? options.denoisingEnd;

/**
 * The refiner goes on from the base's latents, with the same generator and scheduler, or noises those of the finished
 * picture again. Beside half-finished ones a mask's picture stays what the mask keeps. FreeU is the base's alone.
 */
export function refinerRequest(options: SampleOptions, base: Request, drawn: Latents): Request {
  const denoising_start = handover(options);
  const beside = base.mask !== undefined && denoising_start !== undefined;
  return {
    ...base,
    ...guidanceAt(options.refinerGuidanceScale ?? options.guidanceScale, base),
    guidance_start: undefined,
    guidance_stop: undefined,
    freeu: undefined,
    image: beside ? base.image : drawn,
    latents: beside ? drawn : undefined,
    masked_content: undefined,
    image_guidance_scale: undefined,
    control_image: undefined,
    adapter_image: undefined,
    ip_adapter_image: undefined,
    ip_adapter_masks: undefined,
    // With --image the strength is the base's.
    strength: options.image ? 0.3 : options.strength,
    denoising_end: undefined,
    denoising_start,
  };
}
