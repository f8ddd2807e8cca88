// Inpainting models, such as diffusers/stable-diffusion-xl-1.0-inpainting-0.1: their UNets see beside the latents a mask, and the
// latents of the picture without what it marks, in this order, as diffusers' pipelines have it. They know of the picture by these
// channels alone: nothing of it is put back after a step, as it is where a plain UNet paints in (start.ts).
import { UserError } from '../../io/errors.ts';
import type { Json, ModelSource } from '../checkpoint/checkpoint.ts';
import type { UNetConfig } from '../unet/unet.ts';
import type { Autoencoder } from '../vae/autoencoder.ts';
import { checkShape, encodeImage, joined, type Latents, stacked, type VaeRequest } from '../vae/latents.ts';
import { isInstructPix2Pix } from './instruct_pix2pix.ts';

type Channels = Pick<UNetConfig, 'in_channels' | 'out_channels'>;

/** Whether a UNet sees the mask and the masked picture: nine channels for four of latents. Its config may be as it stands in the file. */
export const isInpainting = ({ in_channels, out_channels }: Partial<Channels>): boolean =>
  in_channels === 2 * Number(out_channels) + 1;

/** What a UNet that sees more than latents is of, in words, and diffusers' pipeline for it; undefined for another. */
export function kindOf(config: Partial<Channels>): { name: string; pipeline: string } | undefined {
  if (isInpainting(config)) return { name: 'inpainting model', pipeline: 'StableDiffusionXLInpaintPipeline' };
  if (!isInstructPix2Pix(config)) return undefined;
  return { name: 'InstructPix2Pix model', pipeline: 'StableDiffusionXLInstructPix2PixPipeline' };
}

/** The model's index, with the pipeline that its UNet is for, where that sees more than latents. */
export function pipelineIndex({ modelIndex, has, config }: ModelSource): Json {
  const kind = has('unet') ? kindOf(config('unet')) : undefined;
  return { ...modelIndex, ...(kind && { _class_name: kind.pipeline }) };
}

/** How many of a UNet's channels are those of the latents. */
export const latentChannelsOf = (config: Channels): number =>
  kindOf(config) ? config.out_channels : config.in_channels;

/** @throws UserError where an inpainting model is asked for what it has not learnt, or cannot be shown the picture */
export function checkInpainting(
  config: Channels,
  { image, mask }: { image?: Latents; mask?: Latents },
): void {
  if (!isInpainting(config)) return;
  if (!image || !mask)
    throw new UserError(
      `this UNet takes ${config.in_channels} channels: it is an inpainting model, which draws in a part of a picture alone; give image and mask (--image, --mask), or take a base model`,
    );
  if (image.shape[1] !== 3)
    throw new UserError(
      'an inpainting model sees the picture without what the mask marks, which latents do not tell: give image as pixels, by preprocess',
    );
}

/**
 * What the UNet sees beside the latents of this shape, [n, 1 + c, h, w]. The masked picture has 0, grey, where the mask is 1; `draw` is
 * for its encoding.
 */
export function besideLatents(
  { vae, ratio }: { vae: Autoencoder; ratio: number },
  { image, mask, ...how }: { image: Latents; mask: Latents } & VaeRequest,
  [n, , h, w]: readonly number[],
  draw: (count: number) => Float32Array,
): Latents {
  const sides = [h * ratio, w * ratio];
  checkShape('image', image, [1, 3, ...sides]);
  checkShape('mask', mask, [1, 1, ...sides]);
  const masked = image.data.map((value, i) => (mask.data[i % mask.data.length] < 0.5 ? value : 0));
  const { data } = encodeImage(vae, { ...image, data: masked }, draw, how);
  const seen = joined([maskAt(mask, [h, w]), data]);
  return stacked(Array<Latents>(n).fill({ shape: [1, seen.length / (h * w), h, w], data: seen }));
}

/** The mask at the size of the latents: nearest, as torch's interpolate picks it. */
export function maskAt(
  { data, shape: [, , height, width] }: Latents,
  [h, w]: readonly number[],
): Float32Array {
  const at = (i: number, from: number, to: number) => Math.floor((i * from) / to);
  return Float32Array.from(
    { length: h * w },
    (_, p) => data[at(Math.floor(p / w), height, h) * width + at(p % w, width, w)],
  );
}
