// Previews of `sdxl sample`, in stable-diffusion.cpp's words: a file that shows what the picture will be, replaced while it is
// sampled. What is shown is x_0 as the last step predicts it, which samplers give for nothing, not the latents under their noise. A step
// waits for the decoding and the file's write: PNGs, which take longer than a GPU's step, are encoded by a thread of their own,
// and what comes faster than that is passed over.
import { resolve } from 'node:path';
import type { Command } from 'commander';
import type { Seamless } from '../../engine/circular.ts';
import type { Device } from '../../engine/device.ts';
import { unload } from '../../engine/module.ts';
import { built } from '../../engine/scope.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { assertWritable, writeFileAtomic } from '../../io/files.ts';
import { toPictures } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import type { Json, ModelSource } from '../../models/checkpoint/checkpoint.ts';
import type { Pipeline, Progress } from '../../models/pipeline.ts';
import { type Autoencoder, autoencoder } from '../../models/vae/autoencoder.ts';
import { latentRgb, latentRgbChannels } from '../../models/vae/latent_rgb.ts';
import { type Latents, previewPictures, unscaleLatents, type VaeRequest } from '../../models/vae/latents.ts';
import { sdxlScalingFactor } from '../../models/vae/vae.ts';
import { number, oneOf } from '../option_values.ts';
import { encodeAside } from '../png_threads.ts';

const methods = ['none', 'proj', 'tae', 'vae'] as const;

export interface PreviewOptions {
  preview: (typeof methods)[number];
  previewInterval?: number;
  previewPath?: string;
  tae?: string;
  vaeTiling?: boolean;
  seamless?: Seamless;
}

/** What a preview is made by. */
export const lookOptions = (command: Command, usual: PreviewOptions['preview']): Command =>
  command
    .option(
      '--preview <NAME>',
      "none; proj, SDXL's latents as colours, an eighth in size; tae, by --tae's tiny autoencoder; vae, by the model's own",
      oneOf('--preview', methods),
      usual,
    )
    .option(
      '--tae <DIR|FILE|HUB_ID>',
      'a tiny autoencoder for --preview tae, such as madebyollin/taesdxl; --vae takes one for the picture itself',
    );

export const addPreviewOptions = (command: Command): Command =>
  lookOptions(command.optionsGroup('Preview (a file that is replaced while the picture is drawn):'), 'none')
    .option(
      '--preview-interval <N>',
      'steps from one preview to the next (default: 1)',
      number('--preview-interval', { min: 1, whole: true }),
    )
    .option('--preview-path <FILE.png>', 'where it is written (default: preview.png)');

const pathOf = ({ previewPath = 'preview.png' }: PreviewOptions): string => previewPath;

/** @throws UserError for a tiny autoencoder that is missing, or idle */
export function checkLook({ preview, tae }: PreviewOptions): void {
  if (preview === 'tae' && tae === undefined)
    throw new UserError('--preview tae needs --tae: a tiny autoencoder such as madebyollin/taesdxl');
  if (preview !== 'tae' && tae !== undefined)
    throw new UserError(
      '--tae is what --preview tae decodes by; for the picture itself give a tiny autoencoder as --vae',
    );
}

/** What can be known to be wrong before a model is opened; `others` are the files that the call writes. @throws UserError */
export function checkPreview(options: PreviewOptions, others: readonly string[]): void {
  const { preview, previewInterval, previewPath } = options;
  checkLook(options);
  if (preview === 'none') {
    const flag = previewPath !== undefined ? 'path' : previewInterval !== undefined ? 'interval' : undefined;
    if (flag) throw new UserError(`--preview-${flag} needs --preview proj, tae or vae: what to show`);
    return;
  }
  const path = pathOf(options);
  if (!/\.png$/i.test(path))
    throw new UserError(`--preview-path ${path}: previews are PNGs; give a name that ends in .png`);
  if (others.some((other) => resolve(other) === resolve(path)))
    throw new UserError(`--preview-path ${path} is written by this call already; give previews another name`);
  assertWritable(path);
}

/** Warnings of what a preview shows of the model whose VAE has this config. @throws UserError where it can show nothing */
export function fitPreview({ preview }: PreviewOptions, vae: Json, tae?: ModelSource): string[] {
  const { config, posterior } = autoencoder(vae);
  const { latent_channels: channels, scaling_factor: factor, latents_mean } = config;
  const taken =
    preview === 'proj' ? latentRgbChannels : tae && autoencoder(tae.config('vae')).config.latent_channels;
  if (taken !== undefined && taken !== channels)
    throw new UserError(
      `--preview ${preview} shows latents of ${taken} channels, and the model's have ${channels}; use --preview vae`,
    );
  return taken !== undefined && posterior && factor !== sdxlScalingFactor && !latents_mean
    ? [
        `--preview ${preview} shows SDXL's latents (scaling_factor ${sdxlScalingFactor}), and this model has others (${factor}), which only --preview vae shows right`,
      ]
    : [];
}

export interface Previews {
  /** Called after each step. */
  show(pipeline: Pipeline, progress: Progress): void;
  /** Waits for the last one to be written, and frees the tiny autoencoder. */
  close(): Promise<void>;
}

/** What latents on their way look like. */
export interface Look {
  /** `how` is the request's: of a pattern the edges go on in a preview, too. */
  pictures(pipeline: Pipeline, latents: Latents, how: VaeRequest): readonly Picture[];
  /** Frees the tiny autoencoder. */
  release(): void;
}

/** The look that the flags ask for, or none. */
export function openLook(
  { preview }: PreviewOptions,
  tae: ModelSource | undefined,
  place: { device: Device; dtype: FloatDType },
): Look | undefined {
  if (preview === 'none') return undefined;
  const coder = tae && loadTae(tae, place);
  return {
    pictures(pipeline, latents, how) {
      if (preview === 'vae') return previewPictures(pipeline.vae, latents, how);
      const asSdxl = asSdxlScales(pipeline.vae, latents);
      if (coder) return previewPictures(coder, asSdxl, how);
      const { data, shape } = latentRgb(asSdxl);
      return toPictures(data, shape);
    },
    release() {
      if (coder) unload(coder.module);
    },
  };
}

/** `told` gets a sentence where previews cannot go on; the picture does. */
export function openPreviews(
  options: PreviewOptions,
  tae: ModelSource | undefined,
  place: { device: Device; dtype: FloatDType },
  told: (trouble: string) => void,
): Previews {
  const look = openLook(options, tae, place);
  if (!look) return { show() {}, close: async () => {} };
  const { previewInterval = 1, vaeTiling: vae_tiling, seamless } = options;
  const how = { vae_tiling, seamless };
  const file = openFile(pathOf(options), told);
  return {
    show(pipeline, { step, predOriginalSample }) {
      if (step % previewInterval === 0) file.replace(look.pictures(pipeline, predOriginalSample(), how));
    },
    async close() {
      look.release();
      await file.close();
    },
  };
}

/** Latents that have a mean and a spread by channel (Playground v2.5's) are those of SDXL's VAE in another scale; a tiny VAE has SDXL's. */
function asSdxlScales({ config, posterior }: Autoencoder, latents: Latents): Latents {
  if (!config.latents_mean) return latents;
  const factor = posterior ? sdxlScalingFactor : 1;
  return { ...latents, data: unscaleLatents(config, latents).map((z) => z * factor) };
}

const loadTae = (
  source: ModelSource,
  { device, dtype }: { device: Device; dtype: FloatDType },
): Autoencoder =>
  built(() => {
    const coder = autoencoder(source.config('vae'));
    source.load('vae', coder.module, device, dtype);
    return coder;
  });

/** The file at `path`, whole at any time: the newest pictures that were given while others were encoded come next. */
function openFile(path: string, told: (trouble: string) => void) {
  let working: Promise<void> | undefined;
  let broken = false;
  let next: readonly Picture[] | undefined;
  const write = async (pictures: readonly Picture[]): Promise<void> => {
    try {
      for (let now: readonly Picture[] | undefined = pictures; now && !broken; now = next) {
        next = undefined;
        writeFileAtomic(path, await encodeAside({ pictures: now }));
      }
    } catch (error) {
      if (!(error instanceof UserError)) throw error;
      broken = true;
      told(`no more previews: ${error.message}`);
    }
    working = undefined;
  };
  return {
    replace(pictures: readonly Picture[]): void {
      if (broken) return;
      if (working) next = pictures;
      else working = write(pictures);
    },
    close: async (): Promise<void> => working,
  };
}
