// Training inpainting models, whose UNets see beside the noised latents a mask and the latents of the picture without what it marks
// (models/control/inpainting.ts); the loss is that of the whole picture. A mask is drawn for each version of a picture that a run prepares
// (dataset.crops), so that what the VAE says of the masked ones is cached as of the others: encoding in passes would keep the VAE
// beside the UNet.
import { sizeOf } from '../../engine/tensor.ts';
import { preprocess } from '../../io/image.ts';
import { maskAt } from '../../models/control/inpainting.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import type { Size } from '../../models/text/conditioning.ts';
import { draws } from '../data/draws.ts';
import { drawMask, type RandomMask } from '../data/random_mask.ts';
import { drawLatents, type PictureMoments, type Shown, shownPicture, type View } from '../pictures/cache.ts';
import { readConditioning } from '../pictures/pictures.ts';
import type { Run } from '../run/run.ts';
import type { Control } from './control.ts';
import { seeing } from './seeing.ts';

/** Of a mask that each picture has beside it, or is drawn. Pictures for prior preservation have none, and theirs is drawn. */
const isBeside = ({ inpainting }: Run, { sample }: View): boolean =>
  inpainting.mask_mode === 'conditioning_image' && sample.beside !== undefined;

const randomMode = ({ mask_mode }: Run['inpainting']): RandomMask =>
  mask_mode === 'conditioning_image' || mask_mode === '' ? 'random_mask' : mask_mode;

/** What a view's mask depends on. */
function nameOfMask(run: Run, view: View): object {
  const { full_mask_rate } = run.inpainting;
  const { key, beside } = view.sample;
  const { variant } = view;
  if (isBeside(run, view)) return { conditioning: beside?.hash };
  return { mode: randomMode(run.inpainting), full_mask_rate, seed: run.seed, key, variant };
}

/** A view's mask [h, w], 1 where to paint anew: the red of its conditioning image from a half on, or drawn. */
export async function maskOf(run: Run, view: View, signal?: AbortSignal): Promise<Float32Array> {
  const { inpainting, seed } = run;
  const { target } = view.geometry;
  if (isBeside(run, view)) {
    const image = await readConditioning(view, run, signal);
    return Float32Array.from({ length: sizeOf(target) }, (_, i) => (image[3 * i] < 0.5 ? 0 : 1));
  }
  const source = draws(seed, view.variant, view.sample.key, 'mask');
  return drawMask(randomMode(inpainting), inpainting.full_mask_rate, target, source);
}

/** What is shown to the VAE besides the pictures: them without what their masks mark, where they are 0, grey. */
export function shownMasked(run: Run): Shown {
  const { interpolation, alpha_mask } = run.dataset;
  const whole = shownPicture(interpolation, alpha_mask ? 'colours' : 'picture');
  return {
    nameOf: (view) => ({ ...whole.nameOf(view), mask: nameOfMask(run, view) }),
    async read(view, signal) {
      const [pixels, mask] = await Promise.all([whole.read(view, signal), maskOf(run, view, signal)]);
      return pixels.map((value, i) => (mask[Math.floor(i / 3)] === 1 ? 0 : value));
    },
  };
}

/** The UNet with [latents, mask, masked latents], of which `moments` are the last one's. */
export function paintingIn(
  run: Run,
  { ratio, vae }: Pipeline,
  moments: (view: View) => PictureMoments,
): Control {
  const channels = 1 + vae.config.latent_channels;
  const seenOf = async (view: View, epoch: number, signal?: AbortSignal): Promise<Float32Array> => {
    const [height, width] = view.geometry.target;
    const mask = { shape: [1, 1, height, width], data: await maskOf(run, view, signal) };
    const plane = maskAt(mask, [height / ratio, width / ratio]);
    const latents = drawLatents(moments(view), view, vae.config, { seed: run.seed, epoch }, 'masked_moments');
    return Float32Array.from({ length: plane.length * channels }, (_, i) => {
      const [at, c] = [Math.floor(i / channels), i % channels];
      return c === 0 ? plane[at] : latents[at * (channels - 1) + c - 1];
    });
  };
  return {
    ...seeing(run, { ratio, channels }, seenOf),
    // A picture is painted in by a mask that is drawn; where there is none, all of it.
    preview({ width, height, seed }, image) {
      const size: Size = [height, width];
      const source = draws(seed, 0, 0, 'mask');
      const data = drawMask(randomMode(run.inpainting), image ? 0 : 1, size, source);
      const nothing = { shape: [1, 3, ...size], data: new Float32Array(3 * sizeOf(size)) };
      return {
        image: image ? preprocess(image, width, height) : nothing,
        mask: { shape: [1, 1, ...size], data },
        strength: 1,
      };
    },
  };
}
