// Reads A1111's `parameters` text, which picture sites and other programs read and write too: the prompt, perhaps a line
// `Negative prompt: `, then a line of `Name: value` fields. What is read is in the words of our own flags.
import { schedulerOf } from './a1111_samplers.ts';
import { hiresUpscalers } from './hires_options.ts';
import type { SampleOptions } from './options.ts';

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

/**
 * What a1111_write.ts has quoted, as all of a value: other texts may have quotation marks. Without a choice for each letter, of which a
 * picture's text may have millions.
 */
const quotedText = /(?<=: )"[^"\\]*(?:\\.[^"\\]*)*"(?=,|$)/g;

/** What was written so; what is no JSON is the text itself. */
export function unquoted(text: string | undefined): string | undefined {
  if (!text?.startsWith('"')) return text;
  try {
    return String(JSON.parse(text));
  } catch {
    return text;
  }
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

function splitLast(text: string): [string, string?] {
  const at = text.lastIndexOf('\nSteps: ');
  if (at < 0) return text.startsWith('Steps: ') ? ['', text] : [text];
  return [text.slice(0, at), text.slice(at + 1)];
}
