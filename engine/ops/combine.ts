// A linear combination of tensors, y = sum of w_k x_k: what a sampler's step is made of. Weights and sums are float64, rounded once
// in the end, as a sampler's weights nearly cancel where levels of noise are close. Forward alone: for sampling.
import { apply, defineOp, type Sample, sameFloat } from '../op.ts';
import { ShapeError, type Tensor, zeros } from '../tensor.ts';
import { awkwardShapes } from './samples.ts';

/** A weighted tensor in a sum. */
export type Term = readonly [weight: number, x: Tensor];

/** The terms of one launch. */
const MOST = 6;

const namesOf = (count: number): string[] => Array.from({ length: count }, (_, k) => `x${k}`);

const combineOp = defineOp<{ weights: readonly number[] }>({
  name: 'combine',
  outputs(t, { weights }) {
    const names = namesOf(weights.length);
    for (const name of names)
      if (t[name].shape.join() !== t.x0.shape.join())
        throw new ShapeError(`combine: [${t.x0.shape}] and [${t[name].shape}] differ`);
    return { y: { shape: t.x0.shape, dtype: sameFloat('combine', t, ...names) } };
  },
  saves: [],
  forward(t, { weights }, launch) {
    const terms = namesOf(MOST).map((name) => t[name]);
    launch('combine_forward', [t.y, ...terms, ...terms.map((_, k) => weights[k] ?? 0), t.y.size]);
  },
  reference: {
    forward(t, { weights }) {
      const terms = weights.map((weight, k) => ({ weight, x: t[`x${k}`].data }));
      for (let i = 0; i < t.y.data.length; i++) {
        let sum = 0;
        for (const { weight, x } of terms) sum += weight * x[i];
        t.y.data[i] = sum;
      }
    },
  },
  samples: [[1], [7], [2, 3, 4, 5], [4099], ...awkwardShapes].map(
    (shape, i): Sample<{ weights: number[] }> => {
      const names = namesOf(1 + (i % MOST));
      return {
        inputs: Object.fromEntries(names.map((name) => [name, shape])),
        attrs: { weights: names.map((_, k) => Math.cos(3 * i + k) * 10 ** ((k % 3) - 1)) },
      };
    },
  ),
});

/** The sum of weight times tensor, all of one shape; a term of weight 0 is left out, so it may hold infinities. */
export function combine(...terms: Term[]): Tensor {
  const used = terms.filter(([weight]) => weight !== 0);
  if (used.length === 0) {
    const { shape, dtype, device } = terms[0][1];
    return zeros(shape, { device, dtype });
  }
  if (used.length > MOST) return combine([1, combine(...used.slice(0, MOST))], ...used.slice(MOST));
  const inputs = Object.fromEntries(used.map(([, x], k) => [`x${k}`, x]));
  return apply(combineOp, inputs, { weights: used.map(([weight]) => weight) });
}
