// What is asked of a pipeline, in the words of diffusers' SDXL pipelines. TypeScript holds a program to it while it is compiled; of
// JavaScript each key is held here, as one that is misspelt, or a text for a number, would be passed over or draw another picture.
import { seamlessAxes } from '../engine/circular.ts';
import { didYouMean, UserError } from '../io/errors.ts';
import { isRecord } from '../io/json.ts';
import { flag, listOf, type Rule, whole } from './checkpoint/config_values.ts';
import { controlBalances } from './control/control_balance.ts';
import type { ControlRequest } from './control/control_request.ts';
import type { InstructPix2PixRequest } from './control/instruct_pix2pix.ts';
import type { T2IAdapterRequest } from './control/t2i_adapter.ts';
import type { GuidanceRequest } from './denoiser_inputs.ts';
import type { IPAdapterRequest } from './ip_adapter/image_prompt.ts';
import { listed, type Texts } from './prompts.ts';
import { TorchGenerator } from './random/torch_random.ts';
import type { SchedulerConfig } from './samplers/config.ts';
import { latentContents, type StartRequest } from './start.ts';
import type { MicroConditioning } from './text/conditioning.ts';
import { emphases } from './text/emphasis.ts';
import type { APG } from './unet/apg.ts';
import type { CacheRequest } from './unet/deepcache.ts';
import { freeUNumbers } from './unet/freeu.ts';
import type { PAGRequest } from './unet/pag.ts';

/** What to draw, in the words of diffusers' SDXL pipelines. */
export interface Request
  extends GuidanceRequest,
    MicroConditioning,
    StartRequest,
    ControlRequest,
    T2IAdapterRequest,
    IPAdapterRequest,
    PAGRequest,
    InstructPix2PixRequest,
    CacheRequest {
  num_inference_steps: number;
  /** Of a second pass: the steps of the first, after which numbers in prompts that are edited count on, as A1111's. */
  base_steps?: number;
  /** The first pass's, where that of the second is another, which may call the network once in a step where the other does twice. */
  base_scheduler?: Request['scheduler'];
  /** Own timesteps, falling whole numbers, in place of the scheduler's and of `num_inference_steps`. */
  timesteps?: readonly number[];
  /** The same by noise level, ending with the level after the last step, mostly 0; Euler and EDM's two take them. */
  sigmas?: readonly number[];
  /** DDIM's noise, or gamma of TCD, 0 to 1; 0 where absent. */
  eta?: number;
  /** How much noise Euler a, DPM++ 2S a, DPM++ 2M SDE and their kin put into each step, 0 (none) to 1; 1 where absent. A1111's name for it. */
  eta_ancestral?: number;
  /** Replaces the checkpoint's scheduler or parts of its config. */
  scheduler?: { name?: string; config?: Partial<SchedulerConfig> };
  /** The part of the way, 0 to 1, after which a refiner takes over. */
  denoising_end?: number;
}

/**
 * A request as it may be written. What diffusers' text-to-image pipeline has defaults for may be left out: 50 steps, a guidance scale
 * of 5, the size that the model was trained at or that latents have; and the generator, which then has a random seed.
 */
export type Asked = Texts & Partial<Omit<Request, keyof Texts>>;

/**
 * `given` with the defaults filled in; null is what is left out, as None is in Python.
 * @throws UserError for a key that no request has, or a value of another kind
 */
export function complete(
  {
    ratio,
    sampleSize,
    sampleWidth = sampleSize,
  }: { ratio: number; sampleSize: number; sampleWidth?: number },
  given: Asked,
): Request {
  const asked = checked(given);
  const [height, width] = asked.latents?.shape.slice(2).map((side) => side * ratio) ?? [
    sampleSize,
    sampleWidth,
  ];
  return {
    ...listed(asked),
    num_inference_steps: stepsOf(asked) ?? 50,
    guidance_scale: asked.guidance_scale ?? 5,
    width: asked.width ?? width,
    height: asked.height ?? height,
    generators: asked.generators ?? [new TorchGenerator(Math.floor(Math.random() * 2 ** 32))],
  };
}

/** As many as the lists of own ones come to. */
export const stepsOf = ({
  timesteps,
  sigmas,
  num_inference_steps,
}: Partial<Pick<Request, 'timesteps' | 'sigmas' | 'num_inference_steps'>>): number | undefined =>
  timesteps?.length ?? (sigmas && sigmas.length - 1) ?? num_inference_steps;

const isText = (value: unknown): boolean => typeof value === 'string';
const isNumber = (value: unknown): boolean => Number.isFinite(value);
const every = (value: unknown, holds: (each: unknown) => boolean): boolean =>
  Array.isArray(value) && value.length > 0 && value.every(holds);
const some = (what: string, holds: (each: unknown) => boolean): Rule => listOf(what, holds, 1);

const texts: Rule = ['a text, or a list of texts', (value) => isText(value) || every(value, isText)];
const finite: Rule = ['a number', isNumber];
const atLeast0: Rule = ['a number from 0', (value) => isNumber(value) && (value as number) >= 0];
const part: Rule = [
  'a number from 0 to 1',
  (value) => isNumber(value) && Number(value) >= 0 && Number(value) <= 1,
];
const pair = (words: string): Rule => [
  `[${words}]`,
  (value) => every(value, isNumber) && (value as unknown[]).length === 2,
];
const size = pair('height, width');
const corner = pair('top, left');
const isLatents = (value: unknown): boolean =>
  isRecord(value) && value.data instanceof Float32Array && every(value.shape, Number.isInteger);
const pixels = (how: string): Rule => [`{ data, shape } as ${how} gives it`, isLatents];
const embeds = pixels('encodePrompt');
const isPicture = (value: unknown): boolean =>
  isRecord(value) && value.data instanceof Uint8Array && isNumber(value.width) && isNumber(value.height);
const isGenerator = (value: unknown): boolean => isRecord(value) && typeof value.randn === 'function';
const isNone = (value: unknown): boolean => (value ?? null) === null;
const each: Rule = [
  'a number, or a list of one for each',
  (value) => isNumber(value) || every(value, (one) => isNone(one) || isNumber(one)),
];
const isFreeU = (value: object): boolean =>
  Object.keys(value).sort().join() === [...freeUNumbers].sort().join() &&
  Object.values(value).every((one) => atLeast0[1](one));
const isAPG = ({ momentum, rescale, eta, ...more }: { [K in keyof APG]?: unknown }): boolean =>
  isNumber(momentum) &&
  Math.abs(Number(momentum)) <= 1 &&
  atLeast0[1](rescale) &&
  isNumber(eta) &&
  Object.keys(more).length === 0;
const isBalance = (value: unknown): boolean => controlBalances.some((one) => one === value);
/** What it holds is told of beside the UNet. */
const isScaleOrNone = (value: unknown): boolean =>
  isNone(value) || isNumber(value) || isRecord(value) || every(value, isNumber);

/** Numbers whose bounds depend on the scheduler are its own to tell. */
const anyNumber: Rule = ['a number', (value) => typeof value === 'number'];

const schedulerRule: Rule = [
  '{ name, config }, each perhaps left out',
  (value) =>
    isRecord(value) &&
    (value.name === undefined || isText(value.name)) &&
    (value.config === undefined || isRecord(value.config)),
];

const rules: Readonly<Record<keyof Asked, Rule>> = {
  prompt: texts,
  prompt_2: texts,
  negative_prompt: texts,
  negative_prompt_2: texts,
  prompt_weights: some('numbers', isNumber),
  prompt_embeds: embeds,
  pooled_prompt_embeds: embeds,
  negative_prompt_embeds: embeds,
  negative_pooled_prompt_embeds: embeds,
  max_token_length: anyNumber,
  clip_skip: whole(0),
  emphasis: [`one of ${emphases.join(', ')}`, (value) => emphases.some((each) => each === value)],
  width: anyNumber,
  height: anyNumber,
  num_inference_steps: anyNumber,
  base_steps: whole(1),
  timesteps: listOf('numbers', isNumber),
  sigmas: listOf('numbers', isNumber),
  eta: anyNumber,
  eta_ancestral: anyNumber,
  guidance_scale: finite,
  guidance_rescale: part,
  adaptive_projected_guidance: [
    '{ momentum, rescale, eta }: a number from -1 to 1, one from 0, and any',
    (value) => isRecord(value) && isAPG(value),
  ],
  guidance_start: part,
  guidance_stop: part,
  image_guidance_scale: atLeast0,
  pag_scale: atLeast0,
  pag_adaptive_scale: atLeast0,
  pag_applied_layers: texts,
  freeu: [
    `{ ${freeUNumbers.join(', ')} }, each a number from 0`,
    (value) => isRecord(value) && isFreeU(value),
  ],
  cache_interval: whole(1),
  cache_branch_id: whole(0),
  num_images_per_prompt: whole(1),
  generators: listOf('TorchGenerator or CudaGenerator', isGenerator),
  base_scheduler: schedulerRule,
  scheduler: schedulerRule,
  image: pixels('preprocess'),
  mask: pixels('preprocessMask'),
  masked_content: [
    `one of ${latentContents.join(', ')}`,
    (value) => latentContents.some((each) => each === value),
  ],
  strength: anyNumber,
  latents: pixels('denoiseToEnd'),
  denoising_start: anyNumber,
  denoising_end: anyNumber,
  control_image: some('{ data, shape } as preprocessControl gives it', isLatents),
  control_mode: each,
  controlnet_conditioning_scale: each,
  control_guidance_start: each,
  control_guidance_end: each,
  guess_mode: flag,
  control_balance: [
    `one of ${controlBalances.join(', ')}, or a list of one for each`,
    (value) => isBalance(value) || every(value, (one) => isNone(one) || isBalance(one)),
  ],
  adapter_image: some('pictures as readPicture gives them', isPicture),
  adapter_conditioning_scale: each,
  adapter_conditioning_factor: part,
  ip_adapter_image: some(
    'pictures as readPicture gives them, or of lists of them',
    (one) => isPicture(one) || (Array.isArray(one) && one.every(isPicture)),
  ),
  ip_adapter_scale: [
    'a number, or numbers by block such as { up: { block_0: [0, 1, 0] } }, or a list of one for each',
    (value) => isNumber(value) || isRecord(value) || every(value, isScaleOrNone),
  ],
  ip_adapter_masks: some(
    '{ data, shape } as preprocessMask gives it, or of lists of them',
    (one) => isNone(one) || isLatents(one) || every(one, isLatents),
  ),
  original_size: size,
  crops_coords_top_left: corner,
  target_size: size,
  negative_original_size: size,
  negative_crops_coords_top_left: corner,
  negative_target_size: size,
  aesthetic_score: finite,
  negative_aesthetic_score: finite,
  vae_tiling: flag,
  seamless: [`one of ${seamlessAxes.join(', ')}`, (value) => seamlessAxes.some((axes) => axes === value)],
  last: flag,
};

/** What is typed for our keys by habit, where no key is spelled alike. */
const foreign: Readonly<Record<string, string>> = {
  seed: 'generators: [new TorchGenerator(SEED)]',
  steps: 'num_inference_steps',
  cfg_scale: 'guidance_scale',
  mask_image: 'mask, by preprocessMask',
};

/** What is given of a request. @throws UserError */
function checked(asked: Asked): Asked {
  if (!isRecord(asked)) throw new UserError(`the request is ${shown(asked)}: give an object with a prompt`);
  // What encodePrompt gives may be spread into a request, the texts that it cut off beside the embeddings.
  const given = Object.entries(asked).filter(
    ([key, value]) => (value ?? null) !== null && key !== 'truncated',
  );
  for (const [key, value] of given) {
    if (!Object.hasOwn(rules, key))
      throw new UserError(
        `a request has no ${key}${Object.hasOwn(foreign, key) ? `; here it is ${foreign[key]}` : didYouMean(key, Object.keys(rules))}`,
      );
    const [want, holds] = rules[key as keyof Asked];
    if (!holds(value)) throw new UserError(`${key} is ${shown(value)}: give ${want}`);
  }
  const request = Object.fromEntries(given) as unknown as Asked;
  if (request.mask && !request.image)
    throw new UserError('mask needs image: the picture to paint in, by preprocess');
  if (request.masked_content && !request.mask)
    throw new UserError('masked_content needs mask: where to paint anew, by preprocessMask');
  return request;
}

/** A value, in as many words as a sentence takes. */
export function shown(value: unknown): string {
  if (typeof value === 'function') return 'a function';
  if (isRecord(value)) {
    const { name } = value.constructor ?? Object;
    return name === 'Object' ? cut(`{ ${Object.keys(value).join(', ')} }`) : `a ${name}`;
  }
  if (typeof value === 'string') return cut(`"${value}"`);
  return Array.isArray(value) ? cut(`[${value.map(shown).join(', ')}]`) : String(value);
}

const cut = (text: string): string => (text.length > 60 ? `${text.slice(0, 60)}...` : text);
