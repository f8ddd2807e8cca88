// The autoencoders that a model may have between pictures and latents, by the class that their config names: SDXL's VAE, or
// the tiny one that stands in for it.
import { MOST_ELEMENTS } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import type { Json, ModelSource } from '../checkpoint/checkpoint.ts';
import { type AutoencoderTiny, autoencoderTiny, parseAutoencoderTinyConfig } from './autoencoder_tiny.ts';
import { parseVaeConfig, sdxlScalingFactor, type Vae, vae } from './vae.ts';

/** `posterior` tells them apart: whether encode() gives a distribution to draw latents from, or the latents. */
export type Autoencoder = Vae | AutoencoderTiny;

const isTiny = (json: Record<string, unknown>): boolean => json._class_name === 'AutoencoderTiny';

/** The module of a config.json, without weights. @throws UserError naming a field that asks for what is not built */
export const autoencoder = (json: Record<string, unknown>): Autoencoder =>
  isTiny(json) ? autoencoderTiny(parseAutoencoderTinyConfig(json)) : vae(parseVaeConfig(json));

/** Pixels per latent. */
export const pixelsPerLatent = (json: Record<string, unknown>): number => {
  const parsed = isTiny(json) ? parseAutoencoderTinyConfig(json) : parseVaeConfig(json);
  return 2 ** (parsed.block_out_channels.length - 1);
};

/**
 * The config of what decodes a model's latents. Whoever stands in for its VAE, the mean and the spread of its latents are the model's:
 * Playground v2.5 has SDXL's VAE, scaled in another way. A tiny autoencoder's own latents are SDXL's, scaled as those are.
 */
export function vaeFor(source: ModelSource, vaeSource: ModelSource = source): Json {
  const config = vaeSource.config('vae');
  if (vaeSource === source || !source.has('vae')) return config;
  const own = source.config('vae');
  if (!own.latents_mean && !config.latents_mean) return config;
  const { latents_mean, latents_std, scaling_factor } = autoencoder(own).config;
  const factor = isTiny(config) ? sdxlScalingFactor : 1;
  const [mean, std] = [latents_mean, latents_std].map((values) => values?.map((value) => value * factor));
  return { ...config, scaling_factor, latents_mean: mean, latents_std: std };
}

/** The VAE, for what draws latents from a posterior. @throws UserError for a tiny one, which `where` had */
export function withPosterior(coder: Autoencoder, where: string): Vae {
  if (!coder.posterior)
    throw new UserError(
      `${where} has a tiny autoencoder (AutoencoderTiny), which draws and encodes for sdxl sample alone: train with the VAE that the model was made for`,
    );
  return coder;
}

/**
 * To be asked before the steps that lead to a picture, as it is too late after them. The decoder's largest tensors have a level's
 * size and yet the channels of the level below: they are enlarged before they are narrowed.
 * @throws UserError where a picture of this size can be decoded in tiles alone, and is not
 */
export function checkDecode(
  { config: { block_out_channels: channels } }: Autoencoder,
  { height, width }: { height: number; width: number },
  tiling = false,
): void {
  const perPixel = Math.max(...channels.map((c, level) => c / 4 ** Math.max(0, level - 1)));
  if (tiling || height * width * perPixel <= MOST_ELEMENTS) return;
  const most = Math.floor(MOST_ELEMENTS / perPixel / 1e5) / 10;
  throw new UserError(
    `${width}x${height} pixels are more than the VAE can decode whole (${most} megapixels): give a smaller --width and --height, or decode in tiles with --vae-tiling (vae_tiling in a program)`,
  );
}
