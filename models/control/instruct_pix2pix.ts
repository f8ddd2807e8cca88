// InstructPix2Pix (Brooks et al. 2023): models that edit a picture as the prompt tells, such as diffusers/sdxl-instructpix2pix-768. Their
// UNets see beside the latents those of the picture, the mode of what the VAE says, not scaled, as diffusers'
// StableDiffusionXLInstructPix2PixPipeline has them, but scaled for models under EDM's noise (CosXL Edit, its is_cosxl_edit); drawing
// begins with noise alone. Guidance has two scales, for the prompt and for the picture, and three parts: without both, with the picture,
// with both.
import { UserError } from '../../io/errors.ts';
import type { UNetConfig } from '../unet/unet.ts';
import type { Autoencoder } from '../vae/autoencoder.ts';
import { checkShape, encodeMode, type Latents, stacked, type VaeRequest } from '../vae/latents.ts';

/** The part of a request that InstructPix2Pix models heed. */
export interface InstructPix2PixRequest {
  /** How strongly to keep to the picture; 1.5 where absent. Below 1 there is no guidance at all, as in diffusers. */
  image_guidance_scale?: number;
}

type Channels = Pick<UNetConfig, 'in_channels' | 'out_channels'>;

/** Whether a UNet sees another picture's latents: eight channels for four. Its config may be as it stands in the file. */
export const isInstructPix2Pix = ({ in_channels, out_channels }: Partial<Channels>): boolean =>
  in_channels === 2 * Number(out_channels);

/** How strongly such a model is to keep to the picture; undefined for another. */
export const imageGuidanceOf = (
  config: Channels,
  { image_guidance_scale = 1.5 }: InstructPix2PixRequest,
): number | undefined => (isInstructPix2Pix(config) ? image_guidance_scale : undefined);

/** What diffusers' pipeline has no part for, with the flag that asks for it. */
const foreign = {
  mask: '--mask',
  strength: '--strength',
  denoising_start: '--denoising-start',
  control_image: '--controlnet',
  adapter_image: '--adapter',
  ip_adapter_image: '--ip-adapter',
  pag_scale: '--pag-scale',
  adaptive_projected_guidance: '--apg',
} as const;

type EditRequest = InstructPix2PixRequest & { image?: Latents } & { [K in keyof typeof foreign]?: unknown };

/** @throws UserError where such a model is asked for what it has not learnt, or another for what only such a one has */
export function checkInstructPix2Pix(config: Channels, request: EditRequest): void {
  if (!isInstructPix2Pix(config)) {
    if (request.image_guidance_scale === undefined) return;
    throw new UserError(
      `image_guidance_scale (--image-guidance-scale) is of InstructPix2Pix models, whose UNets take ${2 * config.out_channels} channels, and this one takes ${config.in_channels}: leave it out`,
    );
  }
  const whose = `this UNet takes ${config.in_channels} channels: it is an InstructPix2Pix model, which edits a picture as the prompt tells`;
  if (!request.image) throw new UserError(`${whose}; give image (--image), or take a base model`);
  for (const [key, option] of Object.entries(foreign) as [keyof typeof foreign, string][])
    if (request[key] !== undefined)
      throw new UserError(`${whose}, beginning with noise, and takes no ${key} (${option}): leave it out`);
}

/** What the UNet sees beside latents of this shape, [n, c, h, w]: of pixels [1, 3, ...] their latents, or latents; `scaled`, or as they are. */
export function originalLatents(
  { vae, ratio }: { vae: Autoencoder; ratio: number },
  { image, scaled, ...how }: { image: Latents; scaled: boolean } & VaeRequest,
  [n, c, h, w]: readonly number[],
): Latents {
  const isPixels = image.shape[1] === 3;
  const rows = !isPixels && image.shape[0] > 1 ? n : 1;
  checkShape('image', image, isPixels ? [1, 3, h * ratio, w * ratio] : [rows, c, h, w]);
  const mode = isPixels ? encodeMode(vae, image, how) : image;
  const factor = scaled ? vae.config.scaling_factor : 1;
  const latents = { ...mode, data: mode.data.map((value) => value * factor) };
  return rows === n ? latents : stacked(Array<Latents>(n).fill(latents));
}
