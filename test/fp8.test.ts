// 8-bit floats: bytes and numbers by the format's own definition, and linear layers over them on every device, against
// float64 sums of the rounded operands. On Hopper each tile under three schedules, as cuda_hopper.test.ts does.
import { join } from 'node:path';
import { test } from 'tap';
import { keyOf, overrides, type TileName, tilesOf } from '../engine/cuda/plan_sm90.ts';
import { cudaDevice, type Device, openDevice } from '../engine/device.ts';
import { fp8Scale, fp8Weight, fromE4m3, linearFp8, toE4m3, toFp8 } from '../engine/ops/fp8.ts';
import type { Activation } from '../engine/ops/linear.ts';
import * as scalar from '../engine/ops/math.ts';
import { scope } from '../engine/scope.ts';
import { tensor } from '../engine/tensor.ts';
import { decodeFloats, type FloatDType } from '../io/dtype.ts';
import { openSafetensors } from '../io/safetensors.ts';
import { feedForwardToFp8 } from '../models/fp8.ts';
import { sdxl } from './command_line.ts';
import { goldenArea, goldenFolder } from './golden.ts';
import { unetError } from './models_golden.ts';
import { relativeError, values } from './op_cases.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';
import { schedules } from './virtual-gpu/run_kernel.ts';

const hopperGpu = openVirtualGpu({ capability: [9, 0], multiprocessors: 1 });
const hopper = cudaDevice(hopperGpu);
const devices = [openDevice('reference'), openDevice('auto'), cudaDevice(openVirtualGpu()), hopper];

test('bytes of e4m3 are what the format says', (t) => {
  t.equal(fromE4m3(0x01), 2 ** -9, 'the smallest');
  t.equal(fromE4m3(0x08), 2 ** -6, 'the smallest normal');
  t.equal(fromE4m3(0x7e), 448, 'the largest');
  t.equal(fromE4m3(0xb8), -1);
  t.ok(Number.isNaN(fromE4m3(0x7f)));
  for (let code = 0; code < 256; code++) {
    if ((code & 0x7f) === 0x7f) continue;
    t.equal(toE4m3(fromE4m3(code)), code, `byte ${code}`);
  }
  t.end();
});

/** All finite values, all midpoints between neighbours, numbers just beside them, and what is too large. */
const telling = (() => {
  const positive = Array.from({ length: 0x7f }, (_, code) => fromE4m3(code));
  const middles = positive.slice(1).map((x, i) => (x + positive[i]) / 2);
  const beside = middles.flatMap((x) => [x * (1 - 2 ** -7), x * (1 + 2 ** -7)]);
  const all = [...positive, ...middles, ...beside, 448, 500, 1e5];
  return Float32Array.from([...all, ...all.map((x) => -x)]);
})();

test('every device rounds to the nearest byte, ties to even', (t) => {
  const expected = [...telling].map((x) => {
    const a = Math.min(448, Math.abs(x));
    const codes = Array.from({ length: 0x7f }, (_, code) => code);
    const distance = (code: number) => Math.abs(fromE4m3(code) - a);
    const best = codes.reduce((kept, code) =>
      distance(code) < distance(kept) || (distance(code) === distance(kept) && code % 2 === 0) ? code : kept,
    );
    return best | (x < 0 || Object.is(x, -0) ? 0x80 : 0);
  });
  for (const device of devices) {
    scope(() => {
      const x = tensor(telling, [telling.length], { device });
      const got = [...toFp8(x, tensor([1], [1], { device })).floats()];
      const wrong = got.findIndex((code, i) => code !== expected[i]);
      t.equal(wrong, -1, `${device.name}: ${telling[wrong]} became ${got[wrong]}, not ${expected[wrong]}`);
      t.equal(fp8Scale(tensor([3, -896, 0.5], [3], { device })).floats()[0], 2, `${device.name}: the scale`);
      t.equal(fp8Scale(tensor([0, 0], [2], { device })).floats()[0], 1, `${device.name}: the scale of zeros`);
    });
  }
  t.end();
});

interface Case {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly activation?: Activation;
  readonly extras?: boolean;
}

/** The layer on a device, and in float64: over the operands as they were, or as bytes have them. */
function run(device: Device, dtype: FloatDType, { m, n, k, activation = 'none', extras = true }: Case) {
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
      rounded: layer(floats.map(asBytes), m, n, k, activation, extras),
      exact: layer(floats, m, n, k, activation, extras),
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

function layer(
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

test('linear layers in 8-bit floats on every device', (t) => {
  const cases: Case[] = [
    { m: 5, n: 24, k: 40, activation: 'silu' },
    { m: 66, n: 40, k: 80, activation: 'geglu' },
    { m: 70, n: 24, k: 20, extras: false },
  ];
  for (const device of devices) {
    for (const dtype of ['float32', 'bfloat16', 'float16'] as const) {
      for (const shape of cases) {
        const { y, rounded, exact } = run(device, dtype, shape);
        const [error, cost] = [relativeError(y, rounded), relativeError(y, exact)];
        const label = `${device.name} ${dtype} ${JSON.stringify(shape)}`;
        t.ok(error <= (dtype === 'float32' ? 1e-5 : 4e-3), `${label}: ${error}`);
        t.ok(cost <= FP8_ERROR, `${label}: ${cost} from the layer itself`);
      }
      t.equal(device.memory.storages, 0, `${device.name}: live tensors`);
    }
  }
  t.end();
});

test('Hopper multiplies the bytes, in each tile and under every schedule', (t) => {
  const shapes: Case[] = [
    { m: 130, n: 200, k: 144 },
    { m: 129, n: 168, k: 400, activation: 'silu' },
    { m: 200, n: 136, k: 272, activation: 'geglu' },
    { m: 67, n: 24, k: 16, extras: false },
  ];
  for (const tile of ['256', '160_pingpong'] satisfies TileName[]) {
    schedules.forEach((schedule, s) => {
      hopperGpu.setSchedule(schedule);
      shapes.forEach((shape, i) => {
        const { m, n, k, activation } = shape;
        const kind = activation === 'geglu' ? 'e4m3_geglu' : 'e4m3';
        const splits = kind === 'e4m3' && i === 1 ? 2 : 1;
        overrides.clear();
        overrides.set(keyOf({ kind, m, n, steps: Math.ceil(k / 128), slabs: 1 }), { tile, splits });
        const { y, rounded } = run(hopper, i % 2 ? 'float16' : 'bfloat16', shape);
        const error = relativeError(y, rounded);
        t.ok(error <= 3.1e-3, `tile ${tile}, schedule ${s}, ${JSON.stringify(shape)}: ${error}`);
      });
    });
  }
  overrides.clear();
  hopperGpu.setSchedule(schedules[0]);
  const met = hopperGpu.coverage().filter(({ kernel }) => kernel.startsWith('fp8_sm90'));
  t.equal(
    new Set(met.map(({ kernel }) => kernel)).size,
    2 * (tilesOf.e4m3.length + tilesOf.e4m3_geglu.length),
  );
  t.end();
});

test('what 8-bit feed-forward layers cost the golden UNet, beside what bfloat16 does', (t) => {
  const area = goldenArea('unet');
  const cases = area.cases.filter((c) => c.expect.sample && !c.scale_parameters);
  t.ok(cases.length >= 3, `${cases.length} cases`);
  for (const c of cases) {
    const halves = unetError(area, c, 'bfloat16');
    const bytes = unetError(area, c, 'bfloat16', { loaded: feedForwardToFp8 });
    t.comment(`${c.id}: bfloat16 ${halves.toExponential(1)}, with fp8 ${bytes.toExponential(1)}`);
    t.ok(bytes > halves && bytes < 0.05, `${c.id}: ${bytes}, bfloat16 alone ${halves}`);
  }
  t.equal(openDevice('auto').memory.storages, 0, 'live tensors');
  t.end();
});

test('sdxl sample --fp8 draws another picture, a little', async (t) => {
  const folder = t.testdir();
  const latents: Float32Array[] = [];
  for (const more of [[], ['--fp8']]) {
    const path = join(folder, `${more.length}.safetensors`);
    const output = ['--save-latents', path, '--output', join(folder, 'out.png'), '--quiet'];
    const size = ['--width', '64', '--height', '64', '--steps', '2', '--seed', '1'];
    const model = ['--model', join(goldenFolder, 'tiny-sdxl'), '--prompt', 'a fox'];
    const { status, err } = await sdxl('sample', ...model, ...size, ...output, ...more);
    t.equal(status, 0, err);
    latents.push(decodeFloats(openSafetensors(path).read('latents'), 'float32'));
  }
  const distance = relativeError(latents[1], latents[0]);
  t.ok(distance > 1e-4 && distance < 0.1, `${distance}`);
});
