// One step of Adafactor (Shazeer & Stern 2018) with the options of transformers' `Adafactor(relative_step=False,
// scale_parameter=False)` and no momentum. A tensor of two axes or more keeps the means of its squared gradients along its
// last two axes as the checkpoint lays it out: a convolution's are kh and kw, so its state is two thirds of its size.
import { defineOp, type RefTensors, type Sample, type Update, updateOf } from '../op.ts';
import type { Tensor } from '../tensor.ts';
import { checkStep, eachWeight, roundingArguments, type StepAttrs, type StepInputs } from './optimizer.ts';
import { awkwardSizes } from './samples.ts';

export interface AdafactorAttrs extends StepAttrs {
  /** Added to squared gradients. */
  eps: number;
  /** Bound on the root mean square of an update, before the learning rate. */
  clipThreshold: number;
  /** The second moment's decay at step t is 1 - t^decayRate. */
  decayRate: number;
  /** 1 at the first step. */
  step: number;
}

/** A weight in memory as matrices [outer, rows, columns, inner], of which a convolution has kh x kw for each i; undefined for a vector. */
function matricesOf(shape: readonly number[]): readonly [number, number, number, number] | undefined {
  if (shape.length < 2) return undefined;
  if (shape.length === 2) return [1, shape[0], shape[1], 1];
  const [outer, rows, columns, inner = 1] = shape;
  return [outer, rows, columns, inner];
}

/** The shapes of the factored moments, [outer, rows, inner] and [outer, columns, inner]. */
export function factorShapes(shape: readonly number[]): { row: number[]; col: number[] } | undefined {
  const matrices = matricesOf(shape);
  if (!matrices) return undefined;
  const [outer, rows, columns, inner] = matrices;
  return { row: [outer, rows, inner], col: [outer, columns, inner] };
}

const beta2Of = ({ step, decayRate }: AdafactorAttrs): number => 1 - step ** decayRate;

const adafactorOp = defineOp<AdafactorAttrs>({
  name: 'adafactor',
  outputs: (t) => checkStep('adafactor', t, ['exp_avg_sq_row', 'exp_avg_sq_col']),
  saves: [],
  storage: 'weight',
  updates: ['weight', 'master', 'exp_avg_sq_row', 'exp_avg_sq_col', 'exp_avg_sq'],
  forward(t, attrs, launch) {
    const beta2 = beta2Of(attrs);
    const { gradientScale, eps, lr, weightDecay, clipThreshold } = attrs;
    const numbers = [gradientScale, beta2, 1 - beta2, eps, lr, 1 - lr * weightDecay, clipThreshold];
    const tail = [...numbers, ...roundingArguments(attrs)];
    const head = [t.weight, t.master, t.gradient];
    const matrices = matricesOf(t.weight.shape);
    if (matrices)
      launch('adafactor_forward', [...head, t.exp_avg_sq_row, t.exp_avg_sq_col, ...matrices, ...tail]);
    else launch('adafactor_vector_forward', [...head, t.exp_avg_sq, t.weight.size, ...tail]);
  },
  reference: {
    forward(t, attrs) {
      const rsqrt = t.exp_avg_sq ? vectorFactors(t, attrs) : matrixFactors(t, attrs);
      const gradients = Float64Array.from(t.gradient.data, (g) => g * attrs.gradientScale);
      const squares = gradients.reduce((sum, g, i) => sum + (g * rsqrt(i)) ** 2, 0);
      const rms = Math.sqrt(squares / gradients.length);
      const size = attrs.lr / Math.max(1, rms / attrs.clipThreshold);
      const decay = 1 - attrs.lr * attrs.weightDecay;
      eachWeight(t, attrs, (w, g, i) => w * decay - size * g * rsqrt(i));
    },
  },
  samples: samples(),
});

/** Takes the squared gradients into exp_avg_sq; what element i's gradient is then multiplied by. */
function vectorFactors({ gradient, exp_avg_sq: { data: v } }: RefTensors, attrs: AdafactorAttrs) {
  const beta2 = beta2Of(attrs);
  for (let i = 0; i < v.length; i++)
    v[i] = beta2 * v[i] + (1 - beta2) * ((gradient.data[i] * attrs.gradientScale) ** 2 + attrs.eps);
  return (i: number) => 1 / Math.sqrt(v[i]);
}

/** The same with the factored moments. */
function matrixFactors(t: RefTensors, attrs: AdafactorAttrs): (i: number) => number {
  const beta2 = beta2Of(attrs);
  const [outer, rows, columns, inner] = matricesOf(t.weight.shape) as [number, number, number, number];
  const [row, col] = [t.exp_avg_sq_row.data, t.exp_avg_sq_col.data];
  const rowOf = (i: number) => Math.floor(i / (columns * inner)) * inner + (i % inner);
  const colOf = (i: number) =>
    (Math.floor(i / (rows * columns * inner)) * columns + (Math.floor(i / inner) % columns)) * inner +
    (i % inner);
  const [rowSums, colSums] = [new Float64Array(row.length), new Float64Array(col.length)];
  t.gradient.data.forEach((g: number, i: number) => {
    const square = (g * attrs.gradientScale) ** 2 + attrs.eps;
    rowSums[rowOf(i)] += square;
    colSums[colOf(i)] += square;
  });
  for (let i = 0; i < row.length; i++) row[i] = beta2 * row[i] + ((1 - beta2) * rowSums[i]) / columns;
  for (let i = 0; i < col.length; i++) col[i] = beta2 * col[i] + ((1 - beta2) * colSums[i]) / rows;
  const means = new Float64Array(outer * inner);
  for (let i = 0; i < row.length; i++)
    means[Math.floor(i / (rows * inner)) * inner + (i % inner)] += row[i] / rows;
  const meanOf = (i: number) => means[Math.floor(i / (rows * columns * inner)) * inner + (i % inner)];
  return (i) => 1 / Math.sqrt(row[rowOf(i)] / meanOf(i)) / Math.sqrt(col[colOf(i)]);
}

export function adafactorSample(weight: readonly number[], i: number): Sample<AdafactorAttrs> {
  const attrs = { lr: 0.01, weightDecay: 0.1, gradientScale: 0.5, eps: 1e-30, decayRate: -0.8 };
  const factors = factorShapes(weight);
  const states: Record<string, readonly number[]> = factors
    ? { exp_avg_sq_row: factors.row, exp_avg_sq_col: factors.col }
    : { exp_avg_sq: weight };
  const master: Record<string, readonly number[]> = i % 2 ? { master: weight } : {};
  return {
    inputs: { weight, gradient: weight, ...master, ...states },
    attrs: { ...attrs, clipThreshold: i % 3 ? 1 : 0.5, step: 1 + (i % 4) },
    dtypes: Object.fromEntries(['master', ...Object.keys(states)].map((name) => [name, 'float32'])),
    nonnegative: Object.keys(states),
  };
}

function samples(): Sample<AdafactorAttrs>[] {
  const shapes = [
    ...awkwardSizes.map(([a, b, c], i) => [[a], [a, b], [a % 8 || 1, 3, 3, c], [a, 1, 1, c]][i % 4]),
    [300, 200],
    [20_000],
    [5, 3, 40],
    [5, 3, 2, 40],
  ];
  return shapes.map(adafactorSample);
}

export interface AdafactorSlots {
  exp_avg_sq_row?: Tensor;
  exp_avg_sq_col?: Tensor;
  exp_avg_sq?: Tensor;
}

/** One step; a vector has exp_avg_sq, any other weight the two factors in the shapes of factorShapes. All are float32. */
export const adafactorStep = (tensors: StepInputs & AdafactorSlots, attrs: AdafactorAttrs): Update =>
  updateOf(adafactorOp, { ...tensors }, attrs);
