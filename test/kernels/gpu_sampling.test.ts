// What only sampling does, on virtual GPUs: linear layers in 8-bit floats, on Hopper in each tile under three schedules, and convolutions of
// a doubled image without the doubled image. Steps of whole models are cuda_models.test.ts's and cuda_recorded.test.ts's matter.
import { test } from 'tap';
import { keyOf, overrides, type TileName, tilesOf } from '../../engine/cuda/plan_sm90.ts';
import { cudaDevice } from '../../engine/device.ts';
import { bounds, reference, upsampled } from '../support/doubled_upsampler.ts';
import { type Layer, layersInFp8, roundsToNearest, runLayer } from '../support/fp8_layers.ts';
import { relativeError } from '../support/op_cases.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';
import { schedules } from '../virtual-gpu/run_kernel.ts';

const hopperGpu = openVirtualGpu({ capability: [9, 0], multiprocessors: 1 });
const hopper = cudaDevice(hopperGpu);

for (const [name, device] of Object.entries({ 'a GPU': cudaDevice(openVirtualGpu()), Hopper: hopper })) {
  test(`numbers become the nearest bytes, ties even ones, on ${name}`, (t) => {
    roundsToNearest(t, device);
    t.end();
  });

  test(`linear layers in 8-bit floats on ${name}`, (t) => {
    layersInFp8(t, device);
    t.end();
  });
}

test('Hopper multiplies bytes, in each tile and under every schedule', (t) => {
  const shapes: Layer[] = [
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
        const { y, rounded } = runLayer(hopper, i % 2 ? 'float16' : 'bfloat16', shape);
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

test('on Hopper the four convolutions of a doubled image go by TMA', (t) => {
  const gpu = openVirtualGpu({ capability: [9, 0] });
  for (const shape of [
    [2, 9, 11, 64],
    [1, 16, 16, 72],
  ]) {
    const [want] = upsampled(reference, 'bfloat16', shape, { cached: false, adapted: false });
    const [got] = upsampled(cudaDevice(gpu), 'bfloat16', shape, { cached: true, adapted: false });
    const nmse = relativeError(got, want) ** 2;
    t.ok(nmse <= bounds.bfloat16, `[${shape}]: ${nmse.toExponential(2)}`);
  }
  const ran = gpu.coverage().filter(({ entered }) => entered.size > 0);
  const kernels = new Set(ran.map(({ kernel }) => kernel).filter((kernel) => kernel.startsWith('conv2d')));
  t.ok(
    kernels.size > 0 && [...kernels].every((kernel) => kernel.startsWith('conv2d_sm90_forward')),
    [...kernels].join(),
  );
  t.end();
});
