// Micro-kernels of mma.sync. Small integers have exact sums, so those agree to the bit. Of other numbers a tensor core drops
// bits below those of the largest term: the bound allows each of the terms 2^-23 of it.
import { bfloat16, exactRounding, float16 } from '../virtual-gpu/exact.ts';
import { type MmaType, mmaPtx, runMma } from '../virtual-gpu/mma.ts';
import { bytesOf, floatsFrom } from '../virtual-gpu/run_kernel.ts';
import { sameBits, within } from './agreement.ts';
import type { MicroKernel } from './micro.ts';

const small = (i: number) => (((i * 2654435761) >>> 7) % 7) - 3;
export const integers = (count: number, seed: number) =>
  Array.from({ length: count }, (_, i) => small(i + seed));

/** What a tensor core may drop from each sum of row i of a and row j of b, on top of `start`. */
export function bounds(
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
];
