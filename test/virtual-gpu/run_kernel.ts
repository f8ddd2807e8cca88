// How the tests run one kernel: arrays go to the virtual GPU, the kernel is launched, arrays come back. A fault throws.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { brotliDecompressSync } from 'node:zlib';
import type { Dim3, GpuApi, LaunchAttributes } from '../../engine/cuda/api.ts';
import { type KernelArgument, packParameters, readManifest } from '../../engine/cuda/manifest.ts';
import { packageRoot } from '../support/golden.ts';
import { openVirtualGpu, type VirtualGpu, type VirtualGpuOptions } from './gpu.ts';
import type { Schedule } from './machine.ts';

type Values =
  | Float32Array
  | Int32Array
  | Uint32Array
  | Uint16Array
  | Uint8Array
  | BigInt64Array
  | Float64Array;

export const bytesOf = (values: Values): Uint8Array =>
  new Uint8Array(values.buffer, values.byteOffset, values.byteLength);

/** The text of test/virtual-gpu/kernels/<name>.ptx.br. */
export const testPtx = (name: string): string =>
  brotliDecompressSync(
    readFileSync(join(packageRoot, 'test', 'virtual-gpu', 'kernels', `${name}.ptx.br`)),
  ).toString();

export interface Bench<Gpu extends GpuApi = VirtualGpu> {
  readonly gpu: Gpu;
  /** Uploads values. */
  give(values: Values): bigint;
  /** Allocates without writing. */
  room(bytes: number): bigint;
  bytes(address: bigint, count: number): Uint8Array;
  floats(address: bigint, count: number): Float32Array;
  ints(address: bigint, count: number): Int32Array;
  launch(
    ptx: string,
    kernel: string,
    grid: number | Dim3,
    block: number,
    args: readonly KernelArgument[],
    sharedBytes?: number,
    attributes?: LaunchAttributes,
  ): void;
}

export const newBench = (options: VirtualGpuOptions = {}): Bench =>
  benchOn(openVirtualGpu({ arenaBytes: 2 ** 24, ...options }));

/** A bench on any GPU whose context is current. */
export function benchOn<Gpu extends GpuApi>(gpu: Gpu): Bench<Gpu> {
  const room = (bytes: number) => gpu.cuMemAllocAsync(bytes, 0n);
  const take = <T extends Values>(into: T, address: bigint): T => {
    gpu.cuMemcpyDtoHAsync(bytesOf(into), address, 0n);
    gpu.cuStreamSynchronize(0n);
    return into;
  };
  return {
    gpu,
    room,
    give(values) {
      const address = room(values.byteLength);
      gpu.cuMemcpyHtoDAsync(address, bytesOf(values), 0n);
      return address;
    },
    bytes: (address, count) => take(new Uint8Array(count), address),
    floats: (address, count) => take(new Float32Array(count), address),
    ints: (address, count) => take(new Int32Array(count), address),
    launch(ptx, kernel, grid, block, args, sharedBytes = 0, attributes) {
      const entry = readManifest(ptx).get(kernel);
      if (!entry) throw new Error(`no kernel ${kernel} in this PTX`);
      const handle = gpu.cuModuleGetFunction(gpu.cuModuleLoadData(ptx), kernel);
      if (sharedBytes > 48 * 1024) gpu.cuFuncSetAttribute(handle, 8, sharedBytes);
      const blocks: Dim3 = typeof grid === 'number' ? [grid, 1, 1] : grid;
      const parameters = packParameters(entry, args);
      const offsets = entry.parameters.map(({ offset }) => offset);
      gpu.cuLaunchKernel(handle, blocks, [block, 1, 1], sharedBytes, 0n, parameters, offsets, attributes);
    },
  };
}

/** The schedules under which the tests run every kernel. */
export const schedules: readonly Schedule[] = [
  { async: 'late', order: 'forward', seed: 1 },
  { async: 'early', order: 'reverse', seed: 1 },
  { async: 'random', order: 'random', seed: 7 },
];

/** Repeatable numbers from -1 to 1 with few bits, so that sums in any order are close. */
function numbersFrom(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1103515245) + 12345) | 0;
    return ((state >>> 9) & 1023) / 512 - 1;
  };
}

export const floatsFrom = (count: number, seed: number): Float32Array => {
  const next = numbersFrom(seed);
  return Float32Array.from({ length: count }, next);
};
