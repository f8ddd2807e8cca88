// Masked loss, as kohya's trainer has it: a picture's mask is the red of its conditioning image, or its own alpha; it tells how much
// each place counts, and a latent counts as its pixels do on average. The mean stays one over all places. What goes to the device is
// the mask's square root: times it, both what the network says and what it should, squares come out weighed, with no op of their own.
import { sizeOf } from '../../engine/tensor.ts';
import type { Size } from '../../models/text/conditioning.ts';
import { joined } from '../../models/vae/latents.ts';
import type { PassInputs } from '../objective/pass_inputs.ts';
import type { View } from '../pictures/cache.ts';
import { readConditioning, readView } from '../pictures/pictures.ts';
import type { Run } from '../run/run.ts';
import { type Control, uncontrolled } from './control.ts';

/** How much each latent counts, [h / ratio, w / ratio], by the first channel of an image [h, w, channels]. */
export function latentMask(image: Float32Array, [height, width]: Size, ratio: number): Float32Array {
  const columns = width / ratio;
  const channels = image.length / (height * width);
  const mask = new Float32Array((height / ratio) * columns);
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const at = Math.floor(y / ratio) * columns + Math.floor(x / ratio);
      mask[at] += image[channels * (y * width + x)] / ratio ** 2;
    }
  return mask;
}

/** The loss's mask as an input of passes. Pictures for prior preservation have no conditioning image, and count wholly. */
export function masked(run: Run, ratio: number): Control {
  const inputs = (n: number, [height, width]: Size, values: Float32Array): PassInputs => ({
    mask: { shape: [n, height / ratio, width / ratio, 1], values, dtype: 'float32' },
  });
  const rootOf = async (view: View, signal?: AbortSignal): Promise<Float32Array> => {
    const { target } = view.geometry;
    const { alpha_mask } = run.dataset;
    if (!alpha_mask && !view.sample.beside) return new Float32Array(sizeOf(target) / ratio ** 2).fill(1);
    const image = await (alpha_mask
      ? readView(view, run, signal, 'alpha')
      : readConditioning(view, run, signal));
    return latentMask(image, target, ratio).map(Math.sqrt);
  };
  return {
    async inputs(views, _, signal) {
      const roots = await Promise.all(views.map((view) => rootOf(view, signal)));
      return inputs(views.length, views[0].geometry.target, joined(roots));
    },
    blank: (n, size) => inputs(n, size, new Float32Array((n * size[0] * size[1]) / ratio ** 2)),
    network: uncontrolled.network,
    preview: uncontrolled.preview,
  };
}
