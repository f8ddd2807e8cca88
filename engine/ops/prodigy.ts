// One step of Prodigy (Mishchenko & Defazio 2023) as prodigyopt's: Adam whose learning rate is multiplied by d, an estimate of how far
// the weights' start is from a solution. d is one number for all parameters and hangs on all their gradients, so a step is three ops:
// each parameter's moments and its part of two sums, then d, then each weight. `s` is the gradients' running sum, `p0` the start.
import { defineOp, type RefTensors, type Sample, type Update, updateOf } from '../op.ts';
import { ShapeError, type Tensor } from '../tensor.ts';
import { checkStep, roundingArguments, type StepAttrs, type StepInputs, setWeights } from './optimizer.ts';
import { awkwardShapes, awkwardSizes } from './samples.ts';

const shapes = [[1], [4099], [40, 333], ...awkwardShapes];

/** Of a parameter and what is kept for it: tensors in the weight's type, float32 ones, and those of shapes of their own. */
function parameterSample<A>(
  attrs: A,
  shape: readonly number[],
  stored: readonly string[],
  floats: readonly string[],
  own: Record<string, readonly number[]>,
): Sample<A> {
  const alike = Object.fromEntries([...stored, ...floats].map((name) => [name, shape]));
  return {
    inputs: { ...alike, ...own },
    attrs,
    dtypes: Object.fromEntries([...floats, ...Object.keys(own)].map((name) => [name, 'float32'])),
    nonnegative: ['exp_avg_sq', 'd'],
  };
}

/** Every other parameter has a master. */
const withMaster = (i: number, ...states: string[]): string[] => (i % 2 ? ['master', ...states] : states);

export const momentsSample = (shape: readonly number[], i: number): Sample<ProdigyMomentsAttrs> =>
  parameterSample(
    { gradientScale: 0.5, betas: [0.9, 0.99, 0.995], rates: [0.2, 0.03, 0.4], index: 1 },
    shape,
    ['weight', 'gradient', 'p0'],
    withMaster(i, 'exp_avg', 'exp_avg_sq', 's'),
    { sums: [2, 3] },
  );

export interface ProdigyMomentsAttrs {
  gradientScale: number;
  /** The decay of exp_avg, of exp_avg_sq and of s. */
  betas: readonly [number, number, number];
  /** What the gradient is multiplied by as it comes into exp_avg, its square into exp_avg_sq, and it into s. */
  rates: readonly [number, number, number];
  /** The parameter's column in sums. */
  index: number;
}

const prodigyMomentsOp = defineOp<ProdigyMomentsAttrs>({
  name: 'prodigy_moments',
  outputs(t) {
    if (t.p0.dtype !== t.weight.dtype)
      throw new ShapeError(`prodigy_moments: weight is ${t.weight.dtype}, p0 ${t.p0.dtype}`);
    return checkStep('prodigy_moments', t, ['sums']);
  },
  saves: [],
  storage: 'weight',
  updates: ['exp_avg', 'exp_avg_sq', 's', 'sums'],
  forward(t, { gradientScale, betas, rates, index }, launch) {
    const tensors = [t.weight, t.master, t.gradient, t.p0, t.exp_avg, t.exp_avg_sq, t.s, t.sums];
    const places = [t.weight.size, index, index + t.sums.shape[1]];
    launch('prodigy_moments_forward', [...tensors, ...places, gradientScale, ...betas, ...rates]);
  },
  reference: { forward: takeGradient },
  samples: shapes.map(momentsSample),
});

function takeGradient(t: RefTensors, { gradientScale, betas, rates, index }: ProdigyMomentsAttrs): void {
  const [m, v, s] = [t.exp_avg.data, t.exp_avg_sq.data, t.s.data];
  const weight = (t.master ?? t.weight).data;
  let [numerator, denominator] = [0, 0];
  for (let i = 0; i < weight.length; i++) {
    const g = t.gradient.data[i] * gradientScale;
    numerator += g * (t.p0.data[i] - weight[i]);
    m[i] = betas[0] * m[i] + rates[0] * g;
    v[i] = betas[1] * v[i] + rates[1] * g * g;
    s[i] = betas[2] * s[i] + rates[2] * g;
    denominator += Math.abs(s[i]);
  }
  t.sums.data[index] = numerator;
  t.sums.data[index + t.sums.shape[1]] = denominator;
}

/** Takes a gradient into a parameter's moments, and its two sums into column `index` of `sums` [2, parameters]. All but p0 is float32. */
export const prodigyMoments = (
  tensors: StepInputs & { p0: Tensor; exp_avg: Tensor; exp_avg_sq: Tensor; s: Tensor; sums: Tensor },
  attrs: ProdigyMomentsAttrs,
): Update => updateOf(prodigyMomentsOp, { ...tensors }, attrs);

export interface ProdigyDAttrs {
  beta3: number;
  /** What the numerators are multiplied by. */
  rate: number;
  d_coef: number;
  /** The most that d grows by at a step; infinite for no bound. */
  growth_rate: number;
  /** Whether d is still what it began as. */
  fresh: boolean;
}

const prodigyDOp = defineOp<ProdigyDAttrs>({
  name: 'prodigy_d',
  outputs({ d, sums }) {
    if (d.size !== 4 || sums.shape[0] !== 2)
      throw new ShapeError(`prodigy_d: d [${d.shape}] and sums [${sums.shape}] are not [4] and [2, n]`);
    return {};
  },
  saves: [],
  storage: 'sums',
  updates: ['d'],
  forward: (t, { beta3, rate, d_coef, growth_rate, fresh }, launch) =>
    launch('prodigy_d_forward', [
      ...[t.d, t.sums, t.sums.shape[1], beta3, rate, d_coef, growth_rate, fresh ? 1 : 0],
    ]),
  reference: {
    forward({ d: { data }, sums }, { beta3, rate, d_coef, growth_rate, fresh }) {
      const n = sums.shape[1];
      let [product, denominator] = [0, 0];
      for (let i = 0; i < n; i++) {
        product += sums.data[i];
        denominator += sums.data[n + i];
      }
      if (!(denominator > 0)) return; // no gradient has been anything but zero
      const numerator = beta3 * data[2] + rate * product;
      const estimate = (d_coef * numerator) / denominator;
      const d = fresh ? Math.max(data[0], estimate) : data[0];
      const most = Math.max(data[1], estimate);
      data.set([Math.min(most, d * growth_rate), most, numerator, data[3] + 1]);
    },
  },
  samples: [...awkwardSizes.map(([n]) => n), 300, 1000].map((n, i) => ({
    inputs: { sums: [2, n], d: [4] },
    attrs: {
      ...{ beta3: 0.9, rate: i % 3 ? 0.7 : -0.7, d_coef: i % 2 ? 2 : 0.5, fresh: i % 3 === 1 },
      growth_rate: i % 3 ? Number.POSITIVE_INFINITY : 1.02,
    },
    dtypes: { sums: 'float32', d: 'float32' },
    nonnegative: ['sums', 'd'],
  })),
});

/** `d` [d, d_max, d_numerator, k] after a step whose parameters' sums are in the columns of `sums`; both are float32. */
export const prodigyD = (d: Tensor, sums: Tensor, attrs: ProdigyDAttrs): Update =>
  updateOf(prodigyDOp, { d, sums }, attrs);

export interface ProdigyAttrs extends Pick<StepAttrs, 'weightDecay' | 'rounding'> {
  /** The learning rate times d, as d was before the step, with the bias corrections where these are wanted. */
  dlr: number;
  eps: number;
}

const prodigyOp = defineOp<ProdigyAttrs>({
  name: 'prodigy',
  outputs: (t) => checkStep('prodigy', t, ['d']),
  saves: [],
  storage: 'weight',
  updates: ['weight', 'master'],
  forward(t, attrs, launch) {
    const { dlr, weightDecay, eps } = attrs;
    const tensors = [t.weight, t.master, t.exp_avg, t.exp_avg_sq, t.d];
    launch('prodigy_forward', [
      ...[...tensors, t.weight.size, dlr * weightDecay, dlr, eps],
      ...roundingArguments(attrs),
    ]);
  },
  reference: {
    forward(t, attrs) {
      const { dlr, weightDecay, eps } = attrs;
      const [m, v, [d, , , steps]] = [t.exp_avg.data, t.exp_avg_sq.data, t.d.data];
      const decay = steps > 0 ? dlr * weightDecay : 0;
      const step = (w: number, i: number) => w * (1 - decay) - (dlr * m[i]) / (Math.sqrt(v[i]) + d * eps);
      setWeights(t, attrs, step);
    },
  },
  // An eps that shows beside the root.
  samples: shapes.map((shape, i) => {
    const attrs = { dlr: 0.01, weightDecay: 0.1, eps: 0.3 };
    return parameterSample(attrs, shape, ['weight'], withMaster(i, 'exp_avg', 'exp_avg_sq'), { d: [4] });
  }),
});

/** Moves a weight by its moments; `d` is as prodigyD has left it. Where no gradient has been anything but zero, the weight stays. */
export const prodigyStep = (
  tensors: Omit<StepInputs, 'gradient'> & { exp_avg: Tensor; exp_avg_sq: Tensor; d: Tensor },
  attrs: ProdigyAttrs,
): Update => updateOf(prodigyOp, { ...tensors }, attrs);
