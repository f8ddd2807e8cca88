// Conditioning images as an input of passes, for a network that is trained beside the UNet and follows them.
import { sizeOf } from '../../engine/tensor.ts';
import { toGrey } from '../../io/image.ts';
import type { Size } from '../../models/text/conditioning.ts';
import { joined } from '../../models/vae/latents.ts';
import type { PassInputs } from '../objective/pass_inputs.ts';
import { readConditioning } from '../pictures/pictures.ts';
import type { Run } from '../run/run.ts';
import type { Control } from './control.ts';

/** Passes with each picture's conditioning image, in colour or as grey levels. */
export function following(
  run: Run,
  { network, preview }: Pick<Control, 'network' | 'preview'>,
  channels: 1 | 3 = 3,
): Control {
  const inputs = (n: number, [height, width]: Size, values: Float32Array): PassInputs => ({
    conditioning_pixel_values: { shape: [n, height, width, channels], values, dtype: run.dtype },
  });
  return {
    async inputs(views, _, signal) {
      const images = await Promise.all(views.map((view) => readConditioning(view, run, signal)));
      const seen = channels === 1 ? images.map(inGrey) : images;
      return inputs(views.length, views[0].geometry.target, joined(seen));
    },
    blank: (n, size) => inputs(n, size, new Float32Array(n * sizeOf(size) * channels)),
    network,
    preview,
  };
}

/** Pixels in [0, 1] that were bytes, as Pillow takes these to grey. */
function inGrey(values: Float32Array): Float32Array {
  const data = Uint8Array.from(values, (x) => Math.round(255 * x));
  return Float32Array.from(
    toGrey({ width: data.length / 3, height: 1, channels: 3, data }).data,
    (x) => x / 255,
  );
}
