// Writes A1111's `parameters` text: the prompt, perhaps a line `Negative prompt: `, then a line of `Name: value` fields. A field is there
// where A1111 would write it.
import { basename } from 'node:path';
import type { Request } from '../../models/request.ts';
import { takesEtaAncestral } from '../../models/samplers/config.ts';
import type { Sampler } from '../../models/samplers/sampler.ts';
import { version } from '../about.ts';
import { samplerFields } from './a1111_samplers.ts';
import { usualHires } from './hires_options.ts';
import type { SampleOptions } from './options.ts';

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

/** A1111 calls a network by its file, without a comma, which would end the field. */
export const upscalerName = (upscaler: string): string =>
  basename(upscaler)
    .replace(/\.\w+$/, '')
    .replaceAll(',', ' ');

/** As it has it: where there is a bracket, and its default does not hold. */
function emphasisField(options: SampleOptions, prompt: string): string[] {
  const { emphasis, negativePrompt, hiresPrompt, hiresNegativePrompt } = options;
  const texts = [prompt, negativePrompt, hiresPrompt, hiresNegativePrompt];
  if (emphasis === 'original' || !/[([]/.test(texts.join('\n'))) return [];
  const [first, ...rest] = emphasis.replace('-', ' ');
  return [`Emphasis: ${first.toUpperCase()}${rest.join('')}`];
}
