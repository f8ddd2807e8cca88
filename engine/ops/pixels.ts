// The bytes of a picture from the values of a VAE, about [-1, 1]: 255 (x / 2 + 0.5), clamped and rounded half to even, in float32 step
// by step as diffusers' VaeImageProcessor. NaN is black.
import { apply, defineOp, sameFloat } from '../op.ts';
import type { Tensor } from '../tensor.ts';
import { rint } from './math.ts';
import { awkwardShapes } from './samples.ts';

const toPixelsOp = defineOp<Record<string, never>>({
  name: 'to_pixels',
  outputs(t) {
    sameFloat('to_pixels', t, 'x');
    return { y: { shape: t.x.shape, dtype: 'uint8' } };
  },
  saves: [],
  forward: (t, _, launch) => launch('to_pixels_forward', [t.y, t.x, t.x.size]),
  reference: {
    forward({ y, x }) {
      for (let i = 0; i < x.data.length; i++) {
        const value = Math.fround(x.data[i] * 0.5 + 0.5);
        y.data[i] = value > 0 ? rint(Math.fround(255 * Math.min(1, value))) : 0;
      }
    },
  },
  samples: [[1], [7], [2, 3, 5, 3], [4099], ...awkwardShapes].map((x) => ({ inputs: { x }, attrs: {} })),
});

/** uint8, of x's shape. */
export const toPixels = (x: Tensor): Tensor => apply(toPixelsOp, { x }, {});
