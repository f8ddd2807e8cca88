// Elementwise functions of one tensor, each y[i] = f(x[i]), dx = dy f'(x): a family of records made from one function
// and its derivative. `scale` (y = a x + b) and `cast` belong here too.
import { type DType, isFloat } from '../../io/dtype.ts';
import { apply, defineOp, type OpRecord, sameFloat } from '../op.ts';
import { ShapeError, type Tensor } from '../tensor.ts';
import * as scalar from './math.ts';
import { awkwardShapes } from './samples.ts';

type None = Record<string, never>;

const shapes = [[1], [7], [16], [2, 3, 4, 5], [4099], ...awkwardShapes];

function unary(name: string, { f, df }: scalar.Scalar): (x: Tensor) => Tensor {
  const record: OpRecord<None> = defineOp<None>({
    name,
    outputs: (t) => ({ y: { shape: t.x.shape, dtype: sameFloat(name, t, 'x') } }),
    saves: ['x'],
    forward: (t, _, launch) => launch(`${name}_forward`, [t.y, t.x, t.x.size]),
    backward: (t, _, launch) => launch(`${name}_backward`, [t.dx, t.dy, t.x, t.x.size]),
    reference: {
      forward: ({ y, x }) => {
        for (let i = 0; i < x.data.length; i++) y.data[i] = f(x.data[i]);
      },
      backward: ({ dx, dy, x }) => {
        for (let i = 0; i < x.data.length; i++) dx.data[i] = dy.data[i] * df(x.data[i]);
      },
    },
    samples: shapes.map((x) => ({ inputs: { x }, attrs: {} })),
  });
  return (x) => apply(record, { x }, {});
}

export const silu = unary('silu', scalar.silu);
export const gelu = unary('gelu', scalar.gelu);
export const quickGelu = unary('quick_gelu', scalar.quickGelu);
export const relu = unary('relu', { f: (x) => (x < 0 ? 0 : x), df: (x) => (x > 0 ? 1 : 0) });
/** Of the slope that ESRGAN has below 0. */
export const leakyRelu = unary('leaky_relu', {
  f: (x) => (x < 0 ? 0.2 * x : x),
  df: (x) => (x > 0 ? 1 : 0.2),
});
export const exp = unary('exp', { f: Math.exp, df: Math.exp });
export const square = unary('square', { f: (x) => x * x, df: (x) => 2 * x });
export const tanh = unary('tanh', { f: Math.tanh, df: (x) => 1 - Math.tanh(x) ** 2 });
export const sigmoid = unary('sigmoid', {
  f: scalar.sigmoid,
  df: (x) => scalar.sigmoid(x) * (1 - scalar.sigmoid(x)),
});

const scaleOp = defineOp<{ a: number; b: number }>({
  name: 'scale',
  outputs: (t) => ({ y: { shape: t.x.shape, dtype: sameFloat('scale', t, 'x') } }),
  saves: [],
  forward: (t, { a, b }, launch) => launch('scale_forward', [t.y, t.x, t.x.size, a, b]),
  backward: (t, { a }, launch) => launch('scale_forward', [t.dx, t.dy, t.dy.size, a, 0]),
  reference: {
    forward: ({ y, x }, { a, b }) => {
      for (let i = 0; i < x.data.length; i++) y.data[i] = a * x.data[i] + b;
    },
    backward: ({ dx, dy }, { a }) => {
      for (let i = 0; i < dy.data.length; i++) dx.data[i] = a * dy.data[i];
    },
  },
  samples: shapes.map((x) => ({ inputs: { x }, attrs: { a: 0.5, b: -2 } })),
});

/** a x + b with numbers a, b. */
export const scale = (x: Tensor, a: number, b = 0): Tensor => apply(scaleOp, { x }, { a, b });

/** Spares the launches of a factor of 1, which every adapter has where alpha is the rank. */
export const scaled = (x: Tensor, factor: number): Tensor => (factor === 1 ? x : scale(x, factor));

const castOp = defineOp<{ dtype: DType; from: DType }>({
  name: 'cast',
  outputs(t, { dtype }) {
    if (!isFloat(dtype) || !isFloat(t.x.dtype))
      throw new ShapeError(`cast: from ${t.x.dtype} to ${dtype} is not a float cast`);
    return { y: { shape: t.x.shape, dtype } };
  },
  saves: [],
  forward: (t, { dtype }, launch) => launch(`cast_to_${dtype}_forward`, [t.y, t.x, t.x.size]),
  backward: (t, { from }, launch) => launch(`cast_to_${from}_forward`, [t.dx, t.dy, t.dy.size]),
  reference: {
    forward: ({ y, x }) => y.data.set(x.data),
    backward: ({ dx, dy }) => dx.data.set(dy.data),
  },
  samples: shapes.map((x) => ({
    inputs: { x },
    attrs: { dtype: 'float32', from: 'float32' } as const,
  })),
});

/** The same numbers in another floating-point type; the tensor itself where it has that type already. */
export const cast = (x: Tensor, dtype: DType): Tensor =>
  x.dtype === dtype ? x : apply(castOp, { x }, { dtype, from: x.dtype });
