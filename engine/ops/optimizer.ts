// One step of an optimizer on one parameter, as ops that update their inputs in place: AdamW and Lion, the moving average
// of weights, and the sum of squares behind global-norm clipping and the question whether a tensor is finite. A weight may have a
// float32 `master` beside it; without one, bfloat16 can be rounded stochastically, so that updates below half a unit in the last
// place still count on average. AdamW's moments are float32, or bfloat16, which is always rounded so.
import type { FloatDType } from '../../io/dtype.ts';
import {
  defineOp,
  type RefTensor,
  type RefTensors,
  type Sample,
  sameFloat,
  type Tensors,
  type Update,
  update,
  updateOf,
} from '../op.ts';
import { philox, type Stream } from '../philox.ts';
import { scope } from '../scope.ts';
import { ShapeError, type Tensor, zeros } from '../tensor.ts';
import { awkwardShapes } from './samples.ts';
import { scale } from './unary.ts';

const shapes = [[1], [4099], [40, 333], ...awkwardShapes];

/** What every step takes. Learning rates and decay are of this step. */
export interface StepAttrs {
  lr: number;
  weightDecay: number;
  /** Multiplies the gradient first: clipping. */
  gradientScale: number;
  /** Where stochastic rounding takes its bits: for bfloat16 weights without a master, which else go to nearest even, and moments. */
  rounding?: Stream;
}

/** The weight, its gradient in the same type, and the float32 master that is the weight's true value where there is one. */
export interface StepInputs {
  weight: Tensor;
  gradient: Tensor;
  master?: Tensor;
}

/** The shape rule of a step, which has no outputs: every tensor but `others` is as large as the weight. */
export function checkStep(op: string, t: Tensors, others: readonly string[] = []): Record<string, never> {
  for (const name in t) {
    const { size, shape } = t[name];
    if (size !== t.weight.size && !others.includes(name))
      throw new ShapeError(`${op}: ${name} [${shape}] does not fit weight [${t.weight.shape}]`);
  }
  if (t.gradient && t.gradient.dtype !== t.weight.dtype)
    throw new ShapeError(`${op}: weight is ${t.weight.dtype}, its gradient ${t.gradient.dtype}`);
  return {};
}

/** The kernels' last arguments. */
export const roundingArguments = ({ rounding }: Pick<StepAttrs, 'rounding'>): number[] =>
  rounding ? [1, rounding.seedLow, rounding.seedHigh, rounding.stream] : [0, 0, 0, 0];

/** Replaces every weight by next(weight, index), with the rounding that the attributes ask for. */
export function setWeights(
  { weight, master }: RefTensors,
  { rounding }: Pick<StepAttrs, 'rounding'>,
  next: (weight: number, i: number) => number,
): void {
  const value = (master ?? weight).data;
  const rounded = master ? (x: number) => x : rounderOf(weight, rounding, 'weight');
  for (let i = 0; i < value.length; i++) {
    const x = next(value[i], i);
    if (master) master.data[i] = x;
    weight.data[i] = rounded(x, i);
  }
}

/** The same by next(weight, scaled gradient, index). */
export const eachWeight = (
  t: RefTensors,
  attrs: Pick<StepAttrs, 'gradientScale' | 'rounding'>,
  next: (weight: number, gradient: number, i: number) => number,
): void => setWeights(t, attrs, (w, i) => next(w, t.gradient.data[i] * attrs.gradientScale, i));

/** Which of an element's numbers random bits are for: each has a Philox block of its own, by the last word of its counter. */
const drawn = ['weight', 'first moment', 'second moment'] as const;

/** How element i of a tensor is rounded: bfloat16 at random, where there are bits for it. */
const rounderOf = (
  { dtype }: RefTensor,
  rounding: Stream | undefined,
  what: (typeof drawn)[number],
): ((x: number, i: number) => number) =>
  dtype === 'bfloat16' && rounding ? stochastic(rounding, drawn.indexOf(what)) : (x) => x;

/** float32 to one of its two bfloat16 neighbours: element i takes 16 bits of the stream, eight elements to a block. */
function stochastic({ seedLow, seedHigh, stream }: Stream, last: number): (x: number, i: number) => number {
  const words = new Uint32Array(4);
  const float = new Float32Array(1);
  const bits = new Uint32Array(float.buffer);
  let block = -1;
  return (x, i) => {
    if (i >>> 3 !== block) {
      block = i >>> 3;
      philox(words, block, 0, stream, last, seedLow, seedHigh);
    }
    float[0] = x;
    if (!Number.isFinite(x)) return x;
    bits[0] = (bits[0] + ((words[(i & 7) >> 1] >>> ((i & 1) * 16)) & 0xffff)) & 0xffff0000;
    return float[0];
  };
}

export interface AdamAttrs extends StepAttrs {
  betas: readonly [number, number];
  eps: number;
  /** 1 at the first step. */
  step: number;
}

/** Decoupled weight decay, 1 - beta1, beta2, 1 - beta2, the step's size and the factor of sqrt(v), with bias corrections. */
export function adamFactors({ lr, weightDecay, betas: [beta1, beta2], step }: AdamAttrs): number[] {
  return [
    1 - lr * weightDecay,
    1 - beta1,
    beta2,
    1 - beta2,
    lr / (1 - beta1 ** step),
    1 / Math.sqrt(1 - beta2 ** step),
  ];
}

/** Every other shape has a master, in float32; `states` are shaped like the weight. */
function stepSamples<A extends StepAttrs>(
  states: readonly string[],
  attrs: A,
  dtype: FloatDType = 'float32',
): Sample<A>[] {
  const sample = (shape: readonly number[], more: readonly string[]): Sample<A> => ({
    inputs: Object.fromEntries(['weight', 'gradient', ...more].map((name) => [name, shape])),
    attrs,
    dtypes: Object.fromEntries(more.map((name) => [name, name === 'master' ? 'float32' : dtype])),
    nonnegative: ['exp_avg_sq'],
  });
  return shapes.map((shape, i) => sample(shape, i % 2 ? ['master', ...states] : states));
}

export const adamSample: AdamAttrs = {
  lr: 0.01,
  weightDecay: 0.1,
  gradientScale: 0.5,
  betas: [0.9, 0.999],
  eps: 1e-8,
  step: 3,
};

const inBfloat16 = ({ exp_avg }: Tensors): boolean => exp_avg.dtype === 'bfloat16';

// In bfloat16 half the way to the next number is 0.2 to 0.4 % of a number. At a beta2 of 0.999 v moves by 0.1 % of itself at most,
// as long as squared gradients are below twice it: rounded to nearest it would never come down again, nor go up to their mean.
const adamwOp = defineOp<AdamAttrs>({
  name: 'adamw',
  outputs(t, { rounding }) {
    if (sameFloat('adamw', t, 'exp_avg', 'exp_avg_sq') === 'bfloat16' && !rounding)
      throw new ShapeError('adamw: moments in bfloat16 are rounded at random, and there are no bits for it');
    return checkStep('adamw', t);
  },
  saves: [],
  storage: 'weight',
  updates: ['weight', 'master', 'exp_avg', 'exp_avg_sq'],
  forward: (t, attrs, launch) =>
    launch(inBfloat16(t) ? 'adamw_bf16_moments_forward' : 'adamw_forward', [
      t.weight,
      t.master,
      t.gradient,
      t.exp_avg,
      t.exp_avg_sq,
      t.weight.size,
      attrs.gradientScale,
      ...adamFactors(attrs),
      attrs.eps,
      ...roundingArguments(attrs),
    ]),
  reference: {
    forward(t, attrs) {
      const [decay, rate1, beta2, rate2, size, correction] = adamFactors(attrs);
      const [m, v] = [t.exp_avg.data, t.exp_avg_sq.data];
      const first = rounderOf(t.exp_avg, attrs.rounding, 'first moment');
      const second = rounderOf(t.exp_avg_sq, attrs.rounding, 'second moment');
      eachWeight(t, attrs, (w, g, i) => {
        // The step is taken with the moments as they are before they are rounded.
        const mean = m[i] + rate1 * (g - m[i]);
        const square = v[i] * beta2 + rate2 * g * g;
        m[i] = first(mean, i);
        v[i] = second(square, i);
        return w * decay - (size * mean) / (Math.sqrt(square) * correction + attrs.eps);
      });
    },
  },
  samples: [
    ...stepSamples(['exp_avg', 'exp_avg_sq'], adamSample),
    ...stepSamples(
      ['exp_avg', 'exp_avg_sq'],
      { ...adamSample, rounding: { seedLow: 1, seedHigh: 2, stream: 3 } },
      'bfloat16',
    ),
  ],
});

/** One step of AdamW with torch's order of decay and bias corrections; exp_avg and exp_avg_sq are float32 or bfloat16. */
export const adamwStep = (
  tensors: StepInputs & { exp_avg: Tensor; exp_avg_sq: Tensor },
  attrs: AdamAttrs,
): Update => updateOf(adamwOp, { ...tensors }, attrs);

export interface LionAttrs extends StepAttrs {
  betas: readonly [number, number];
}

const lionOp = defineOp<LionAttrs>({
  name: 'lion',
  outputs: (t) => checkStep('lion', t),
  saves: [],
  storage: 'weight',
  updates: ['weight', 'master', 'exp_avg'],
  forward(t, attrs, launch) {
    const { lr, weightDecay, betas, gradientScale } = attrs;
    const factors = [gradientScale, 1 - lr * weightDecay, 1 - betas[0], 1 - betas[1], lr];
    const tensors = [t.weight, t.master, t.gradient, t.exp_avg];
    launch('lion_forward', [...tensors, t.weight.size, ...factors, ...roundingArguments(attrs)]);
  },
  reference: {
    forward(t, attrs) {
      const { lr, weightDecay, betas } = attrs;
      const m = t.exp_avg.data;
      eachWeight(t, attrs, (w, g, i) => {
        const sign = Math.sign(m[i] + (1 - betas[0]) * (g - m[i]));
        m[i] += (1 - betas[1]) * (g - m[i]);
        return w * (1 - lr * weightDecay) - lr * sign;
      });
    },
  },
  samples: stepSamples(['exp_avg'], { ...adamSample, betas: [0.9, 0.99] }),
});

/** One step of Lion: the sign of an interpolated momentum. exp_avg is float32. */
export const lionStep = (tensors: StepInputs & { exp_avg: Tensor }, attrs: LionAttrs): Update =>
  updateOf(lionOp, { ...tensors }, attrs);

const emaOp = defineOp<{ decay: number }>({
  name: 'ema',
  outputs({ ema, weight }) {
    if (ema.size !== weight.size)
      throw new ShapeError(`ema: ema [${ema.shape}] does not fit weight [${weight.shape}]`);
    return {};
  },
  saves: [],
  storage: 'weight',
  updates: ['ema'],
  forward: (t, { decay }, launch) => launch('ema_forward', [t.ema, t.weight, t.weight.size, 1 - decay]),
  reference: {
    forward({ ema, weight }, { decay }) {
      for (let i = 0; i < ema.data.length; i++) ema.data[i] -= (1 - decay) * (ema.data[i] - weight.data[i]);
    },
  },
  samples: shapes.map((shape) => ({
    inputs: { ema: shape, weight: shape },
    attrs: { decay: 0.9 },
    dtypes: { ema: 'float32' },
  })),
});

/** ema = decay ema + (1 - decay) weight; ema is float32. */
export const emaStep = (ema: Tensor, weight: Tensor, decay: number): Update =>
  updateOf(emaOp, { ema, weight }, { decay });

const sumSquaresOp = defineOp<{ index: number }>({
  name: 'sum_squares',
  outputs: () => ({}),
  saves: [],
  updates: ['sums'],
  forward: (t, { index }, launch) => launch('sum_squares_forward', [t.sums, t.x, t.x.size, index]),
  reference: {
    forward({ sums, x }, { index }) {
      let total = 0;
      for (const value of x.data) total += value * value;
      sums.data[index] = total;
    },
  },
  samples: shapes.map((x) => ({
    inputs: { sums: [3], x },
    attrs: { index: 1 },
    dtypes: { sums: 'float32' },
  })),
});

/** sums[index] = the sum of x's squares. Many tensors fill one `sums`, which is then downloaded once. */
export const sumSquares = (x: Tensor, sums: Tensor, index: number): Update =>
  updateOf(sumSquaresOp, { x, sums }, { index });

/** Whether all of x is finite, told exactly where a sum of squares may overflow: 0 times what is not finite is NaN. */
export const isWhollyFinite = (x: Tensor): boolean =>
  scope(() => {
    const sum = zeros([1], { device: x.device });
    update([sumSquares(scale(x, 0), sum, 0)]);
    return !Number.isNaN(sum.floats()[0]);
  });
