// One step of AdamW whose moments take a byte each (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"), as
// bitsandbytes' AdamW8bit: blocks of 256 elements with a largest magnitude each, and a byte that names one of 256 values.
import { defineOp, type RefTensors, type Sample, type Update, updateOf } from '../op.ts';
import { sizeOf, type Tensor } from '../tensor.ts';
import {
  type AdamAttrs,
  adamFactors,
  adamSample,
  checkStep,
  eachWeight,
  roundingArguments,
  type StepInputs,
} from './optimizer.ts';
import { awkwardShapes } from './samples.ts';

const BLOCK = 256;
export const blocksOf = (size: number): number => Math.ceil(size / BLOCK);

/**
 * The values that bytes name, ascending: for each power of ten 10^(i - 6), i from 0 to 6, the centres of 2^i (unsigned:
 * 2^(i + 1)) equal parts of [0.1, 1], with both signs where signed; then 0 and 1. bitsandbytes' create_dynamic_map.
 */
export function dynamicMap(signed: boolean): Float32Array {
  const values = [0, 1];
  for (let i = 0; i < 7; i++) {
    const parts = 2 ** (signed ? i : i + 1);
    for (let k = 0; k < parts; k++) {
      const centre = (0.1 + (0.9 * (k + 0.5)) / parts) / 10 ** (6 - i);
      values.push(centre, ...(signed ? [-centre] : []));
    }
  }
  return Float32Array.from(values).sort();
}

const [signedMap, unsignedMap] = [dynamicMap(true), dynamicMap(false)];

function nearest(map: Float32Array, x: number): number {
  let [low, high] = [0, 255];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (Math.fround(0.5 * Math.fround(map[middle] + map[middle + 1])) < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** As nearest, but what is not zero keeps its sign. */
function nearestSigned(x: number): number {
  const code = nearest(signedMap, x);
  if (x > 0 && signedMap[code] <= 0) return code + 1;
  return x < 0 && signedMap[code] >= 0 ? code - 1 : code;
}

const adamw8bitOp = defineOp<AdamAttrs>({
  name: 'adamw_8bit',
  outputs: (t) => checkStep('adamw_8bit', t, ['absmax1', 'absmax2']),
  saves: [],
  storage: 'weight',
  updates: ['weight', 'master', 'state1', 'state2', 'absmax1', 'absmax2'],
  forward(t, attrs, launch) {
    const tensors = [t.weight, t.master, t.gradient, t.state1, t.state2, t.absmax1, t.absmax2];
    const numbers = [attrs.gradientScale, ...adamFactors(attrs), attrs.eps];
    launch('adamw_8bit_forward', [...tensors, t.weight.size, ...numbers, ...roundingArguments(attrs)]);
  },
  reference: { forward: referenceStep },
  samples: samples(),
});

function referenceStep(t: RefTensors, attrs: AdamAttrs): void {
  const [decay, rate1, beta2, rate2, size, correction] = adamFactors(attrs);
  const { state1, state2, absmax1, absmax2 } = t;
  const blockOf = (i: number) => Math.floor(i / BLOCK);
  const m = Float32Array.from(state1.data, (code, i) => signedMap[code] * absmax1.data[blockOf(i)]);
  const v = Float32Array.from(state2.data, (code, i) => unsignedMap[code] * absmax2.data[blockOf(i)]);
  eachWeight(t, attrs, (w, g, i) => {
    m[i] += rate1 * (g - m[i]);
    v[i] = v[i] * beta2 + rate2 * g * g;
    return w * decay - (size * m[i]) / (Math.sqrt(v[i]) * correction + attrs.eps);
  });
  absmax1.data.fill(0);
  absmax2.data.fill(0);
  for (let i = 0; i < m.length; i++) {
    const block = blockOf(i);
    absmax1.data[block] = Math.max(absmax1.data[block], Math.abs(m[i]));
    absmax2.data[block] = Math.max(absmax2.data[block], v[i]);
  }
  for (let i = 0; i < m.length; i++) {
    state1.data[i] = nearestSigned(m[i] / (absmax1.data[blockOf(i)] || 1));
    state2.data[i] = nearest(unsignedMap, v[i] / (absmax2.data[blockOf(i)] || 1));
  }
}

function samples(): Sample<AdamAttrs>[] {
  return [[1], [4099], ...awkwardShapes].map((shape, i) => {
    const blocks = [blocksOf(sizeOf(shape))];
    const master: Record<string, readonly number[]> = i % 2 ? { master: shape } : {};
    return {
      inputs: {
        weight: shape,
        gradient: shape,
        ...master,
        state1: shape,
        state2: shape,
        absmax1: blocks,
        absmax2: blocks,
      },
      attrs: adamSample,
      ints: { state1: 256, state2: 256 },
      dtypes: { master: 'float32', state1: 'uint8', state2: 'uint8', absmax1: 'float32', absmax2: 'float32' },
      nonnegative: ['absmax1', 'absmax2'],
    };
  });
}

/** One step; state1 and state2 are bytes in the weight's shape, absmax1 and absmax2 float32, one for each block. */
export const adamw8bitStep = (
  tensors: StepInputs & { state1: Tensor; state2: Tensor; absmax1: Tensor; absmax2: Tensor },
  attrs: AdamAttrs,
): Update => updateOf(adamw8bitOp, { ...tensors }, attrs);
