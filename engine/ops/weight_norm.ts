// Weight normalization (Salimans & Kingma 2016) as DoRA has it (Liu et al. 2024): the rows of a layer's weight W + scale B A are given
// lengths of their own, `magnitude`. The lengths that they have are no part of the gradient (the paper's 4.3, and peft), so row_norms has
// none. It reads W once and adds B A to it as it goes, in float32: neither the sum nor B A is ever stored. The lengths then scale what the
// layer makes of x, without its bias, channel by channel: the weight itself stays as it is, perhaps in half precision or in 8 bits.
import { apply, defineOp, type Numbers, type Sample, sameFloat } from '../op.ts';
import { ShapeError, sizeOf, type Tensor } from '../tensor.ts';
import { around, rowsOf } from './reduce.ts';
import { awkwardShapes, awkwardSizes } from './samples.ts';

/** A weight's rows, and the elements of one. */
const matrixOf = ([o, ...rest]: readonly number[]): [rows: number, inputs: number] => [o, sizeOf(rest)];

const rowNormsOp = defineOp<{ scale: number }>({
  name: 'row_norms',
  outputs(t) {
    const [o, inputs] = matrixOf(t.weight.shape);
    const [rank, own] = matrixOf(t.down.shape);
    if (own !== inputs || sizeOf(t.up.shape) !== o * rank)
      throw new ShapeError(
        `row_norms: down [${t.down.shape}] and up [${t.up.shape}] make no [${t.weight.shape}]`,
      );
    sameFloat('row_norms', t, 'weight', 'down', 'up');
    return { y: { shape: [o], dtype: 'float32' } };
  },
  saves: [],
  storage: 'weight',
  forward: (t, { scale }, launch) =>
    launch('row_norms_forward', [
      t.y,
      ...[t.weight, t.down, t.up],
      ...matrixOf(t.weight.shape),
      t.down.shape[0],
      scale,
    ]),
  reference: {
    forward({ y, weight, down, up }, { scale }) {
      const [o, inputs] = matrixOf(weight.shape);
      const rank = down.shape[0];
      for (let row = 0; row < o; row++) {
        let squares = 0;
        for (let i = 0; i < inputs; i++) {
          let added = 0;
          for (let k = 0; k < rank; k++) added += up.data[row * rank + k] * down.data[k * inputs + i];
          squares += (weight.data[row * inputs + i] + scale * added) ** 2;
        }
        y.data[row] = Math.sqrt(squares);
      }
    },
  },
  samples: [
    rowsSample([5, 12], 3, 0.5),
    rowsSample([9, 3, 3, 5], 2, 1),
    rowsSample([1, 1300], 4, 2),
    rowsSample([17, 40], 33, 0.25),
    ...awkwardSizes.map(([o, inputs, rank]) => rowsSample([o, inputs], 1 + (rank % 9), 0.75)),
  ],
});

function rowsSample(weight: number[], rank: number, scale: number): Sample<{ scale: number }> {
  const [o, ...rest] = weight;
  return { inputs: { weight, down: [rank, ...rest], up: [o, rank] }, attrs: { scale } };
}

/** The lengths [o] of the rows of weight [o, ...] + scale * up [o, rank] down [rank, ...], in float32 and without a gradient. */
export const rowNorms = (weight: Tensor, down: Tensor, up: Tensor, scale: number): Tensor =>
  apply(rowNormsOp, { weight, down, up }, { scale });

const weightNormOp = defineOp<Record<string, never>>({
  name: 'weight_norm',
  outputs(t) {
    const c = t.x.shape.at(-1);
    for (const name of ['magnitude', 'norms', 'bias'])
      if (t[name] && t[name].size !== c)
        throw new ShapeError(`weight_norm: x [${t.x.shape}] has ${c} channels, ${name} [${t[name].shape}]`);
    return { y: { shape: t.x.shape, dtype: sameFloat('weight_norm', t, 'x', 'bias') } };
  },
  saves: ['x', 'magnitude', 'norms'],
  forward: (t, _, launch) =>
    launch('weight_norm_forward', [t.y, t.x, t.magnitude, t.norms, t.bias, ...rowsOf(t.x.shape)]),
  backward(t, _, launch) {
    const rows = rowsOf(t.x.shape);
    if (t.dnorms) throw new Error('weight_norm has no gradient for the norms, but one is wanted');
    if (t.dx) launch('weight_norm_forward', [t.dx, t.dy, t.magnitude, t.norms, undefined, ...rows]);
    if (t.dmagnitude) launch('weight_norm_backward', [t.dmagnitude, t.dy, t.x, t.norms, ...rows]);
    if (t.dbias) launch('sum_forward', [t.dbias, t.dy, ...around(rows, 0)]);
  },
  reference: {
    forward({ y, x, magnitude, norms, bias }) {
      const c = norms.data.length;
      for (let i = 0; i < x.data.length; i++) {
        const k = i % c;
        y.data[i] = x.data[i] * (magnitude.data[k] / lengthAt(norms.data, k)) + (bias?.data[k] ?? 0);
      }
    },
    backward({ dx, dmagnitude, dbias, dy, x, magnitude, norms }) {
      const c = norms.data.length;
      for (let k = 0; k < c; k++) {
        const inverse = 1 / lengthAt(norms.data, k);
        let [products, sum] = [0, 0];
        for (let i = k; i < dy.data.length; i += c) {
          const g = dy.data[i];
          if (dx) dx.data[i] = g * magnitude.data[k] * inverse;
          products += g * x.data[i];
          sum += g;
        }
        if (dmagnitude) dmagnitude.data[k] = products * inverse;
        if (dbias) dbias.data[k] = sum;
      }
    },
  },
  samples: [
    normSample([3, 7, 33], true),
    normSample([2, 9, 5, 6], false),
    normSample([2, 320], true),
    normSample([1, 1], true),
    normSample([70, 40], false),
    ...awkwardShapes.map((x, i) => normSample([...x], i % 2 > 0)),
  ],
});

/** What is zero stays zero. */
const lengthAt = (norms: Numbers, k: number): number => norms[k] || 1;

function normSample(x: number[], bias: boolean): Sample<Record<string, never>> {
  const c = x.slice(-1);
  return {
    inputs: { x, magnitude: c, norms: c, ...(bias ? { bias: c } : {}) },
    attrs: {},
    dtypes: { magnitude: 'float32', norms: 'float32' },
    nonnegative: ['norms'],
    frozen: ['norms'],
  };
}

/**
 * x [..., c], which a weight whose rows have the lengths `norms` made, as it were made by rows of length `magnitude`, plus the bias [c]:
 * x magnitude / norms + bias. Both lengths are [c] in float32. A row of zeros stays one.
 */
export const weightNorm = (x: Tensor, magnitude: Tensor, norms: Tensor, bias?: Tensor): Tensor =>
  apply(weightNormOp, { x, magnitude, norms, bias }, {});
