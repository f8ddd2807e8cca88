// The flags of `sdxl sample` for a second pass over the picture enlarged (A1111's hires. fix), in stable-diffusion.cpp's words, what can
// be known to be wrong with them, and the request that they come to. As there, so many steps are done as are asked for, of a schedule
// that is longer by the strength, where --strength does a part of the steps; and the seed begins anew.
import type { Command } from 'commander';
import { UserError } from '../../io/errors.ts';
import { preprocess } from '../../io/image.ts';
import type { Picture, Pixels } from '../../io/pixels.ts';
import { resize } from '../../io/resize.ts';
import { isWeightsFile } from '../../models/checkpoint/weights_file.ts';
import { decode, type Pipeline } from '../../models/pipeline.ts';
import type { Request } from '../../models/request.ts';
import type { SchedulerConfig } from '../../models/samplers/config.ts';
import { createSampler } from '../../models/samplers/registry.ts';
import { composed } from '../../models/text/composed.ts';
import type { Prompts } from '../../models/text/conditioning.ts';
import { enlargeTo, type Upscaler } from '../../models/upscaler/upscaler.ts';
import { type Interpolation, interpolate } from '../../models/vae/interpolate.ts';
import { encodeImage, type Latents, middleOf, stacked, type VaeRequest } from '../../models/vae/latents.ts';
import { number, oneOf, side } from '../option_values.ts';
import { guidanceAt } from './guidance_options.ts';

/** Of latents, how torch interpolates them; of pictures, Pillow's filter. Their names are A1111's. */
const upscalers = {
  Latent: { mode: 'bilinear' },
  'Latent (nearest)': { mode: 'nearest' },
  'Latent (nearest-exact)': { mode: 'nearest-exact' },
  'Latent (antialiased)': { mode: 'bilinear', antialias: true },
  'Latent (bicubic)': { mode: 'bicubic' },
  'Latent (bicubic antialiased)': { mode: 'bicubic', antialias: true },
  Lanczos: 'lanczos',
  Nearest: 'nearest',
} as const satisfies Record<string, Interpolation | 'lanczos' | 'nearest'>;
export const hiresUpscalers = Object.keys(upscalers) as (keyof typeof upscalers)[];

/** Whether it is a network's file that enlarges, and none of the ways above. */
export const namesNetwork = (upscaler: string | undefined): upscaler is string =>
  upscaler !== undefined && isWeightsFile(upscaler);

const upscalerOf = (text: string): string =>
  namesNetwork(text) ? text : oneOf('--hires-upscaler', [...hiresUpscalers, 'FILE.safetensors'])(text);

/** What stands where nothing is typed. */
export const usualHires = { scale: 2, strength: 0.7, upscaler: 'Latent' } as const;

export interface HiresOptions {
  hires?: boolean;
  hiresScale?: number;
  hiresWidth?: number;
  hiresHeight?: number;
  hiresSteps?: number;
  hiresDenoisingStrength?: number;
  hiresUpscaler?: string;
  hiresPrompt?: string;
  hiresNegativePrompt?: string;
  hiresGuidanceScale?: number;
  hiresScheduler?: string;
  hiresTimestepSpacing?: SchedulerConfig['timestep_spacing'];
}

export const addHiresOptions = (command: Command): Command =>
  command
    .optionsGroup('Larger (a second pass over the picture enlarged, or the finished one):')
    .option('--hires', 'draw as usual, enlarge, and draw over it')
    .option('--hires-scale <F>', 'how much larger (default: 2)', number('--hires-scale', { min: 1, max: 8 }))
    .option('--hires-width <N>', 'or how wide; alone it keeps the shape', side('--hires-width'))
    .option(
      '--hires-height <N>',
      'or how high; what both leave of another shape is cut off at its sides',
      side('--hires-height'),
    )
    .option(
      '--hires-steps <N>',
      'steps of the second pass (default: --steps)',
      number('--hires-steps', { min: 1, max: 1000, whole: true }),
    )
    .option(
      '--hires-denoising-strength <F>',
      'how far it may leave the first, above 0 to 1 (default: 0.7)',
      number('--hires-denoising-strength', { min: 0.01, max: 1 }),
    )
    .option(
      '--hires-upscaler <NAME>',
      `${hiresUpscalers.join(', ')} (default: Latent), or a network as --upscale-model takes; with Lanczos, Nearest and networks the picture is enlarged`,
      upscalerOf,
    )
    .option('--hires-prompt <TEXT>', 'what to draw in the second pass (default: the prompt)')
    .option('--hires-negative-prompt <TEXT>', 'what not to draw in it (default: the negative prompt)')
    .option(
      '--hires-guidance-scale <F>',
      'default: --guidance-scale',
      number('--hires-guidance-scale', { min: 0 }),
    )
    .option(
      '--hires-scheduler <NAME>',
      'of the second pass, named as --scheduler; --karras and --timestep-spacing are not meant then (default: that of the first)',
    )
    .option(
      '--hires-timestep-spacing <NAME>',
      'and its leading, trailing or linspace',
      oneOf('--hires-timestep-spacing', ['leading', 'trailing', 'linspace']),
    );

/** @throws UserError for flags that say nothing or contradict each other */
export function checkHires(options: HiresOptions & HiresRivals): void {
  const idle = Object.entries({
    '--hires-scale': options.hiresScale,
    '--hires-width': options.hiresWidth,
    '--hires-height': options.hiresHeight,
    '--hires-steps': options.hiresSteps,
    '--hires-denoising-strength': options.hiresDenoisingStrength,
    '--hires-upscaler': options.hiresUpscaler,
    '--hires-prompt': options.hiresPrompt,
    '--hires-negative-prompt': options.hiresNegativePrompt,
    '--hires-guidance-scale': options.hiresGuidanceScale,
    '--hires-scheduler': options.hiresScheduler,
    '--hires-timestep-spacing': options.hiresTimestepSpacing,
  }).find(([, value]) => value !== undefined);
  if (!options.hires) {
    if (idle) throw new UserError(`${idle[0]} needs --hires: a second pass`);
    return;
  }
  if (options.hiresScale !== undefined && (options.hiresWidth ?? options.hiresHeight) !== undefined)
    throw new UserError(
      '--hires-scale says how large, and so do --hires-width and --hires-height; give one of them',
    );
  if (options.hiresScheduler !== undefined) createSampler(options.hiresScheduler);
  else if (options.hiresTimestepSpacing !== undefined)
    throw new UserError(
      '--hires-timestep-spacing needs --hires-scheduler: the same one again has the spacing of the first pass',
    );
  const rival = rivals.find(([name]) => options[name] !== undefined);
  if (rival) throw new UserError(`--hires draws from a prompt alone: ${rival[1]}`);
}

/** Options that a second pass does not go with, and what there is instead. */
const rivals = [
  ['image', 'over a picture give a larger --width and --height'],
  ['refiner', 'leave out --refiner, or refine its picture in a call of its own, as --image'],
  ['denoisingEnd', 'leave out --denoising-end'],
  ['timesteps', 'give --steps in place of --timesteps'],
  ['sigmas', 'give --steps in place of --sigmas'],
] as const;
type HiresRivals = Partial<Record<(typeof rivals)[number][0], unknown>>;

export interface Sides {
  width: number;
  height: number;
}

/** The size of the second pass. */
export interface Larger extends Sides {
  /** That of the picture enlarged, whose middle is drawn over where it has another shape. */
  uncut: Sides;
}

/** How large the second pass is, cut to whole latents; undefined where there is none. @throws UserError */
export function hiresSize(
  options: HiresOptions,
  { width, height }: Sides,
  ratio: number,
): Larger | undefined {
  const { hires, hiresScale = usualHires.scale, hiresWidth, hiresHeight } = options;
  if (!hires) return undefined;
  if (hiresWidth !== undefined && hiresHeight !== undefined)
    return cutFrom({ width, height }, { width: hiresWidth, height: hiresHeight });
  // The product first: a quotient that is rounded could come out below a whole number, and lose a latent's pixels.
  const larger = (pixels: number): number =>
    hiresWidth !== undefined
      ? (pixels * hiresWidth) / width
      : hiresHeight !== undefined
        ? (pixels * hiresHeight) / height
        : pixels * hiresScale;
  const floored = (pixels: number) => Math.floor(pixels) - (Math.floor(pixels) % ratio);
  const size = {
    width: hiresWidth ?? floored(larger(width)),
    height: hiresHeight ?? floored(larger(height)),
  };
  return { ...size, uncut: size };
}

/** As A1111 does it: the picture is enlarged in its own shape until it covers what is asked for. @throws UserError for a thin strip */
function cutFrom({ width, height }: Sides, asked: Sides): Larger {
  const isHigher = height * asked.width > width * asked.height; // than what is asked for
  const uncut = isHigher
    ? { width: asked.width, height: Math.floor((asked.width * height) / width) }
    : { width: Math.floor((asked.height * width) / height), height: asked.height };
  if (uncut.width * uncut.height > 4 * asked.width * asked.height)
    throw new UserError(
      `--hires-width and --hires-height would leave less than a quarter of a picture of ${width}x${height}, enlarged to ${uncut.width}x${uncut.height}: give sides nearer to its shape`,
    );
  return { ...asked, uncut };
}

/** The part of a picture that is followed, or of a mask, that a second pass has. */
export function shownOf<P extends Pixels>(picture: P, { width, height, uncut }: Larger): P {
  const window = {
    width: Math.max(1, Math.round((picture.width * width) / uncut.width)),
    height: Math.max(1, Math.round((picture.height * height) / uncut.height)),
  };
  const left = Math.floor((picture.width - window.width) / 2);
  const top = Math.floor((picture.height - window.height) / 2);
  return resize(picture, picture.width, picture.height, 'nearest', { ...window, left, top });
}

/** What a second pass is told otherwise than the first. A text of its own is for both text encoders; an empty one says nothing. */
export const hiresTexts = (
  { hiresPrompt, hiresNegativePrompt, hiresGuidanceScale }: HiresOptions,
  base: Prompts & Pick<Request, 'guidance_scale' | 'adaptive_projected_guidance'>,
): Partial<Request> => {
  const negative = hiresNegativePrompt && {
    negative_prompt: base.prompt?.map(() => hiresNegativePrompt),
    negative_prompt_2: undefined,
  };
  return {
    ...(hiresPrompt ? composed(hiresPrompt, { ...base, ...negative, prompt_2: undefined }) : negative),
    ...guidanceAt(hiresGuidanceScale ?? base.guidance_scale, base),
  };
};

/** The scheduler of a second pass that has its own. */
export const hiresScheduler = (
  { hiresScheduler: name, hiresTimestepSpacing: spacing }: HiresOptions,
  { scheduler: base_scheduler }: Pick<Request, 'scheduler'>,
): Partial<Request> =>
  name === undefined
    ? {}
    : { scheduler: { name, config: spacing ? { timestep_spacing: spacing } : {} }, base_scheduler };

/** The steps that a second pass does, as A1111 lays them out. */
export function hiresSteps(
  { hiresSteps: asked, hiresDenoisingStrength: strength = usualHires.strength }: HiresOptions,
  steps: number,
): Pick<Request, 'num_inference_steps' | 'strength'> {
  const done = asked ?? steps;
  const total = Math.floor(done / Math.min(strength, 0.999));
  // diffusers' share of the steps is cut to whole ones: half a step more, so that none is lost to rounding.
  return { num_inference_steps: total, strength: Math.min(1, (done + 0.5) / total) };
}

/** Plans a second pass. @throws UserError that tells its schedule's length, which nobody typed */
export function planSecondPass(options: HiresOptions, steps: number, plan: () => void): void {
  try {
    plan();
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    const { hiresSteps: done = steps, hiresDenoisingStrength: strength = usualHires.strength } = options;
    const { num_inference_steps: total } = hiresSteps(options, steps);
    throw new UserError(
      `at --hires-denoising-strength ${strength} the ${done} --hires-steps are of a schedule of ${total}, and ${error.message}`,
    );
  }
}

/** What enlarges latents, and how: a network where one is named. */
interface Enlarging extends Pick<HiresOptions, 'hiresUpscaler'> {
  how: VaeRequest;
  network?: Upscaler;
  onTile?(done: number, all: number): void;
}

/** What the second pass begins with: latents of the larger size, A1111's to the row where they are cut. `draw` is for the VAE's encoder, where there is one to ask. */
export function enlarged(
  pipeline: Pipeline,
  latents: Latents,
  { width, height, uncut }: Larger,
  { hiresUpscaler = usualHires.upscaler, how, network, onTile }: Enlarging,
  draw: (count: number) => Float32Array,
): Latents {
  const way = network ? 'lanczos' : upscalers[hiresUpscaler as keyof typeof upscalers];
  const { ratio, vae } = pipeline;
  const rows = Math.floor(uncut.height / ratio);
  const columns = Math.floor(uncut.width / ratio);
  const cut = (whole: Latents) => middleOf(whole, [height / ratio, width / ratio]);
  if (typeof way === 'object') return cut(interpolate(latents, [rows, columns], way));
  const enlarge = (each: Picture) =>
    network ? enlargeTo(network, each, uncut, { seamless: how.seamless, onTile }) : each;
  const coded = { left: 0, top: 0, width: columns * ratio, height: rows * ratio };
  const pictures = decode(pipeline, latents, how).map((each) =>
    resize(enlarge(each), uncut.width, uncut.height, way, coded),
  );
  return cut(
    stacked(pictures.map((each) => encodeImage(vae, preprocess(each, coded.width, coded.height), draw, how))),
  );
}
