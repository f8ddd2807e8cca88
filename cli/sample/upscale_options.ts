// The flags of `sdxl sample` for networks that enlarge pictures (models/upscaler/upscaler.ts), in stable-diffusion.cpp's words: the finished
// picture's, and that of a second pass (hires_options.ts), which are one where they are one file.
import type { Command } from 'commander';
import type { Device } from '../../engine/device.ts';
import { UserError } from '../../io/errors.ts';
import type { Picture } from '../../io/pixels.ts';
import type { LocateOptions } from '../../models/locate/locate.ts';
import { locateUpscaler, type UpscalerSource } from '../../models/upscaler/rrdbnet_file.ts';
import { type Enlarging, openUpscaler, scaleOf, type Upscaler } from '../../models/upscaler/upscaler.ts';
import { number } from '../option_values.ts';
import { type HiresOptions, namesNetwork, type Sides } from './hires_options.ts';

export interface UpscaleOptions {
  upscaleModel?: string;
  upscaleRepeats?: number;
}

export const addUpscaleOptions = (command: Command): Command =>
  command
    .option(
      '--upscale-model <FILE|HUB_ID/FILE>',
      'enlarge the finished picture by a network, an ESRGAN or Real-ESRGAN in .safetensors',
    )
    .option(
      '--upscale-repeats <N>',
      'how often (default: 1)',
      number('--upscale-repeats', { min: 1, max: 4, whole: true }),
    );

/** @throws UserError for a flag that says nothing */
export function checkUpscale({ upscaleModel, upscaleRepeats }: UpscaleOptions): void {
  if (upscaleRepeats !== undefined && upscaleModel === undefined)
    throw new UserError('--upscale-repeats needs --upscale-model: what enlarges the picture');
}

/** The networks that a call names. */
export interface UpscalerSources {
  finished?: UpscalerSource;
  hires?: UpscalerSource;
}

export async function locateUpscalers(
  { upscaleModel, hiresUpscaler }: UpscaleOptions & HiresOptions,
  locate: LocateOptions,
): Promise<UpscalerSources> {
  return {
    finished: upscaleModel === undefined ? undefined : await locateUpscaler(upscaleModel, locate),
    hires: namesNetwork(hiresUpscaler) ? await locateUpscaler(hiresUpscaler, locate) : undefined,
  };
}

/** A chunk of a PNG is at most so long, and the pixels are one. */
const MOST_BYTES = 2 ** 31 - 1;

/** How large a picture of these sides is written. @throws UserError where it is larger than a PNG may be here */
export function writtenSize(
  { width, height }: Sides,
  { upscaleRepeats = 1 }: UpscaleOptions,
  { finished }: UpscalerSources,
): Sides {
  const times = finished ? scaleOf(finished.config) ** upscaleRepeats : 1;
  const written = { width: width * times, height: height * times };
  if (3 * written.width * written.height > MOST_BYTES) {
    const [who, mend] = finished
      ? ['--upscale-model', 'give fewer --upscale-repeats']
      : ['this', 'give smaller sides'];
    throw new UserError(
      `${who} would make a picture of ${written.width}x${written.height}, which is more than a PNG is written of; ${mend}`,
    );
  }
  return written;
}

/** The networks, loaded. The caller releases them. */
export interface Upscalers {
  /** The finished picture enlarged, or itself. */
  finish(picture: Picture, enlarging: Enlarging): Picture;
  /** What does that. */
  finished?: Upscaler;
  hires?: Upscaler;
  release(): void;
}

export function openUpscalers(
  { finished, hires }: UpscalerSources,
  { upscaleRepeats = 1 }: UpscaleOptions,
  device: Device,
): Upscalers {
  const opened = new Map<string, Upscaler>();
  const open = (source: UpscalerSource | undefined): Upscaler | undefined => {
    if (!source) return undefined;
    const upscaler = opened.get(source.path) ?? openUpscaler(source, device);
    opened.set(source.path, upscaler);
    return upscaler;
  };
  const last = open(finished);
  return {
    finish(picture, enlarging) {
      let result = picture;
      for (let i = 0; last && i < upscaleRepeats; i++) result = last.enlarge(result, enlarging);
      return result;
    },
    finished: last,
    hires: open(hires),
    release() {
      for (const each of opened.values()) each.release();
    },
  };
}
