// 8-bit floats on a device: numbers become the bytes that the format's definition gives them, and linear layers come to float64 sums of
// the rounded operands.
import type { Test } from 'tap';
import type { Device } from '../../engine/device.ts';
import { fp8Scale, fp8Weight, fromE4m3, linearFp8, toE4m3, toFp8 } from '../../engine/ops/fp8.ts';
import type { Activation } from '../../engine/ops/linear.ts';
import * as scalar from '../../engine/ops/math.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { relativeError, values } from './op_cases.ts';

/** All finite values, all midpoints between neighbours, numbers just beside them, and what is too large. */
const telling = (() => {
  const positive = Array.from({ length: 0x7f }, (_, code) => fromE4m3(code));
  const middles = positive.slice(1).map((x, i) => (x + positive[i]) / 2);
  const beside = middles.flatMap((x) => [x * (1 - 2 ** -7), x * (1 + 2 ** -7)]);
  const all = [...positive, ...middles, ...beside, 448, 500, 1e5];
  return Float32Array.from([...all, ...all.map((x) => -x)]);
})();

/** The device rounds to the nearest byte, ties to even. */
export function roundsToNearest(t: Test, device: Device): void {
  const expected = [...telling].map((x) => {
    const a = Math.min(448, Math.abs(x));
    const codes = Array.from({ length: 0x7f }, (_, code) => code);
    const distance = (code: number) => Math.abs(fromE4m3(code) - a);
    const best = codes.reduce((kept, code) =>
      distance(code) < distance(kept) || (distance(code) === distance(kept) && code % 2 === 0) ? code : kept,
    );
    return best | (x < 0 || Object.is(x, -0) ? 0x80 : 0);
  });
  scope(() => {
    const x = tensor(telling, [telling.length], { device });
    const got = [...toFp8(x, tensor([1], [1], { device })).floats()];
    const wrong = got.findIndex((code, i) => code !== expected[i]);
    t.equal(wrong, -1, `${device.name}: ${telling[wrong]} became ${got[wrong]}, not ${expected[wrong]}`);
    t.equal(fp8Scale(tensor([3, -896, 0.5], [3], { device })).floats()[0], 2, `${device.name}: the scale`);
    t.equal(fp8Scale(tensor([0, 0], [2], { device })).floats()[0], 1, `${device.name}: the scale of zeros`);
  });
}

export interface Layer {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly activation?: Activation;
  readonly extras?: boolean;
}

/** The layer on a device, and in float64: over the operands as they were, or as bytes have them. */
export function runLayer(
  device: Device,
  dtype: FloatDType,
  { m, n, k, activation = 'none', extras = true }: Layer,
) {
  const h = activation === 'geglu' ? 2 * n : n;
  return scope(() => {
    const make = (seed: number, shape: number[]) =>
      tensor(
        values(
          shape.reduce((a, b) => a * b, 1),
          seed,
        ),
        shape,
        { device, dtype },
      );
    const [x, weight, bias, residual] = [make(1, [m, k]), make(2, [h, k]), make(3, [h]), make(4, [m, n])];
    const more = extras ? { residual, activation } : { activation };
    const y = linearFp8(x, fp8Weight(weight), extras ? bias : undefined, more).floats();
    const floats = [x, weight, bias, residual].map((t) => Float64Array.from(t.floats()));
    return {
      y,
      rounded: inFloat64(floats.map(asBytes), m, n, k, activation, extras),
      exact: inFloat64(floats, m, n, k, activation, extras),
    };
  });
}

/** x and weight as their bytes have them; bias and residual as they are. */
function asBytes(x: Float64Array, at: number): Float64Array {
  if (at > 1) return x;
  const scale = Math.fround(x.reduce((most, value) => Math.max(most, Math.abs(value)), 0) / 448);
  const inverse = Math.fround(1 / scale);
  return x.map((value) => fromE4m3(toE4m3(Math.fround(value * inverse))) * scale);
}

function inFloat64(
  [x, weight, bias, residual]: Float64Array[],
  m: number,
  n: number,
  k: number,
  activation: Activation,
  extras: boolean,
): Float32Array {
  const sum = (i: number, j: number) => {
    let total = extras ? bias[j] : 0;
    for (let p = 0; p < k; p++) total += x[i * k + p] * weight[j * k + p];
    return total;
  };
  const act = (i: number, j: number) => {
    if (activation === 'geglu') return sum(i, j) * scalar.gelu.f(sum(i, j + n));
    return activation === 'silu' ? scalar.silu.f(sum(i, j)) : sum(i, j);
  };
  return Float32Array.from(
    { length: m * n },
    (_, at) => act(Math.floor(at / n), at % n) + (extras ? residual[at] : 0),
  );
}

/** Of a relative root mean square: what two operands of e4m3 (2^-4 at most, each) leave at the very most. */
const FP8_ERROR = 0.08;

/** Layers of several sizes and activations on the device, in each storage type. */
export function layersInFp8(t: Test, device: Device): void {
  const cases: Layer[] = [
    { m: 5, n: 24, k: 40, activation: 'silu' },
    { m: 66, n: 40, k: 80, activation: 'geglu' },
    { m: 70, n: 24, k: 20, extras: false },
  ];
  for (const dtype of ['float32', 'bfloat16', 'float16'] as const) {
    for (const shape of cases) {
      const { y, rounded, exact } = runLayer(device, dtype, shape);
      const [error, cost] = [relativeError(y, rounded), relativeError(y, exact)];
      const label = `${device.name} ${dtype} ${JSON.stringify(shape)}`;
      t.ok(error <= (dtype === 'float32' ? 1e-5 : 4e-3), `${label}: ${error}`);
      t.ok(cost <= FP8_ERROR, `${label}: ${cost} from the layer itself`);
    }
    t.equal(device.memory.storages, 0, `${device.name}: live tensors`);
  }
}
