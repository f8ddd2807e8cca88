// Training UNets that see more than the noised latents: inpainting models (inpainting.ts) and InstructPix2Pix models (instruct_pix2pix.ts).
// What they see is an input of each pass, after the latents. A base model becomes such a one by a wider first convolution, as in the
// papers' and diffusers' scripts.
import { concat } from '../../engine/ops/move.ts';
import { sizeOf } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { isInpainting } from '../../models/control/inpainting.ts';
import { isInstructPix2Pix } from '../../models/control/instruct_pix2pix.ts';
import type { Size } from '../../models/text/conditioning.ts';
import type { UNetConfig } from '../../models/unet/unet.ts';
import { widened } from '../../models/unet/widened.ts';
import { joined } from '../../models/vae/latents.ts';
import type { PassInputs } from '../objective/pass_inputs.ts';
import type { View } from '../pictures/cache.ts';
import { type Run, trainsEdits } from '../run/run.ts';
import type { Control } from './control.ts';

/** Passes whose UNet sees `channels` beside the latents; `seenOf` gives those of a view, [h, w, channels] of latents' size. */
export function seeing(
  { dtype }: Run,
  { ratio, channels }: { ratio: number; channels: number },
  seenOf: (view: View, epoch: number, signal?: AbortSignal) => Promise<Float32Array>,
): Pick<Control, 'inputs' | 'blank' | 'network'> {
  const inputs = (n: number, [height, width]: Size, values: Float32Array): PassInputs => ({
    beside: { shape: [n, height / ratio, width / ratio, channels], values, dtype },
  });
  return {
    async inputs(views, epoch, signal) {
      const seen = await Promise.all(views.map((view) => seenOf(view, epoch, signal)));
      return inputs(views.length, views[0].geometry.target, joined(seen));
    },
    blank: (n, size) => inputs(n, size, new Float32Array((n * sizeOf(size) * channels) / ratio ** 2)),
    network:
      ({ unet }, { beside }) =>
      (sample, times, conditioning) =>
        unet(concat([sample, beside], 3), times, conditioning),
  };
}

/** A kind of such models. */
interface Kind {
  name: string;
  sees: string;
  /** The key of a run that trains one, and what it says. */
  key: string;
  says: string;
  /** One that is published. */
  published: string;
  isTrained(run: Run): boolean;
  isOf(config: Partial<UNetConfig>): boolean;
  /** Those that its UNet takes, by those of latents. */
  channels(latents: number): number;
}

const kinds: readonly Kind[] = [
  {
    ...{ name: 'an inpainting model', sees: 'a mask and a picture', isOf: isInpainting },
    ...{ key: 'inpainting.mask_mode', says: 'what is masked, such as "random_mask"' },
    published: 'diffusers/stable-diffusion-xl-1.0-inpainting-0.1',
    isTrained: ({ inpainting }) => inpainting.mask_mode !== '',
    channels: (latents) => 2 * latents + 1,
  },
  {
    ...{ name: 'an InstructPix2Pix model', sees: 'the picture before its edit', isOf: isInstructPix2Pix },
    ...{ key: 'dataset.original_image_column', says: 'where that is, such as "original_image"' },
    published: 'diffusers/sdxl-instructpix2pix-768',
    isTrained: trainsEdits,
    channels: (latents) => 2 * latents,
  },
];

/**
 * The model that a run of such a kind trains, which a base model may have to become first; any other as it is.
 * @throws UserError where run and model are not of one kind, or the model cannot become one
 */
export function asSeeing(run: Run, source: ModelSource): ModelSource {
  const { target, method, parts } = run.train;
  if (target === 'vae') return source;
  const name = run.unet || source.path;
  const config = source.config('unet');
  const own = kinds.find(({ isOf }) => isOf(config));
  const whose = own && `${name} is ${own.name}, whose UNet sees ${own.sees} beside the latents`;
  if (own && target !== 'unet' && target !== 'lora')
    throw new UserError(
      `${whose}: sdxl train trains it with target "unet" or "lora", not "${target}"; begin with a base model`,
    );
  if (own && method !== 'diffusion')
    throw new UserError(
      `${whose}, which the method "diffusion" trains, and train.method is "${method}"; leave that out, or begin with a base model`,
    );
  if (own && !own.isTrained(run))
    throw new UserError(`${whose}; say with ${own.key} ${own.says}, or begin with a base model`);
  const wanted = own ? undefined : kinds.find(({ isTrained }) => isTrained(run));
  if (!wanted) return source;
  if (source.modelIndex.requires_aesthetics_score === true)
    throw new UserError(
      `${name} is a refiner, which does not become ${wanted.name}; leave ${wanted.key} out, or begin with a base model`,
    );
  const { in_channels, out_channels } = config as Partial<Record<string, number>>;
  if (target === 'lora' || in_channels !== out_channels)
    throw new UserError(
      `the UNet of ${name} takes ${in_channels} channels, so it is not ${wanted.name}; begin with one such as ${wanted.published}, or${target === 'lora' ? ' make one with train.target "unet"' : ' with a base model'}`,
    );
  if (parts.length > 0 && !parts.some((part) => 'conv_in.weight'.includes(part)))
    throw new UserError(
      `the UNet of ${name} becomes ${wanted.name} by a wider conv_in, which train.parts ${JSON.stringify(parts)} leaves at zero; add "conv_in.weight"`,
    );
  return widened(source, wanted.channels(Number(out_channels)));
}
