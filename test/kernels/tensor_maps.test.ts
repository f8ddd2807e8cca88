// Tensor maps, by which TMA reads and writes boxes: what a driver refuses is refused here too, and what a box brings.
import { type Test, test } from 'tap';
import type { GpuApi } from '../../engine/cuda/api.ts';
import { CudaError } from '../../engine/cuda/errors.ts';
import { anyHopper, standInApi } from '../../engine/cuda/stand_in.ts';
import { bf16Map } from '../virtual-gpu/hopper_runs.ts';
import { newBench } from '../virtual-gpu/run_kernel.ts';
import { boxBytes, encodeTiled, type TensorMap, walkBox } from '../virtual-gpu/tensor_map.ts';

test('tensor maps that a driver refuses are refused, by the GPU that only counts as well', (t) => {
  for (const gpu of [newBench({ capability: [9, 0] }).gpu, standInApi(anyHopper)]) refusesMaps(t, gpu);
  t.end();
});

function refusesMaps(t: Test, gpu: GpuApi): void {
  const good = { ...bf16Map([64, 8], [128], 0x7f4000001000n), boxDim: [64, 8] };
  const cases: [string, object][] = [
    ['address', { globalAddress: 0x7f4000001008n }],
    ['stride', { globalStrides: [130] }],
    ['box', { boxDim: [64, 257] }],
    ['swizzle span', { boxDim: [72, 8] }],
    ['rank', { boxDim: [64] }],
    ['dimension', { globalDim: [64, 2 ** 32 + 1] }],
  ];
  gpu.cuTensorMapEncodeTiled(good);
  for (const [name, change] of cases) {
    t.throws(() => gpu.cuTensorMapEncodeTiled({ ...good, ...change }), CudaError, name);
  }
  const pixels = {
    ...bf16Map([64, 300, 300, 2], [128, 38400, 11520000], 0x7f4000001000n),
    ...{ pixelBoxLowerCorner: [-128, -1], pixelBoxUpperCorner: [127, -1] },
    ...{ channelsPerPixel: 64, pixelsPerColumn: 64 },
  };
  const pixelCases: [string, object][] = [
    ['lower corner', { pixelBoxLowerCorner: [-129, -1] }],
    ['upper corner', { pixelBoxUpperCorner: [128, -1] }],
    ['empty box', { globalDim: [64, 300, 3, 2], pixelBoxUpperCorner: [0, -4] }],
    ['channels', { channelsPerPixel: 4 }],
    ['swizzle span', { channelsPerPixel: 72 }],
    ['pixels', { pixelsPerColumn: 1025 }],
  ];
  gpu.cuTensorMapEncodeIm2col(pixels);
  for (const [name, change] of pixelCases)
    t.throws(() => gpu.cuTensorMapEncodeIm2col({ ...pixels, ...change }), CudaError, name);
}

test('a box with strides brings every so many-th of its rows', (t) => {
  const rows: number[][] = [];
  const maps: TensorMap[] = [];
  // The innermost stride is not looked at, and of the six rows of a box every second one is a row in shared memory.
  const strided = { ...bf16Map([64, 8], [128], 0n), elementStrides: [8, 2], boxDim: [64, 6] };
  encodeTiled(maps, strided);
  walkBox(maps[0], [0, 3], [], (global, shared) => {
    if (shared % 128 === 0) rows.push([global, shared]);
  });
  t.same(rows, [
    [3 * 128, 0],
    [5 * 128, 128],
    [7 * 128, 256],
  ]);
  t.equal(boxBytes(maps[0]), 3 * 128);
  t.end();
});
