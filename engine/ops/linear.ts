// y = activation(x W^T + bias) + residual, the matrix product with everything that can ride in its epilogue; and the
// batched product of two tensors. W is [n, k] as checkpoints store it. Where a gradient is wanted an activation is an op of its
// own, which keeps what it was given, as PyTorch does: to compute it again would be one product more to a layer's three.
import { isRecording } from '../grad.ts';
import {
  apply,
  defineOp,
  type Launch,
  type RefTensor,
  type RefTensors,
  sameFloat,
  type Tensors,
} from '../op.ts';
import { ShapeError, sizeOf, type Tensor } from '../tensor.ts';
import { add } from './binary.ts';
import * as scalar from './math.ts';
import { rowsOf } from './reduce.ts';
import { addScaled, dotAt } from './runs.ts';
import { awkwardShapes, awkwardSizes } from './samples.ts';
import { gelu, quickGelu, silu } from './unary.ts';

export type Activation = 'none' | 'silu' | 'gelu' | 'quick_gelu' | 'geglu';
/** The kernels' number for each activation. */
export const activationCode: Record<Activation, number> = {
  none: 0,
  silu: 1,
  gelu: 2,
  quick_gelu: 3,
  geglu: 4,
};
const activations = ['silu', 'gelu', 'quick_gelu', 'geglu'] as const;
const scalarOf = {
  none: scalar.identity,
  silu: scalar.silu,
  gelu: scalar.gelu,
  quick_gelu: scalar.quickGelu,
};

type None = Record<string, never>;

interface ActivatedAttrs {
  activation: Exclude<Activation, 'none'>;
}

/** m rows, n columns of y, h columns before the activation (twice n for geglu), k inputs. */
export function dims(x: readonly number[], weight: readonly number[], activation: Activation) {
  const [h, k] = weight;
  return { m: sizeOf(x.slice(0, -1)), n: activation === 'geglu' ? h / 2 : h, h, k };
}

/** The shape of y; throws where weight, bias or residual does not fit x. */
export function checkLinear(op: string, t: Tensors, activation: Activation): readonly number[] {
  const { x, weight, bias, residual } = t;
  const k = x.shape.at(-1) as number;
  if (weight.shape.length !== 2 || weight.shape[1] !== k) {
    throw new ShapeError(
      `${op}: weight [${weight.shape}] takes ${weight.shape[1]} inputs, x [${x.shape}] has ${k}`,
    );
  }
  const { n, h } = dims(x.shape, weight.shape, activation);
  const shape = [...x.shape.slice(0, -1), n];
  if (bias && bias.size !== h) throw new ShapeError(`${op}: bias [${bias.shape}] for ${h} outputs`);
  if (residual && residual.shape.join() !== shape.join()) {
    throw new ShapeError(`${op}: residual [${residual.shape}] is added to y [${shape}]`);
  }
  return shape;
}

/** y of t's x, weight, bias and residual. */
export function linearReference({ y, x, weight, bias, residual }: RefTensors, activation: Activation): void {
  const { m, n, h, k } = dims(x.shape, weight.shape, activation);
  const pre = new Float64Array(m * h);
  for (let i = 0; i < m; i++)
    for (let j = 0; j < h; j++)
      pre[i * h + j] = (bias ? bias.data[j] : 0) + dotAt(x.data, i * k, weight.data, j * k, k);
  for (let i = 0; i < m; i++)
    for (let j = 0; j < n; j++) {
      const at = i * h + j;
      const value =
        activation === 'geglu' ? pre[at] * scalar.gelu.f(pre[at + n]) : scalarOf[activation].f(pre[at]);
      y.data[i * n + j] = value + (residual ? residual.data[i * n + j] : 0);
    }
}

const linearOp = defineOp<None>({
  name: 'linear',
  outputs: (t) => ({
    y: {
      shape: checkLinear('linear', t, 'none'),
      dtype: sameFloat('linear', t, 'x', 'weight', 'bias', 'residual'),
    },
  }),
  saves: ['x', 'weight'],
  passes: ['residual'],
  flops: ({ x, weight }) => 2 * x.size * weight.shape[0],
  forward: (t, _, launch) => launchLinear(t, 'none', launch),
  backward(t, _, launch) {
    const { m, n, k } = dims(t.x.shape, t.weight.shape, 'none');
    if (t.dx) launch('linear_backward_x', [t.dx, t.dy, t.weight, m, n, k]);
    if (t.dweight) launch('linear_backward_weight', [t.dweight, t.dy, t.x, m, n, k]);
    if (t.dbias) launch('sum_forward', [t.dbias, t.dy, 1, m, n]);
  },
  reference: {
    forward: (t) => linearReference(t, 'none'),
    backward({ dx, dweight, dbias, dresidual, dy, x, weight }) {
      const { m, n, k } = dims(x.shape, weight.shape, 'none');
      dresidual?.data.set(dy.data);
      dx?.data.fill(0);
      dweight?.data.fill(0);
      dbias?.data.fill(0);
      for (let i = 0; i < m; i++)
        for (let j = 0; j < n; j++) {
          const g = dy.data[i * n + j];
          if (dbias) dbias.data[j] += g;
          if (dx) addScaled(dx.data, i * k, g, weight.data, j * k, k);
          if (dweight) addScaled(dweight.data, j * k, g, x.data, i * k, k);
        }
    },
  },
  samples: [
    { inputs: { x: [1, 3], weight: [5, 3] }, attrs: {} },
    { inputs: { x: [2, 7, 20], weight: [33, 20], bias: [33] }, attrs: {} },
    { inputs: { x: [5, 16], weight: [8, 16], bias: [8], residual: [5, 8] }, attrs: {} },
    { inputs: { x: [34, 290], weight: [530, 290], bias: [530] }, attrs: {} },
    { inputs: { x: [144, 12], weight: [20, 12] }, attrs: {} },
    ...awkwardSizes.map(([m, n, k], i) => ({ inputs: awkwardInputs([m, n, n, k], i), attrs: {} })),
  ],
});

const activatedOp = defineOp<ActivatedAttrs>({
  name: 'linear_activated',
  outputs: (t, { activation }) => ({
    y: {
      shape: checkLinear('linear', t, activation),
      dtype: sameFloat('linear', t, 'x', 'weight', 'bias', 'residual'),
    },
  }),
  saves: [],
  flops: ({ x, weight }) => 2 * x.size * weight.shape[0],
  forward: (t, { activation }, launch) => launchLinear(t, activation, launch),
  reference: { forward: (t, { activation }) => linearReference(t, activation) },
  samples: [
    { inputs: { x: [5, 16], weight: [8, 16], bias: [8], residual: [5, 8] }, attrs: { activation: 'silu' } },
    {
      inputs: { x: [19, 31], weight: [17, 31], bias: [17], residual: [19, 17] },
      attrs: { activation: 'gelu' },
    },
    { inputs: { x: [3, 40], weight: [24, 40], bias: [24] }, attrs: { activation: 'quick_gelu' } },
    {
      inputs: { x: [13, 24], weight: [38, 24], bias: [38], residual: [13, 19] },
      attrs: { activation: 'geglu' },
    },
    { inputs: { x: [4, 32], weight: [256, 32], bias: [256] }, attrs: { activation: 'geglu' } },
    { inputs: { x: [1, 40], weight: [140, 40] }, attrs: { activation: 'geglu' } },
    ...awkwardSizes.map(([m, n, k], i) => {
      const activation = activations[i % activations.length];
      const h = activation === 'geglu' ? 2 * n : n;
      return { inputs: awkwardInputs([m, n, h, k], i), attrs: { activation } };
    }),
  ],
});

function launchLinear(t: Tensors, activation: Activation, launch: Launch): void {
  const { m, n, k } = dims(t.x.shape, t.weight.shape, activation);
  launch('linear_forward', [t.y, t.x, t.weight, t.bias, t.residual, m, n, k, activationCode[activation]]);
}

/** Bias and residual in some of the samples. */
function awkwardInputs([m, n, h, k]: readonly number[], i: number) {
  const more = { bias: [h], ...(i % 3 ? { residual: [m, n] } : {}) };
  return { x: [m, k], weight: [h, k], ...(i % 4 ? more : {}) };
}

/**
 * activation(x W^T + bias) + residual. x [..., k], weight [n, k], bias [n], residual [..., n] → [..., n].
 * `geglu` takes weight [2n, k] and gives the first half times gelu of the second (Shazeer 2020).
 */
export function linear(
  x: Tensor,
  weight: Tensor,
  bias?: Tensor,
  { residual, activation = 'none' }: { residual?: Tensor; activation?: Activation } = {},
): Tensor {
  const inputs = { x, weight, bias, residual };
  if (activation === 'none') return apply(linearOp, inputs, {});
  if (!isRecording() || !Object.values(inputs).some((t) => t?.node))
    return apply(activatedOp, inputs, { activation });
  const y = activate(linear(x, weight, bias), activation);
  return residual ? add(y, residual) : y;
}

/** What a linear layer's activation makes of x. */
export function activate(x: Tensor, activation: Exclude<Activation, 'none'>): Tensor {
  if (activation === 'geglu') return geglu(x);
  return { silu, gelu, quick_gelu: quickGelu }[activation](x);
}

interface MatmulAttrs {
  transA: boolean;
  transB: boolean;
}

const batchOf = (shape: readonly number[]) => sizeOf(shape.slice(0, -2));

function matmulDims(a: readonly number[], b: readonly number[], { transA, transB }: MatmulAttrs) {
  const [ra, ca] = a.slice(-2);
  const [rb, cb] = b.slice(-2);
  const [m, k] = transA ? [ca, ra] : [ra, ca];
  const [kb, n] = transB ? [cb, rb] : [rb, cb];
  return { m, n, k, kb };
}

const matmulOp = defineOp<MatmulAttrs>({
  name: 'matmul',
  outputs(t, attrs) {
    const { m, n, k, kb } = matmulDims(t.a.shape, t.b.shape, attrs);
    if (k !== kb || batchOf(t.a.shape) !== batchOf(t.b.shape)) {
      throw new ShapeError(
        `matmul: a [${t.a.shape}] and b [${t.b.shape}] do not chain (inner ${k} and ${kb})`,
      );
    }
    return { y: { shape: [...t.a.shape.slice(0, -2), m, n], dtype: sameFloat('matmul', t, 'a', 'b') } };
  },
  saves: ['a', 'b'],
  flops(t, attrs) {
    const { m, n, k } = matmulDims(t.a.shape, t.b.shape, attrs);
    return 2 * batchOf(t.a.shape) * m * n * k;
  },
  forward: ({ y, a, b }, attrs, launch) => launchMatmul(launch, { y, a, b, ...attrs }),
  backward(t, attrs, launch) {
    for (const product of gradients(t, attrs)) launchMatmul(launch, product);
  },
  reference: {
    forward: ({ y, a, b }, attrs) => multiply({ y, a, b, ...attrs }),
    backward: (t, attrs) => gradients(t, attrs).forEach(multiply),
  },
  samples: [
    { inputs: { a: [3, 5], b: [5, 7] }, attrs: { transA: false, transB: false } },
    { inputs: { a: [2, 17, 9], b: [2, 33, 9] }, attrs: { transA: false, transB: true } },
    { inputs: { a: [2, 9, 17], b: [2, 9, 20] }, attrs: { transA: true, transB: false } },
    { inputs: { a: [6, 4], b: [8, 6] }, attrs: { transA: true, transB: true } },
    ...awkwardSizes.map(([m, n, k], i) => {
      const [transA, transB] = [i % 2 > 0, i % 4 > 1];
      const batch = i % 3 ? [1 + (i % 3)] : [];
      const inputs = {
        a: [...batch, ...(transA ? [k, m] : [m, k])],
        b: [...batch, ...(transB ? [n, k] : [k, n])],
      };
      return { inputs, attrs: { transA, transB } };
    }),
  ],
});

/** y = op(a) op(b). */
interface Product<T> extends MatmulAttrs {
  y: T;
  a: T;
  b: T;
}

/** The gradients of a and b, where they are wanted. */
function gradients<T>(
  { a, b, dy, da, db }: Record<string, T>,
  { transA, transB }: MatmulAttrs,
): Product<T>[] {
  const ofA = transA
    ? { y: da, a: b, b: dy, transA: transB, transB: true }
    : { y: da, a: dy, b, transA: false, transB: !transB };
  const ofB = transB
    ? { y: db, a: dy, b: a, transA: true, transB: transA }
    : { y: db, a, b: dy, transA: !transA, transB: false };
  return [ofA, ofB].filter(({ y }) => y);
}

function launchMatmul(launch: Launch, { y, a, b, ...attrs }: Product<Tensor>): void {
  const { m, n, k } = matmulDims(a.shape, b.shape, attrs);
  const flags = [attrs.transA, attrs.transB].map(Number);
  launch('matmul_forward', [y, a, b, batchOf(a.shape), m, n, k, ...flags]);
}

function multiply({ y, a, b, transA, transB }: Product<RefTensor>): void {
  const { m, n, k } = matmulDims(a.shape, b.shape, { transA, transB });
  for (let z = 0; z < batchOf(a.shape); z++)
    for (let i = 0; i < m; i++)
      for (let j = 0; j < n; j++) {
        let total = 0;
        for (let p = 0; p < k; p++) {
          const left = a.data[z * m * k + (transA ? p * m + i : i * k + p)];
          total += left * b.data[z * k * n + (transB ? j * k + p : p * n + j)];
        }
        y.data[(z * m + i) * n + j] = total;
      }
}

/** op(a) op(b) over equal leading batch axes; trans flags swap the last two axes of that input first. */
export const matmul = (
  a: Tensor,
  b: Tensor,
  { transA = false, transB = false }: Partial<MatmulAttrs> = {},
): Tensor => apply(matmulOp, { a, b }, { transA, transB });

const gegluOp = defineOp<None>({
  name: 'geglu',
  outputs: (t) => ({
    y: {
      shape: [...t.x.shape.slice(0, -1), (t.x.shape.at(-1) as number) / 2],
      dtype: sameFloat('geglu', t, 'x'),
    },
  }),
  saves: ['x'],
  forward: (t, _, launch) => launch('geglu_forward', [t.y, t.x, ...rowsOf(t.y.shape)]),
  backward: (t, _, launch) => launch('geglu_backward', [t.dx, t.dy, t.x, ...rowsOf(t.dy.shape)]),
  reference: {
    forward({ y, x }) {
      const [rows, c] = rowsOf(y.shape);
      for (let r = 0; r < rows; r++)
        for (let i = 0; i < c; i++)
          y.data[r * c + i] = x.data[2 * r * c + i] * scalar.gelu.f(x.data[(2 * r + 1) * c + i]);
    },
    backward({ dx, dy, x }) {
      const [rows, c] = rowsOf(dy.shape);
      for (let r = 0; r < rows; r++)
        for (let i = 0; i < c; i++) {
          const [a, b, g] = [x.data[2 * r * c + i], x.data[(2 * r + 1) * c + i], dy.data[r * c + i]];
          dx.data[2 * r * c + i] = g * scalar.gelu.f(b);
          dx.data[(2 * r + 1) * c + i] = g * a * scalar.gelu.df(b);
        }
    },
  },
  samples: [[1, 2], [5, 64], ...awkwardShapes.map(([rows, c]) => [rows, 2 * c])].map((x) => ({
    inputs: { x },
    attrs: {},
  })),
});

/** The first half of the last axis times gelu of the second. */
export const geglu = (x: Tensor): Tensor => apply(gegluOp, { x }, {});
