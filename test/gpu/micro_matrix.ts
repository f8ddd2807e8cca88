// Micro-kernels of the matrix instructions, and of what surrounds them on Hopper. Small integers have exact sums, so those
// agree to the bit. Of other numbers a tensor core drops bits below those of the largest term: the bound allows each of the
// terms 2^-23 of it.

import { sizeOf } from '../../engine/tensor.ts';
import { bfloat16, exactRounding, float16 } from '../virtual-gpu/exact.ts';
import {
  halves,
  hopper,
  im2colShape,
  runCopySignal,
  runIm2col,
  runWgemm,
  runWgmmaSmall,
  type WgemmShape,
} from '../virtual-gpu/hopper_runs.ts';
import { type MmaType, mmaPtx, runMma } from '../virtual-gpu/mma.ts';
import { fromBf16, toBf16 } from '../virtual-gpu/numbers.ts';
import { bytesOf, floatsFrom } from '../virtual-gpu/run_kernel.ts';
import { sameBits, within } from './agreement.ts';
import type { MicroKernel } from './micro.ts';

const small = (i: number) => (((i * 2654435761) >>> 7) % 7) - 3;
const integers = (count: number, seed: number) => Array.from({ length: count }, (_, i) => small(i + seed));

/** What a tensor core may drop from each sum of row i of a and row j of b, on top of `start`. */
function bounds(
  a: ArrayLike<number>,
  b: (j: number, q: number) => number,
  [m, n, k]: readonly number[],
  start: number,
) {
  return Array.from({ length: m * n }, (_, at) => {
    let largest = Math.abs(start);
    for (let q = 0; q < k; q++)
      largest = Math.max(largest, Math.abs(a[Math.floor(at / n) * k + q] * b(at % n, q)));
    return (k + 2) * largest * 2 ** -23;
  });
}

function mma(k: number, type: MmaType, exact: boolean): MicroKernel {
  const rounded = (x: number) =>
    type === 'tf32'
      ? Math.fround(Math.round(x * 1024) / 1024)
      : exactRounding(x, type === 'f16' ? float16 : bfloat16);
  const random = (count: number, seed: number) =>
    Array.from(floatsFrom(count, seed), (x) => rounded(x * 1.37));
  const make = exact ? integers : random;
  const [a, b] = [make(16 * k, 1), make(k * 8, 1000)];
  const call = { k, type, accumulator: 'f32', a, b } as const;
  return {
    group: 'matrix',
    name: `mma.m16n8k${k} ${type}, ${exact ? 'integers' : 'random'}`,
    ptx: mmaPtx(call),
    run: (bench) => bytesOf(Float32Array.from(runMma(bench, call))),
    agree: exact ? sameBits('f32') : within(bounds(a, (j, q) => b[q * 8 + j], [16, 8, k], 2)),
  };
}

const bits = (values: ArrayLike<number>) => Uint16Array.from(values, toBf16);
const numbers = (values: Uint16Array) => Float64Array.from(values, fromBf16);
/** Without the source lines, whose names of functions are not in the file: the virtual GPU reads them, ptxas would refuse. */
const assembled = hopper.replace(/^\s*\.(loc|file)\b.*$/gm, '');
const onHopper = { group: 'hopper', ptx: assembled, hopper: true } as const;

function wgemm(shape: WgemmShape, exact: boolean): MicroKernel {
  const { m = 128, n = 64, k = 320 } = shape;
  const make = (count: number, seed: number) => (exact ? bits(integers(count, seed)) : halves(count, seed));
  const [a, b] = [make(m * k, 1), make(n * k, 2)];
  const right = numbers(b);
  return {
    ...onHopper,
    name: `TMA and wgmma.m64n64k16, ${m} x ${n} x ${k}, ${exact ? 'integers' : 'random'}`,
    run: (bench) => bytesOf(runWgemm(bench, a, b, shape, assembled)),
    agree: exact ? sameBits('f32') : within(bounds(numbers(a), (j, q) => right[j * k + q], [m, n, k], 0)),
  };
}

function hopperKernels(): MicroKernel[] {
  const [a, b] = [bits(integers(64 * 16, 3)), bits(integers(8 * 16, 4))];
  return [
    wgemm({}, true),
    wgemm({}, false),
    wgemm({ m: 200, n: 136, k: 104 }, true),
    {
      ...onHopper,
      name: 'wgmma.m64n8k16 without swizzle',
      run: (bench) => bytesOf(runWgmmaSmall(bench, a, b, assembled)),
      agree: sameBits('f32'),
    },
    {
      ...onHopper,
      name: 'TMA im2col load, tiled store',
      run: (bench) => bytesOf(runIm2col(bench, halves(sizeOf(im2colShape), 5), assembled)),
      agree: sameBits('u16'),
    },
    {
      ...onHopper,
      name: 'cp.async that signals an mbarrier, bulk store',
      run: (bench) => bytesOf(runCopySignal(bench, floatsFrom(512, 6), assembled)),
      agree: sameBits('f32'),
    },
  ];
}

export const matrixKernels = (): MicroKernel[] => [
  ...(
    [
      [16, 'bf16'],
      [16, 'f16'],
      [8, 'bf16'],
      [8, 'f16'],
      [8, 'tf32'],
      [4, 'tf32'],
    ] as const
  ).flatMap(([k, type]) => [mma(k, type, true), mma(k, type, false)]),
  ...hopperKernels(),
];
