// Training InstructPix2Pix models (Brooks et al. 2023): the UNet sees the picture before its edit beside the noised latents of the one after
// it, and the caption tells the edit. What the VAE says of the former is not scaled, and its mode is taken, as in the paper's code and in
// sampling (diffusers' script for SDXL draws from it). Captions, pictures or both are left away at the same rate each, so that guidance has
// something to compare with; of a caption the model's own unconditional remains, pooled too, as sampling has it.
import { preprocess } from '../../io/image.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { draws } from '../data/draws.ts';
import { type PictureMoments, type Shown, shownPicture, type View } from '../pictures/cache.ts';
import { besideView } from '../pictures/pictures.ts';
import type { Run } from '../run/run.ts';
import type { Control } from './control.ts';
import { seeing } from './seeing.ts';

/** What is shown to the VAE besides the pictures: what they were made from, done the same to. */
export function shownOriginal({ dataset }: Run): Shown {
  const shown = shownPicture(dataset.interpolation);
  return {
    nameOf: (view) => shown.nameOf(besideView(view)),
    read: (view, signal) => shown.read(besideView(view), signal),
  };
}

/** What is left away of a view in an epoch: each alone, and both, at the rate conditioning_dropout_prob. */
export function droppedOf({ dataset, seed }: Run, { sample }: View, epoch: number) {
  const p = dataset.conditioning_dropout_prob;
  const fate = draws(seed, epoch, sample.key, 'conditioning').uniform();
  return { caption: fate < 2 * p, image: fate >= p && fate < 3 * p };
}

/** The UNet with [latents, latents before the edit], of which `moments` are the latter's. */
export function editing(
  run: Run,
  { ratio, vae }: Pipeline,
  moments: (view: View) => PictureMoments,
): Control {
  const channels = vae.config.latent_channels;
  return {
    ...seeing(run, { ratio, channels }, async (view, epoch) => {
      const { mean } = moments(view);
      return droppedOf(run, view, epoch).image ? new Float32Array(mean.length) : mean;
    }),
    isUnprompted: (view, epoch) => droppedOf(run, view, epoch).caption,
    preview: ({ width, height }, image) => ({ image: image && preprocess(image, width, height) }),
  };
}
