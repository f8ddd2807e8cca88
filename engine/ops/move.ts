// Ops that move elements: concat and slice along an axis, permute, nearest upsampling, row lookup. Tensors are always
// contiguous, so each of these copies, once; reshape (tensor.ts) is the only view.
import type { DType } from '../../io/dtype.ts';
import { noGrad } from '../grad.ts';
import { apply, defineOp, type Numbers, sameFloat, type Tensors, type Update, updateOf } from '../op.ts';
import { ShapeError, sizeOf, type Tensor } from '../tensor.ts';
import { around, resolveAxis } from './reduce.ts';
import { awkwardShapes, awkwardSizes } from './samples.ts';
import { cast } from './unary.ts';

interface ConcatAttrs {
  axis: number;
  lengths: readonly number[];
}

/** Where part i starts along the axis. */
const startOf = (lengths: readonly number[], i: number): number =>
  lengths.slice(0, i).reduce((a, b) => a + b, 0);

const concatOp = defineOp<ConcatAttrs>({
  name: 'concat',
  outputs(t, { axis, lengths }) {
    const names = lengths.map((_, i) => `x${i}`);
    const others = (shape: readonly number[]) => shape.filter((_, i) => i !== axis).join();
    for (const name of names) {
      if (others(t[name].shape) !== others(t.x0.shape)) {
        throw new ShapeError(`concat: [${t.x0.shape}] and [${t[name].shape}] differ outside axis ${axis}`);
      }
    }
    const shape = t.x0.shape.map((d, i) => (i === axis ? startOf(lengths, lengths.length) : d));
    return { y: { shape, dtype: sameFloat('concat', t, ...names) } };
  },
  saves: [],
  forward(t, { axis, lengths }, launch) {
    const [outer, n, inner] = around(t.y.shape, axis);
    lengths.forEach((length, i) => {
      launch('place_forward', [t.y, t[`x${i}`], outer, n, startOf(lengths, i), length, inner]);
    });
  },
  backward(t, { axis, lengths }, launch) {
    const [outer, n, inner] = around(t.dy.shape, axis);
    lengths.forEach((length, i) => {
      const dx = t[`dx${i}`];
      if (dx) launch('slice_forward', [dx, t.dy, outer, n, startOf(lengths, i), length, inner]);
    });
  },
  reference: {
    forward(t, { axis, lengths }) {
      lengths.forEach((length, i) => {
        eachInSlice(around(t.y.shape, axis), startOf(lengths, i), length, (whole, part) => {
          t.y.data[whole] = t[`x${i}`].data[part];
        });
      });
    },
    backward(t, { axis, lengths }) {
      lengths.forEach((length, i) => {
        const dx = t[`dx${i}`];
        eachInSlice(around(t.dy.shape, axis), startOf(lengths, i), length, (whole, part) => {
          if (dx) dx.data[part] = t.dy.data[whole];
        });
      });
    },
  },
  samples: [
    { inputs: { x0: [2], x1: [3] }, attrs: { axis: 0, lengths: [2, 3] } },
    { inputs: { x0: [2, 3, 5], x1: [2, 3, 8] }, attrs: { axis: 2, lengths: [5, 8] } },
    { inputs: { x0: [2, 1, 4], x1: [2, 5, 4], x2: [2, 2, 4] }, attrs: { axis: 1, lengths: [1, 5, 2] } },
    ...awkwardSizes.map(([a, b, c], i) => {
      const [axis, x0] = [i % 3, [1 + (i % 4), a, b]];
      const length = axis === 0 ? 1 + (c % 5) : c;
      const x1 = x0.map((d, at) => (at === axis ? length : d));
      return { inputs: { x0, x1 }, attrs: { axis, lengths: [x0[axis], length] } };
    }),
  ],
});

/** Visits `length` entries from `start` of the middle one of three axes. */
function eachInSlice(
  [outer, n, inner]: readonly number[],
  start: number,
  length: number,
  visit: (whole: number, part: number) => void,
): void {
  for (let o = 0; o < outer; o++)
    for (let i = 0; i < length * inner; i++) visit((o * n + start) * inner + i, o * length * inner + i);
}

/** Joins tensors that agree in every other axis. */
export function concat(tensors: readonly Tensor[], axis: number): Tensor {
  const at = resolveAxis('concat', axis, tensors[0].shape.length);
  const inputs = Object.fromEntries(tensors.map((t, i) => [`x${i}`, t]));
  return apply(concatOp, inputs, { axis: at, lengths: tensors.map((t) => t.shape[at]) });
}

interface SliceAttrs {
  axis: number;
  start: number;
  length: number;
}

const sliceOp = defineOp<SliceAttrs>({
  name: 'slice',
  outputs(t, { axis, start, length }) {
    if (start < 0 || length < 1 || start + length > t.x.shape[axis]) {
      throw new ShapeError(`slice: ${start}..${start + length} of axis ${axis} of x [${t.x.shape}]`);
    }
    return {
      y: { shape: t.x.shape.map((d, i) => (i === axis ? length : d)), dtype: sameFloat('slice', t, 'x') },
    };
  },
  saves: [],
  forward(t, { axis, start, length }, launch) {
    const [outer, n, inner] = around(t.x.shape, axis);
    launch('slice_forward', [t.y, t.x, outer, n, start, length, inner]);
  },
  backward(t: Tensors, { axis, start, length }, launch) {
    const [outer, n, inner] = around(t.dx.shape, axis);
    launch('fill_forward', [t.dx, t.dx.size, 0]);
    launch('place_forward', [t.dx, t.dy, outer, n, start, length, inner]);
  },
  reference: {
    forward({ y, x }, { axis, start, length }) {
      eachInSlice(around(x.shape, axis), start, length, (whole, part) => {
        y.data[part] = x.data[whole];
      });
    },
    backward({ dx, dy }, { axis, start, length }) {
      dx.data.fill(0);
      eachInSlice(around(dx.shape, axis), start, length, (whole, part) => {
        dx.data[whole] = dy.data[part];
      });
    },
  },
  samples: [
    { inputs: { x: [5] }, attrs: { axis: 0, start: 1, length: 3 } },
    { inputs: { x: [2, 7, 5] }, attrs: { axis: 1, start: 2, length: 4 } },
    { inputs: { x: [3, 16] }, attrs: { axis: 1, start: 15, length: 1 } },
    ...awkwardSizes.map(([a, b, c], i) => {
      const [axis, x] = [i % 3, [1 + (i % 4), a, b]];
      const size = x[axis];
      const length = 1 + (c % size);
      return { inputs: { x }, attrs: { axis, start: (size - length) >> (i % 2), length } };
    }),
  ],
});

/** `length` entries of `axis` from `start`. */
export function slice(x: Tensor, axis: number, start: number, length: number): Tensor {
  const at = resolveAxis('slice', axis, x.shape.length);
  return apply(sliceOp, { x }, { axis: at, start, length });
}

/** A copy in storage of its own, off the tape; in another floating-point type where one is told. */
export const duplicate = (x: Tensor, dtype: DType = x.dtype): Tensor =>
  noGrad(() => (dtype === x.dtype ? slice(x, 0, 0, x.shape[0]) : cast(x, dtype)));

const copyOp = defineOp<Record<string, never>>({
  name: 'copy',
  outputs(t) {
    if (t.y.size !== t.x.size || t.y.dtype !== t.x.dtype)
      throw new ShapeError(`copy: ${t.x.dtype} [${t.x.shape}] does not fit ${t.y.dtype} [${t.y.shape}]`);
    return {};
  },
  saves: [],
  updates: ['y'],
  forward: (t, _, launch) => launch('place_forward', [t.y, t.x, 1, t.x.size, 0, t.x.size, 1]),
  reference: {
    forward: ({ y, x }) => y.data.set(x.data),
  },
  samples: [[1], [7], [4099], ...awkwardShapes].map((shape) => ({
    inputs: { y: shape, x: shape },
    attrs: {},
  })),
});

/** y's elements become x's. */
export const copy = (y: Tensor, x: Tensor): Update => updateOf(copyOp, { y, x }, {});

interface PermuteAttrs {
  order: readonly number[];
}

/** Four output dimensions and the input stride behind each, missing leading axes as 1. */
function permutation(shape: readonly number[], order: readonly number[]): number[] {
  const strides = shape.map((_, i) => sizeOf(shape.slice(i + 1)));
  const lead = Array<number>(4 - order.length);
  return [
    ...lead.fill(1),
    ...order.map((i) => shape[i]),
    ...lead.map(() => 0),
    ...order.map((i) => strides[i]),
  ];
}

const inverse = (order: readonly number[]): number[] => order.map((_, i) => order.indexOf(i));

const permuteOp = defineOp<PermuteAttrs>({
  name: 'permute',
  outputs(t, { order }) {
    if (order.length > 4 || [...order].sort().join() !== t.x.shape.map((_, i) => i).join()) {
      throw new ShapeError(`permute: order [${order}] for x [${t.x.shape}]`);
    }
    return { y: { shape: order.map((i) => t.x.shape[i]), dtype: sameFloat('permute', t, 'x') } };
  },
  saves: [],
  forward: (t, { order }, launch) => launch('permute_forward', [t.y, t.x, ...permutation(t.x.shape, order)]),
  backward: (t, { order }, launch) =>
    launch('permute_forward', [t.dx, t.dy, ...permutation(t.dy.shape, inverse(order))]),
  reference: {
    forward: ({ y, x }, { order }) => permuteInto(y.data, x.data, permutation(x.shape, order)),
    backward: ({ dx, dy }, { order }) => permuteInto(dx.data, dy.data, permutation(dy.shape, inverse(order))),
  },
  samples: [
    { inputs: { x: [3, 5] }, attrs: { order: [1, 0] } },
    { inputs: { x: [2, 3, 4] }, attrs: { order: [0, 2, 1] } },
    { inputs: { x: [2, 3, 4, 5] }, attrs: { order: [0, 2, 3, 1] } },
    { inputs: { x: [2, 7, 3, 16] }, attrs: { order: [0, 3, 1, 2] } },
    ...awkwardSizes.map(([a, b], i) => {
      const orders = [
        [1, 0],
        [0, 2, 1],
        [2, 1, 0],
        [0, 2, 3, 1],
        [3, 0, 2, 1],
      ];
      const order = orders[i % orders.length];
      const x = order.length === 4 ? [1 + (a % 33), b, 1 + (i % 3), 2] : [a, b, 1 + (i % 3)];
      return { inputs: { x: x.slice(0, order.length) }, attrs: { order } };
    }),
  ],
});

function permuteInto(y: Numbers, x: Numbers, [d0, d1, d2, d3, s0, s1, s2, s3]: number[]): void {
  let at = 0;
  for (let a = 0; a < d0; a++)
    for (let b = 0; b < d1; b++)
      for (let c = 0; c < d2; c++)
        for (let d = 0; d < d3; d++) y[at++] = x[a * s0 + b * s1 + c * s2 + d * s3];
}

/** Axis i of the result is axis order[i] of x; up to four axes. */
export const permute = (x: Tensor, order: readonly number[]): Tensor => apply(permuteOp, { x }, { order });

const imageInts = (x: readonly number[], y: readonly number[]) => [...x, y[1], y[2]];

const upsampleOp = defineOp<{ height: number; width: number }>({
  name: 'upsample_nearest',
  outputs(t, { height, width }) {
    if (t.x.shape.length !== 4)
      throw new ShapeError(`upsample_nearest: x [${t.x.shape}] is not [n, h, w, c]`);
    const [n, , , c] = t.x.shape;
    return { y: { shape: [n, height, width, c], dtype: sameFloat('upsample_nearest', t, 'x') } };
  },
  saves: [],
  forward: (t, _, launch) =>
    launch('upsample_nearest_forward', [t.y, t.x, ...imageInts(t.x.shape, t.y.shape)]),
  backward: (t, _, launch) =>
    launch('upsample_nearest_backward', [t.dx, t.dy, ...imageInts(t.dx.shape, t.dy.shape)]),
  reference: {
    forward: ({ y, x }) => eachNearest(x.shape, y.shape, (big, small) => (y.data[big] = x.data[small])),
    backward({ dx, dy }) {
      dx.data.fill(0);
      eachNearest(dx.shape, dy.shape, (big, small) => (dx.data[small] += dy.data[big]));
    },
  },
  samples: [
    { inputs: { x: [1, 2, 2, 3] }, attrs: { height: 4, width: 4 } },
    { inputs: { x: [2, 3, 5, 17] }, attrs: { height: 5, width: 10 } },
    ...awkwardSizes.map(([c, a, b], i) => {
      const x = [1 + (i % 2), 1 + (i % 5), 1 + (i % 7), c];
      return { inputs: { x }, attrs: { height: 1 + (a % 11), width: 1 + (b % 13) } };
    }),
  ],
});

function eachNearest(
  small: readonly number[],
  big: readonly number[],
  visit: (big: number, small: number) => void,
): void {
  const [n, h, w, c] = small;
  const [, oh, ow] = big;
  for (let image = 0; image < n; image++)
    for (let i = 0; i < oh; i++)
      for (let j = 0; j < ow; j++) {
        const from = (image * h + Math.floor((i * h) / oh)) * w + Math.floor((j * w) / ow);
        for (let k = 0; k < c; k++) visit(((image * oh + i) * ow + j) * c + k, from * c + k);
      }
}

/** Nearest neighbour to [n, height, width, c], any size: row i reads floor(i h / height), as torch does. */
export const upsampleNearest = (x: Tensor, height: number, width: number): Tensor =>
  apply(upsampleOp, { x }, { height, width });

const quarters = ['x0', 'x1', 'x2', 'x3'];

const joinQuartersOp = defineOp<Record<string, never>>({
  name: 'join_quarters',
  outputs(t) {
    for (const name of quarters)
      if (t.x0.shape.length !== 4 || t[name].shape.join() !== t.x0.shape.join())
        throw new ShapeError(
          `join_quarters: [${t[name].shape}] beside [${t.x0.shape}], not [n, h, w, c] both`,
        );
    const [n, h, w, c] = t.x0.shape;
    return { y: { shape: [n, 2 * h, 2 * w, c], dtype: sameFloat('join_quarters', t, ...quarters) } };
  },
  saves: [],
  forward(t, _, launch) {
    const [n, h, w, c] = t.x0.shape;
    launch('join_quarters_forward', [t.y, ...quarters.map((name) => t[name]), n * h, w, c]);
  },
  reference: {
    forward(t) {
      const [, , w, c] = t.x0.shape;
      for (let i = 0; i < t.y.data.length; i++) {
        const [channel, pixel] = [i % c, Math.floor(i / c)];
        const [row, column] = [Math.floor(pixel / (2 * w)), pixel % (2 * w)];
        const from = (row >> 1) * w + (column >> 1);
        t.y.data[i] = t[quarters[2 * (row & 1) + (column & 1)]].data[from * c + channel];
      }
    },
  },
  samples: [
    [1, 1, 1, 1],
    [2, 3, 5, 17],
    ...awkwardSizes.map(([c, a, b], i) => [1 + (i % 2), 1 + (a % 11), 1 + (b % 13), c]),
  ].map((shape) => ({ inputs: Object.fromEntries(quarters.map((name) => [name, shape])), attrs: {} })),
});

/** Four images [n, h, w, c] as one [n, 2h, 2w, c], whose pixel (2 i + a, 2 j + b) is (i, j) of image 2 a + b. */
export const joinQuarters = ([x0, x1, x2, x3]: readonly Tensor[]): Tensor =>
  apply(joinQuartersOp, { x0, x1, x2, x3 }, {});

const embeddingOp = defineOp<Record<string, never>>({
  name: 'embedding',
  outputs(t) {
    if (t.ids.dtype !== 'int32') throw new ShapeError(`embedding: ids are ${t.ids.dtype}, not int32`);
    return { y: { shape: [...t.ids.shape, t.weight.shape[1]], dtype: sameFloat('embedding', t, 'weight') } };
  },
  saves: ['ids', 'weight'],
  storage: 'weight',
  forward: (t, _, launch) =>
    launch('embedding_forward', [t.y, t.weight, t.ids, t.ids.size, t.weight.shape[1]]),
  backward(t, _, launch) {
    const [v, c] = t.weight.shape;
    launch('embedding_backward', [t.dweight, t.dy, t.ids, t.ids.size, c, v]);
  },
  reference: {
    forward({ y, ids, weight }) {
      const c = weight.shape[1];
      for (let i = 0; i < y.data.length; i++)
        y.data[i] = weight.data[ids.data[Math.floor(i / c)] * c + (i % c)];
    },
    backward({ dweight, dy, ids, weight }) {
      const c = weight.shape[1];
      dweight.data.fill(0);
      for (let i = 0; i < dy.data.length; i++)
        dweight.data[ids.data[Math.floor(i / c)] * c + (i % c)] += dy.data[i];
    },
  },
  samples: [
    { inputs: { ids: [3], weight: [5, 4] }, attrs: {}, ints: { ids: 5 } },
    { inputs: { ids: [2, 9], weight: [7, 17] }, attrs: {}, ints: { ids: 7 } },
    ...awkwardSizes.map(([n, v, c]) => ({
      inputs: { ids: [n], weight: [v, c] },
      attrs: {},
      ints: { ids: v },
    })),
  ],
});

/** Rows of weight [v, c] at ids (int32, any shape) → [...ids, c]. Ids out of range are refused on the host. */
export function embedding(ids: Tensor, weight: Tensor): Tensor {
  return apply(embeddingOp, { ids, weight }, {});
}
