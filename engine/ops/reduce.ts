// Sum over one axis and its transpose, repetition along a new axis. Both see a tensor as [outer, axis, inner], and the
// sum runs in index order, so it repeats bit for bit.
import { apply, defineOp, type Numbers, sameFloat } from '../op.ts';
import { ShapeError, sizeOf, type Tensor } from '../tensor.ts';
import { awkwardSizes } from './samples.ts';

/** [outer, axis, inner] around `axis`. */
export function around(shape: readonly number[], axis: number): [number, number, number] {
  return [sizeOf(shape.slice(0, axis)), shape[axis], sizeOf(shape.slice(axis + 1))];
}

/** Rows, and the elements of one: a shape as [..., c]. */
export const rowsOf = (shape: readonly number[]): [rows: number, c: number] => [
  sizeOf(shape.slice(0, -1)),
  shape.at(-1) as number,
];

export function resolveAxis(op: string, axis: number, rank: number): number {
  const resolved = axis < 0 ? axis + rank : axis;
  if (!(resolved >= 0 && resolved < rank))
    throw new ShapeError(`${op}: axis ${axis} of a tensor with ${rank} axes`);
  return resolved;
}

const sumOp = defineOp<{ axis: number }>({
  name: 'sum',
  outputs: (t, { axis }) => ({
    y: { shape: t.x.shape.filter((_, i) => i !== axis), dtype: sameFloat('sum', t, 'x') },
  }),
  saves: [],
  forward: (t, { axis }, launch) => launch('sum_forward', [t.y, t.x, ...around(t.x.shape, axis)]),
  backward: (t, { axis }, launch) => launch('broadcast_forward', [t.dx, t.dy, ...around(t.dx.shape, axis)]),
  reference: {
    forward({ y, x }, { axis }) {
      const [outer, n, inner] = around(x.shape, axis);
      for (let o = 0; o < outer; o++)
        for (let i = 0; i < inner; i++) {
          let total = 0;
          for (let a = 0; a < n; a++) total += x.data[(o * n + a) * inner + i];
          y.data[o * inner + i] = total;
        }
    },
    backward: ({ dx, dy }, { axis }) => repeat(dx.data, dy.data, ...around(dx.shape, axis)),
  },
  samples: [
    { inputs: { x: [5] }, attrs: { axis: 0 } },
    { inputs: { x: [3, 17] }, attrs: { axis: 1 } },
    { inputs: { x: [3, 17] }, attrs: { axis: 0 } },
    { inputs: { x: [2, 9, 5] }, attrs: { axis: 1 } },
    { inputs: { x: [3, 0] }, attrs: { axis: 1 } },
    ...awkwardSizes.map(([a, b, c], i) => ({ inputs: { x: [a, b, 1 + (c % 5)] }, attrs: { axis: i % 3 } })),
  ],
});

/** Sums over `axis`, which disappears. */
export const sum = (x: Tensor, axis: number): Tensor =>
  apply(sumOp, { x }, { axis: resolveAxis('sum', axis, x.shape.length) });

const broadcastOp = defineOp<{ axis: number; count: number }>({
  name: 'broadcast',
  outputs(t, { axis, count }) {
    const shape = [...t.x.shape];
    shape.splice(axis, 0, count);
    return { y: { shape, dtype: sameFloat('broadcast', t, 'x') } };
  },
  saves: [],
  forward: (t, { axis }, launch) => launch('broadcast_forward', [t.y, t.x, ...around(t.y.shape, axis)]),
  backward: (t, { axis }, launch) => launch('sum_forward', [t.dx, t.dy, ...around(t.dy.shape, axis)]),
  reference: {
    forward: ({ y, x }, { axis }) => repeat(y.data, x.data, ...around(y.shape, axis)),
    backward: ({ dx, dy }, { axis }) => sumOp.reference.forward({ y: dx, x: dy }, { axis }),
  },
  samples: [
    { inputs: { x: [1] }, attrs: { axis: 0, count: 3 } },
    { inputs: { x: [4, 7] }, attrs: { axis: 1, count: 5 } },
    { inputs: { x: [2, 16] }, attrs: { axis: 2, count: 3 } },
    ...awkwardSizes.map(([a, b, c], i) => ({
      inputs: { x: [a, b] },
      attrs: { axis: i % 3, count: 1 + (c % 5) },
    })),
  ],
});

/** Repeats x `count` times along a new axis put at `axis`. */
export const broadcast = (x: Tensor, axis: number, count: number): Tensor =>
  apply(broadcastOp, { x }, { axis, count });

function repeat(y: Numbers, x: Numbers, outer: number, count: number, inner: number): void {
  for (let o = 0; o < outer; o++)
    for (let a = 0; a < count; a++)
      for (let i = 0; i < inner; i++) y[(o * count + a) * inner + i] = x[o * inner + i];
}
