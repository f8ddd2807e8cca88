// The bytes that 8-bit AdamW gives its moments: those of the nearest values, decided at the midpoints between neighbours by one
// comparison each, for every exponent, on both sides of every midpoint, and for what is no number. And the weights that go with
// them, to the bit, where roots and quotients leave the range in which the GPU takes them its short way, too.
import { test } from 'tap';
import { cudaDevice, type Device, openDevice } from '../../engine/device.ts';
import { update } from '../../engine/op.ts';
import { adamw8bitStep, dynamicMap } from '../../engine/ops/adamw_8bit.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { allClose } from '../support/golden.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

const BLOCK = 256;
const maps = { signed: dynamicMap(true), unsigned: dynamicMap(false) };
const midpoints = (map: Float32Array) =>
  Array.from({ length: 255 }, (_, k) => Math.fround(0.5 * Math.fround(map[k] + map[k + 1])));
const middles = { signed: midpoints(maps.signed), unsigned: midpoints(maps.unsigned) };

const below = (middle: readonly number[], x: number): number => middle.filter((at) => at < x).length;

function signedCode(x: number): number {
  const code = below(middles.signed, x);
  if (x > 0) return Math.max(code, 128);
  return x < 0 ? Math.min(code, 126) : code;
}

const word = new Uint32Array(1);
const float = new Float32Array(word.buffer);
function ofBits(bits: number): number {
  word[0] = bits;
  return float[0];
}
/** x and the floats next to it, `far` of them to either side. */
function around(x: number, far: number): number[] {
  float[0] = x;
  const bits = word[0];
  return Array.from({ length: 2 * far + 1 }, (_, i) => ofBits(bits + i - far));
}

/** Gradients whose moments, of betas 0, are themselves and their squares, in blocks that each have a 1. */
function gradients(): Float32Array {
  const upperHalves = Array.from({ length: 0x3f80 }, (_, i) => ofBits(i << 16));
  const wanted = [
    ...[...upperHalves, ...around(0, 0), 2 ** -149, 2 ** -126, 0.988, 0.9875].flatMap((x) => [x, -x]),
    ...middles.signed.flatMap((x) => around(x, 2)),
    ...middles.unsigned.flatMap((x) => around(Math.sqrt(x), 3)),
  ];
  const blocks = Math.ceil(wanted.length / (BLOCK - 1));
  return Float32Array.from({ length: blocks * BLOCK }, (_, i) =>
    i % BLOCK ? (wanted[i - Math.floor(i / BLOCK) - 1] ?? 0) : 1,
  );
}

const EPS = 1e-8;

/** Where a step of size 1 takes a weight of 0, every operation rounded to float32. */
function moved(gradient: number): number {
  const [root, eps] = [Math.fround(Math.sqrt(Math.fround(gradient * gradient))), Math.fround(EPS)];
  return -Math.fround(gradient / Math.fround(root + eps));
}

/** One step from moments of 0. */
function codesOf(device: Device, gradient: Float32Array) {
  return scope(() => {
    const shape = [gradient.length];
    const zeros = (length: number, dtype: 'float32' | 'uint8', value = 0) =>
      tensor(new Float32Array(length).fill(value), [length], { device, dtype });
    const blocks = Math.ceil(gradient.length / BLOCK);
    const tensors = {
      weight: zeros(gradient.length, 'float32'),
      gradient: tensor(gradient, shape, { device }),
      state1: zeros(gradient.length, 'uint8', 127),
      state2: zeros(gradient.length, 'uint8'),
      absmax1: zeros(blocks, 'float32'),
      absmax2: zeros(blocks, 'float32'),
    };
    const attrs = { lr: 1, weightDecay: 0, gradientScale: 1, betas: [0, 0], eps: EPS, step: 1 } as const;
    update([adamw8bitStep(tensors, attrs)]);
    const { weight, state1, state2 } = tensors;
    return { weights: weight.floats(), first: state1.floats(), second: state2.floats() };
  });
}

const devices = {
  reference: openDevice('reference'),
  auto: openDevice('auto'),
  'virtual GPU': cudaDevice(openVirtualGpu()),
};

for (const [name, device] of Object.entries(devices)) {
  test(`codes of moments are those of the nearest values, and weights move by their quotients, ${name}`, (t) => {
    const gradient = gradients();
    const { weights, first, second } = codesOf(device, gradient);
    const wrong = Array.from(gradient).flatMap((x, i) => {
      const [m, v] = [signedCode(x), below(middles.unsigned, Math.fround(x * x))];
      return first[i] === m && second[i] === v ? [] : [`${x}: ${first[i]} for ${m}, ${second[i]} for ${v}`];
    });
    t.same(wrong.slice(0, 5), [], `${wrong.length} of ${gradient.length}`);
    // The reference divides in float64.
    const off = name === 'reference' ? [] : Array.from(gradient).filter((x, i) => weights[i] !== moved(x));
    t.same(off.slice(0, 5), [], `weights after ${off.length} of ${gradient.length}`);
    t.end();
  });

  test(`what is no number stays none in the weight, and spoils no other, ${name}`, (t) => {
    const gradient = Float32Array.from({ length: BLOCK }, (_, i) => (i === 7 ? Number.NaN : i ? i / 256 : 1));
    const { weights, first, second } = codesOf(device, gradient);
    t.same([weights[7], first[7], second[7]], [Number.NaN, 0, 0]);
    const whole = codesOf(
      device,
      gradient.map((x) => x || 0),
    );
    whole.weights[7] = Number.NaN;
    whole.first[7] = whole.second[7] = 0;
    t.same({ weights, first, second }, whole);
    t.end();
  });
}

test('the values that bytes stand for are those of bitsandbytes', (t) => {
  const at = [0, 1, 64, 126, 127, 128, 129, 190, 254, 255];
  // From create_dynamic_map's formula in torch.
  const signed = [-0.9929687, -0.9789063, -0.09859375, -5.5e-7, 0, 5.5e-7, 3.25e-6, 0.09859375, 0.9929687, 1];
  const unsigned = [
    0, 3.25e-7, 0.012109376, 0.09929688, 0.10351563, 0.11054687, 0.11757813, 0.54648435, 0.99648438, 1,
  ];
  allClose(
    t,
    'signed',
    at.map((i) => maps.signed[i]),
    signed,
    { atol: 0, rtol: 1e-6 },
  );
  allClose(
    t,
    'unsigned',
    at.map((i) => maps.unsigned[i]),
    unsigned,
    { atol: 0, rtol: 1e-6 },
  );
  t.end();
});
