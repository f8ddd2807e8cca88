// The autoencoders that a model may have between pictures and latents, by the class that their config names: SDXL's VAE, or
// the tiny one that stands in for it.
import { UserError } from '../io/errors.ts';
import { type AutoencoderTiny, autoencoderTiny, parseAutoencoderTinyConfig } from './autoencoder_tiny.ts';
import { parseVaeConfig, type Vae, vae } from './vae.ts';

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

/** The VAE, for what draws latents from a posterior. @throws UserError for a tiny one, which `where` had */
export function withPosterior(coder: Autoencoder, where: string): Vae {
  if (!coder.posterior)
    throw new UserError(
      `${where} has a tiny autoencoder (AutoencoderTiny), which draws and encodes for sdxl sample alone: train with the VAE that the model was made for`,
    );
  return coder;
}
