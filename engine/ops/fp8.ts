// Linear layers in 8-bit floats (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"): e4m3, four bits of exponent and
// three of mantissa, up to 448, with one float32 scale per tensor that brings its largest magnitude there. Operands are
// rounded, sums are not: Hopper multiplies the bytes themselves (it keeps about 14 bits of a sum's mantissa), other devices
// turn them back first. Forward alone: for sampling.
import type { FloatDType } from '../../io/dtype.ts';
import { apply, defineOp, type Numbers, type Sample } from '../op.ts';
import { ShapeError, type Tensor } from '../tensor.ts';
import { type Activation, activationCode, checkLinear, dims, linearReference } from './linear.ts';
import { rint } from './math.ts';
import { awkwardShapes, awkwardSizes } from './samples.ts';

const LARGEST = 448;

/** The value of an e4m3 byte; 0x7f and 0xff are NaN. */
export function fromE4m3(code: number): number {
  const [sign, exponent, mantissa] = [code & 0x80 ? -1 : 1, (code >> 3) & 15, code & 7];
  if (exponent === 15 && mantissa === 7) return Number.NaN;
  return sign * (exponent === 0 ? mantissa / 512 : (1 + mantissa / 8) * 2 ** (exponent - 7));
}

/** The nearest e4m3 byte, ties to even; what is larger than 448 becomes 448. */
export function toE4m3(x: number): number {
  if (Number.isNaN(x)) return 0x7f;
  const sign = x < 0 || Object.is(x, -0) ? 0x80 : 0;
  const a = Math.min(Math.abs(x), LARGEST);
  const exponent = Math.max(-6, Math.floor(Math.log2(Math.max(a, 2 ** -20))));
  const rounded = rint(a / 2 ** (exponent - 3));
  // `rounded` is 8 to 16 where normal: its carry walks into the exponent by itself.
  return sign | Math.min(0x7e, (exponent + 6) * 8 + rounded);
}

const scaleOp = defineOp<Record<string, never>>({
  name: 'fp8_scale',
  outputs: () => ({ y: { shape: [1], dtype: 'float32' } }),
  saves: [],
  forward: (t, _, launch) => launch('fp8_scale_forward', [t.y, t.x, t.x.size]),
  reference: {
    forward({ y, x }) {
      let most = 0;
      for (const value of x.data) most = Math.max(most, Math.abs(value));
      y.data[0] = most > 0 ? Math.fround(most) / LARGEST : 1;
    },
  },
  samples: [[1], [20_000], ...awkwardShapes].map((x) => ({ inputs: { x }, attrs: {} })),
});

/** float32 [1]: what x is divided by so that its largest magnitude becomes 448; 1 where x is all zeros. */
export const fp8Scale = (x: Tensor): Tensor => apply(scaleOp, { x }, {});

const toFp8Op = defineOp<Record<string, never>>({
  name: 'to_fp8',
  outputs({ x, scale }) {
    if (scale.size !== 1 || scale.dtype !== 'float32')
      throw new ShapeError(`to_fp8: the scale is ${scale.dtype} [${scale.shape}], not one float32`);
    return { y: { shape: x.shape, dtype: 'uint8' } };
  },
  saves: [],
  forward: (t, _, launch) => launch('to_fp8_forward', [t.y, t.x, t.scale, t.x.size]),
  reference: {
    forward({ y, x, scale }) {
      const inverse = Math.fround(1 / scale.data[0]);
      for (let i = 0; i < x.data.length; i++) y.data[i] = toE4m3(Math.fround(x.data[i] * inverse));
    },
  },
  samples: [[1], [5000], ...awkwardShapes].map((x) => ({
    inputs: { x, scale: [1] },
    attrs: {},
    dtypes: { scale: 'float32' },
    nonnegative: ['scale'],
  })),
});

/** x / scale as e4m3 bytes, in x's shape. */
export const toFp8 = (x: Tensor, scale: Tensor): Tensor => apply(toFp8Op, { x, scale }, {});

interface LinearFp8Attrs {
  activation: Activation;
  dtype: FloatDType;
}

const linearFp8Op = defineOp<LinearFp8Attrs>({
  name: 'linear_fp8',
  outputs(t, { activation, dtype }) {
    const shape = checkLinear('linear_fp8', t, activation);
    for (const name of ['bias', 'residual'] as const) {
      if (t[name] && t[name].dtype !== dtype)
        throw new ShapeError(`linear_fp8: ${name} is ${t[name].dtype}, y is to be ${dtype}`);
    }
    return { y: { shape, dtype } };
  },
  saves: [],
  storage: 'y',
  flops: ({ x, weight }) => 2 * x.size * weight.shape[0],
  forward(t, { activation }, launch) {
    const { m, n, k } = dims(t.x.shape, t.weight.shape, activation);
    const operands = [t.x, t.x_scale, t.weight, t.weight_scale, t.bias, t.residual];
    launch('linear_fp8_forward', [t.y, ...operands, m, n, k, activationCode[activation]]);
  },
  reference: {
    forward(t, { activation }) {
      const values = (bytes: Numbers, scale: Numbers) =>
        Float64Array.from(bytes, (code) => fromE4m3(code) * scale[0]);
      linearReference(
        {
          ...t,
          x: { ...t.x, data: values(t.x.data, t.x_scale.data) },
          weight: { ...t.weight, data: values(t.weight.data, t.weight_scale.data) },
        },
        activation,
      );
    },
  },
  samples: samples(),
});

function samples(): Sample<LinearFp8Attrs>[] {
  const activations = Object.keys(activationCode) as Activation[];
  const sizes = [...awkwardSizes, [34, 96, 290], [70, 144, 160], [130, 200, 272], [129, 320, 144]];
  return sizes.map(([m, n, k], i) => {
    const activation = activations[i % activations.length];
    const h = activation === 'geglu' ? 2 * n : n;
    const more: Record<string, readonly number[]> = i % 3 ? { bias: [h], residual: [m, n] } : {};
    return {
      inputs: { x: [m, k], x_scale: [1], weight: [h, k], weight_scale: [1], ...more },
      attrs: { activation, dtype: 'float32' },
      // Bytes of 0 to 0.94: large ones would leave float16 behind.
      ints: { x: 56, weight: 56 },
      dtypes: { x: 'uint8', weight: 'uint8', x_scale: 'float32', weight_scale: 'float32' },
      nonnegative: ['x_scale', 'weight_scale'],
    };
  });
}

/** A linear layer's weight [n, k] as e4m3 bytes and their scale. */
export interface Fp8Weight {
  readonly bytes: Tensor;
  readonly scale: Tensor;
}

export function fp8Weight(weight: Tensor): Fp8Weight {
  const scale = fp8Scale(weight);
  return { bytes: toFp8(weight, scale), scale };
}

/** As linear(), with both operands rounded to e4m3; x is scaled by its own largest magnitude. */
export function linearFp8(
  x: Tensor,
  weight: Fp8Weight,
  bias?: Tensor,
  { residual, activation = 'none' }: { residual?: Tensor; activation?: Activation } = {},
): Tensor {
  const x_scale = fp8Scale(x);
  const inputs = { x: toFp8(x, x_scale), x_scale, weight: weight.bytes, weight_scale: weight.scale };
  const attrs = { activation, dtype: x.dtype as FloatDType };
  return apply(linearFp8Op, { ...inputs, bias, residual }, attrs);
}
