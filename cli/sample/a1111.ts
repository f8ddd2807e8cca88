// A1111's `parameters` text, which picture sites and other programs read and write too: the prompt, perhaps a line
// `Negative prompt: `, then a line of `Name: value` fields. What is read here is in the words of our own flags.
import { basename } from 'node:path';
import type { Request } from '../../models/request.ts';
import {
  layoutOptions,
  type SigmaSchedule,
  sigmaSchedules,
  takesEtaAncestral,
} from '../../models/samplers/config.ts';
import { isSamplerName, plainSpelling } from '../../models/samplers/registry.ts';
import type { Sampler } from '../../models/samplers/sampler.ts';
import { version } from '../about.ts';
import { hiresUpscalers, usualHires } from './hires_options.ts';
import type { SampleOptions } from './options.ts';

/** Its names of our schedulers, where it has them. */
export const samplerLabels: Readonly<Record<string, string>> = {
  EulerDiscreteScheduler: 'Euler',
  EulerAncestralDiscreteScheduler: 'Euler a',
  HeunDiscreteScheduler: 'Heun',
  KDPM2DiscreteScheduler: 'DPM2',
  KDPM2AncestralDiscreteScheduler: 'DPM2 a',
  DPMSolverSDEScheduler: 'DPM++ SDE',
  DPMSolverMultistepScheduler: 'DPM++ 2M',
  LMSDiscreteScheduler: 'LMS',
  DDIMScheduler: 'DDIM',
  PNDMScheduler: 'PLMS',
  UniPCMultistepScheduler: 'UniPC',
  LCMScheduler: 'LCM',
};

/** Its schedule types with our names of them. Two of them are others of its own, under further names. */
const typesByLabel: Readonly<Record<string, SigmaSchedule>> = {
  Uniform: 'normal',
  Karras: 'karras',
  Exponential: 'exponential',
  Polyexponential: 'exponential',
  'SGM Uniform': 'sgm_uniform',
  'KL Optimal': 'kl_optimal',
  'Align Your Steps': 'align_your_steps',
  Simple: 'simple',
  Normal: 'normal',
  DDIM: 'ddim_uniform',
  Beta: 'beta',
  Turbo: 'turbo', // Forge's
};

/** The schedule types to offer: what stands for its choice, its own, and ours that it has not, under our names. */
export const scheduleTypes: readonly string[] = [
  'Automatic',
  ...Object.keys(typesByLabel),
  ...sigmaSchedules.filter((each) => !Object.values(typesByLabel).includes(each)),
];

/** The schedule types that its samplers take by themselves ("Automatic"), where it is not Uniform. */
const ownTypes: Readonly<Record<string, string>> = {
  'DPM++ 2M': 'Karras',
  'DPM++ SDE': 'Karras',
  'DPM++ 2M SDE': 'Exponential',
  'DPM++ 2M SDE Heun': 'Exponential',
  DPM2: 'Karras',
  'DPM2 a': 'Karras',
};

/** Its samplers that have a schedule type; the others go by the model's timesteps. */
const hasScheduleType = (sampler: string): boolean => /^(euler|heun|lms|dpm)/i.test(sampler);

export function writeParameters(
  options: SampleOptions,
  {
    prompt: [prompt = ''] = [],
    width,
    height,
    num_inference_steps,
    guidance_scale,
    image,
    strength,
  }: Request,
  seed: number,
  sampler: Sampler,
  hiresSampler?: Sampler,
): string {
  const negative = options.negativePrompt ? `\nNegative prompt: ${options.negativePrompt}` : '';
  const fields = [
    `Steps: ${num_inference_steps}`,
    ...samplerFields(sampler),
    `CFG scale: ${guidance_scale}`,
    `Seed: ${seed}`,
    `Size: ${width}x${height}`,
    ...variationFields(options),
    ...etaFields(options, sampler),
    ...(image && strength !== undefined ? [`Denoising strength: ${strength}`] : []),
    ...maskFields(options),
    ...hiresFields(options),
    ...hiresSamplerFields(sampler, hiresSampler),
    ...(options.seamless === 'xy' ? ['Tiling: True'] : []),
    ...(options.rng === 'cpu' ? ['RNG: CPU'] : []), // its own is a GPU's
    ...emphasisField(options, prompt),
    `Version: sdxl ${version}`,
  ];
  return `${prompt}${negative}\n${fields.join(', ')}`;
}

function variationFields(options: SampleOptions): string[] {
  const { subseed, subseedStrength, seedResizeFromW: w, seedResizeFromH: h } = options;
  return [
    ...(subseed === undefined ? [] : [`Variation seed: ${subseed}`]),
    ...(subseedStrength ? [`Variation seed strength: ${subseedStrength}`] : []),
    ...(w === undefined || h === undefined ? [] : [`Seed resize from: ${w}x${h}`]),
  ];
}

/** As it has them: where they say something. */
function etaFields({ eta = 0, etaAncestral = 1 }: SampleOptions, { name, config }: Sampler): string[] {
  return [
    ...(eta !== 0 && name === 'DDIMScheduler' ? [`Eta DDIM: ${eta}`] : []),
    ...(etaAncestral !== 1 && takesEtaAncestral(name, config) ? [`Eta: ${etaAncestral}`] : []),
  ];
}

function maskFields({ mask, invertMask, maskBlur, paddingMaskCrop, maskedContent }: SampleOptions): string[] {
  if (!mask) return [];
  return [
    ...(invertMask ? ['Mask mode: Inpaint not masked'] : []),
    ...(maskBlur ? [`Mask blur: ${maskBlur}`] : []),
    ...(paddingMaskCrop === undefined
      ? []
      : ['Inpaint area: Only masked', `Masked area padding: ${paddingMaskCrop}`]),
    ...(['original', undefined].includes(maskedContent)
      ? []
      : [`Masked content: ${maskedContent?.replace('-', ' ')}`]),
  ];
}

function hiresFields(options: SampleOptions): string[] {
  const { hires, hiresScale, hiresWidth, hiresHeight, hiresSteps } = options;
  if (!hires) return [];
  const isSized = hiresWidth !== undefined || hiresHeight !== undefined;
  const { hiresPrompt, hiresNegativePrompt, hiresGuidanceScale } = options;
  return [
    `Denoising strength: ${options.hiresDenoisingStrength ?? usualHires.strength}`,
    ...(hiresPrompt ? [`Hires prompt: ${quoted(hiresPrompt)}`] : []),
    ...(hiresNegativePrompt ? [`Hires negative prompt: ${quoted(hiresNegativePrompt)}`] : []),
    ...(hiresGuidanceScale === undefined ? [] : [`Hires CFG Scale: ${hiresGuidanceScale}`]),
    isSized
      ? `Hires resize: ${hiresWidth ?? 0}x${hiresHeight ?? 0}`
      : `Hires upscale: ${hiresScale ?? usualHires.scale}`,
    ...(hiresSteps === undefined ? [] : [`Hires steps: ${hiresSteps}`]),
    `Hires upscaler: ${upscalerName(options.hiresUpscaler ?? usualHires.upscaler)}`,
  ];
}

/** What a second pass's has otherwise than the first's. */
function hiresSamplerFields(first: Sampler, second?: Sampler): string[] {
  const before = samplerFields(first);
  return (second ? samplerFields(second) : [])
    .filter((field) => !before.includes(field))
    .map((field) => `Hires ${field[0].toLowerCase()}${field.slice(1)}`);
}

/** A text that could be taken for more fields, or for quoted itself, is written as JSON. */
const quoted = (text: string): string => (/[,:\n]|^"/.test(text) ? JSON.stringify(text) : text);

/** As all of a value: other texts may have quotation marks. */
const quotedText = /(?<=: )"(?:[^"\\]|\\.)*"(?=,|$)/g;

/** What was written so; what is no JSON is the text itself. */
function unquoted(text: string | undefined): string | undefined {
  if (!text?.startsWith('"')) return text;
  try {
    return String(JSON.parse(text));
  } catch {
    return text;
  }
}

/** A1111 calls a network by its file, without a comma, which would end the field. */
export const upscalerName = (upscaler: string): string =>
  basename(upscaler)
    .replace(/\.\w+$/, '')
    .replaceAll(',', ' ');

function samplerFields({ name, config }: Sampler): string[] {
  const sde = config.algorithm_type?.startsWith('sde') ? ' SDE' : '';
  const heun = sde && config.solver_type === 'heun' ? ' Heun' : '';
  const label = name in samplerLabels ? `${samplerLabels[name]}${sde}${heun}` : name;
  const type = scheduleType(config) ?? (hasScheduleType(label) ? spacingType(config) : undefined);
  return [`Sampler: ${label}`, ...(type ? [`Schedule type: ${type}`] : [])];
}

function scheduleType({ sigma_data, sigma_schedule, ...config }: Sampler['config']): string | undefined {
  if (sigma_data) return undefined; // EDM's are none of its
  const options = Object.keys(layoutOptions) as (keyof typeof layoutOptions)[];
  const schedule = sigma_schedule ?? options.find((each) => config[layoutOptions[each]]);
  return Object.keys(typesByLabel).find((label) => typesByLabel[label] === schedule) ?? schedule;
}

/** The nearest to diffusers' spacings, from which it is a rounding away. */
const spacingType = ({ timestep_spacing }: Sampler['config']): string | undefined =>
  ({ trailing: 'SGM Uniform', linspace: 'Uniform', leading: undefined })[timestep_spacing];

/** As it has it: where there is a bracket, and its default does not hold. */
function emphasisField(options: SampleOptions, prompt: string): string[] {
  const { emphasis, negativePrompt, hiresPrompt, hiresNegativePrompt } = options;
  const texts = [prompt, negativePrompt, hiresPrompt, hiresNegativePrompt];
  if (emphasis === 'original' || !/[([]/.test(texts.join('\n'))) return [];
  const [first, ...rest] = emphasis.replace('-', ' ');
  return [`Emphasis: ${first.toUpperCase()}${rest.join('')}`];
}

/** Fields that a picture depends on and that are not read, with our option for the same. */
const unread: Readonly<Record<string, keyof SampleOptions | undefined>> = {
  Model: 'model',
  VAE: 'vae',
  Refiner: 'refiner',
  'Denoising strength': 'strength',
  'Mask mode': 'invertMask',
  'Mask blur': 'maskBlur',
  'Masked area padding': 'paddingMaskCrop',
  'Masked content': 'maskedContent',
  'ControlNet 0': 'controlnet',
  'Hires checkpoint': undefined,
  freeu_enabled: 'freeu', // Forge's, which is FreeU's second version
};

export interface Parameters {
  /** Values by our options' names, as they would be typed. */
  settings: Record<string, string | true | undefined>;
  /** What else made the picture, with the option that would do it here. */
  further: { text: string; option?: keyof SampleOptions }[];
}

/** What gives the values of a line's fields. What is quoted may have commas, and what looks like fields. */
function fieldsOf(line: string): (name: string) => string | undefined {
  const texts = line.match(quotedText) ?? [];
  let count = 0;
  const fields = line.replace(quotedText, () => `"${count++}"`);
  return (name) => {
    const value = new RegExp(`(?:^|, )${name}: ([^,]+)`).exec(fields)?.[1];
    return unquoted(value?.replace(/^"(\d+)"$/, (_, i) => texts[i]));
  };
}

/** What names LoRAs and hypernetworks, but for what a caller heeds. */
const tagsUntaken = (keepsLoras: boolean): RegExp =>
  keepsLoras ? / ?<hypernet:[^<>]+>/g : / ?<(lora|lyco|hypernet):[^<>]+>/g;

/** What a text says; `keepsLoras` leaves what names them in the prompt, for callers that heed it. */
export function readParameters(text: string, keepsLoras = false): Parameters {
  const [body, last = ''] = splitLast(text);
  const [prompt, negative] = body.split(/\n?Negative prompt: /, 2);
  const field = fieldsOf(last);
  const sides = (name: string) => (field(name) ?? '').split('x').map((side) => side || undefined);
  const [width, height] = sides('Size');
  const [seedResizeFromW, seedResizeFromH] = sides('Seed resize from');
  const strength = field('Variation seed strength');
  // In its negative prompt they are words; out of the other it takes them, and the file's fields have their hashes.
  const untaken = tagsUntaken(keepsLoras);
  const [program = ''] = (field('Version') ?? '').split(' ');
  const ours = program === 'sdxl';
  const hires = hiresOf(field, ours);
  const { unheeded, ...scheduler } = schedulerOf(field('Sampler'), field('Schedule type'), ours);
  return {
    settings: {
      prompt: prompt.replace(untaken, '').trim(),
      negativePrompt: negative?.trim(),
      steps: field('Steps'),
      sigmas: /Custom Sigmas: \[([^\]]+)\]/.exec(last)?.[1], // stable-diffusion.cpp's
      guidanceScale: field('CFG scale'),
      seed: field('Seed'),
      subseed: strength && field('Variation seed'),
      subseedStrength: strength,
      eta: field('Eta DDIM'),
      // stable-diffusion.cpp writes one of 0 for all, which long was DDIM's alone.
      etaAncestral: program === 'stable-diffusion.cpp' ? undefined : field('Eta'),
      ...{ seedResizeFromW, seedResizeFromH },
      emphasis: (field('Emphasis') ?? 'Original').toLowerCase().replace(' ', '-'),
      rng: /^cpu/i.test(field('RNG') ?? '') ? 'cpu' : 'cuda',
      ...scheduler,
      ...hires?.settings,
      ...{ width, height },
      seamless: field('Tiling') === 'True' ? 'xy' : undefined,
    },
    further: [
      ...[...new Set(prompt.match(untaken)?.map((tag) => tag.trim()))].map((tag) => further(tag, 'lora')),
      ...(hires?.untaken ? [further(hires.untaken, 'hires')] : []),
      ...(unheeded ? [further(`Schedule type: ${unheeded}`, 'scheduler')] : []),
      ...(hires?.unheeded ? [further(`Hires schedule type: ${hires.unheeded}`, 'hiresScheduler')] : []),
      ...unreadOf(field, hires !== undefined),
    ],
  };
}

type Further = Parameters['further'][number];

const further = (text: string, option?: keyof SampleOptions): Further => ({ text, option });

/** Fields that are there and not read; a second pass's strength is. */
const unreadOf = (field: (name: string) => string | undefined, hires: boolean): Further[] =>
  Object.entries(unread)
    .filter(([name]) => field(name) !== undefined && !(hires && name === 'Denoising strength'))
    .map(([name, option]) => further(`${name}: ${field(name)}`, option));

/**
 * The sampler with its layout of noise levels behind it. Its samplers begin at the last training step, as from `linspace`, and where no
 * type is said go evenly down from there; `ours` go by the model's spacing then: SDXL's published scheduler begins lower.
 */
export function schedulerOf(
  text: string | undefined,
  given = '',
  ours = false,
): {
  scheduler?: string;
  timestepSpacing?: 'linspace';
  /** A type that is not there. */
  unheeded?: string;
} {
  const [sampler, type = given] = withType(text);
  if (sampler === undefined || !(ours ? type : hasScheduleType(sampler))) return { scheduler: sampler };
  const label = Object.keys(ownTypes).find((each) => plainSpelling(each) === plainSpelling(sampler));
  const own = type === 'Automatic' && label ? ownTypes[label] : 'Uniform';
  const isSaid = !['', 'Automatic'].includes(type);
  const named = `${sampler} ${isSaid ? type : own}`;
  const isKnown = isSamplerName(named);
  // Before 1.9 the sampler's name ended with the type.
  const isUnheeded = isSaid && !isKnown && !sampler.endsWith(type);
  return {
    scheduler: isKnown ? named : sampler,
    timestepSpacing: 'linspace',
    unheeded: isUnheeded ? type : undefined,
  };
}

/**
 * Its second pass over the picture enlarged. Where it names no upscaler it is a plain one of latents; stable-diffusion.cpp has the
 * upscaler's name in the scale's place, and zeros for what is not said.
 */
function hiresOf(field: (name: string) => string | undefined, ours: boolean) {
  const [upscale, resize] = [field('Hires upscale'), field('Hires resize')];
  if ((upscale ?? resize) === undefined) return undefined;
  const named = upscale !== undefined && !/^[\d.]+$/.test(upscale);
  const upscaler = field('Hires upscaler') ?? (named ? upscale : 'Latent');
  const scale = named ? field('Hires scale') : upscale;
  if (!hiresUpscalers.some((each) => each === upscaler))
    return { untaken: `a second pass by the upscaler ${upscaler}` };
  const [width, height] = (resize ?? '').split('x').map((text) => (Number(text) > 0 ? text : undefined));
  const steps = field('Hires steps');
  const own = hiresSchedulerOf(field, ours);
  return {
    unheeded: own.unheeded,
    settings: {
      hires: true as const,
      hiresUpscaler: upscaler,
      hiresDenoisingStrength: field('Denoising strength'),
      hiresScale: (width ?? height) ? undefined : scale,
      hiresWidth: width,
      hiresHeight: height,
      hiresSteps: Number(steps) > 0 ? steps : undefined,
      hiresPrompt: field('Hires prompt'),
      hiresNegativePrompt: field('Hires negative prompt'),
      hiresGuidanceScale: field('Hires CFG Scale'),
      hiresScheduler: own.scheduler,
      hiresTimestepSpacing: own.timestepSpacing,
    },
  };
}

/** The sampler of a second pass that has its own, or its own schedule type: what is not said is as in the first. */
function hiresSchedulerOf(
  field: (name: string) => string | undefined,
  ours: boolean,
): ReturnType<typeof schedulerOf> {
  const [sampler, type] = [field('Hires sampler'), field('Hires schedule type')];
  if ((sampler ?? type) === undefined) return {};
  return schedulerOf(sampler ?? field('Sampler'), type ?? field('Schedule type'), ours);
}

/** stable-diffusion.cpp's names of layouts that are other levels here, or none. */
const theirLayouts: Readonly<Record<string, string>> = {
  discrete: 'normal',
  kl_optimal: 'kl_optimal_zero',
  beta: 'beta_timesteps',
};

/** stable-diffusion.cpp puts a layout behind its sampler, where it names one: `euler_a discrete`. */
function withType(text: string | undefined): [sampler: string | undefined, type?: string] {
  const [, sampler, layout] = /^([a-z0-9+_]+) (\w+)$/.exec(text ?? '') ?? [];
  return sampler === undefined ? [text] : [sampler, theirLayouts[layout] ?? layout];
}

function splitLast(text: string): [string, string?] {
  const at = text.lastIndexOf('\nSteps: ');
  if (at < 0) return text.startsWith('Steps: ') ? ['', text] : [text];
  return [text.slice(0, at), text.slice(at + 1)];
}
