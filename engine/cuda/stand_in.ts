// A GPU driver without a GPU: it counts memory, refuses what no GPU of this kind launches, and forgets all else, so that all that is read
// of it is zeros. The cuda device on it makes every plan, takes every workspace and packs every launch, so that a run tells what it would
// take there.
import { DeviceAttribute, type GpuApi } from './api.ts';
import { CudaError } from './errors.ts';
import { checkIm2col, checkTiled } from './tensor_map.ts';

export interface StandInGpu {
  /** Device memory. */
  readonly bytes: number;
  readonly capability: readonly [major: number, minor: number];
  readonly multiprocessors: number;
}

/** An H100 or H200 has 132 multiprocessors, and more memory than any plan asks for. */
export const anyHopper: StandInGpu = { bytes: 2 ** 50, capability: [9, 0], multiprocessors: 132 };

/** KiB of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide); others have 99. */
const sharedKiB: Record<string, number> = {
  '8.0': 163,
  '8.7': 163,
  '9.0': 227,
  '10.0': 227,
  '10.3': 227,
  '11.0': 227,
};
export const mostShared = ([major, minor]: StandInGpu['capability']): number =>
  1024 * (sharedKiB[`${major}.${minor}`] ?? 99);

const nothing = (): void => {};

export function standInApi(gpu: StandInGpu): GpuApi {
  let handles = 0n;
  const handle = (): bigint => ++handles;
  return {
    ...deviceCalls(gpu, handle),
    ...memoryCalls(gpu, handle),
    ...kernelCalls(gpu, handle),
    cuStreamCreate: handle,
    cuStreamDestroy: nothing,
    cuStreamSynchronize: nothing,
    cuStreamWaitEvent: nothing,
    cuEventCreate: handle,
    cuEventDestroy: nothing,
    cuEventRecord: nothing,
    cuEventSynchronize: nothing,
    cuEventElapsedTime: () => 0,
    cuStreamBeginCapture: nothing,
    cuStreamEndCapture: handle,
    cuGraphInstantiate: handle,
    cuGraphLaunch: nothing,
    cuGraphExecDestroy: nothing,
    cuGraphDestroy: nothing,
  };
}

function deviceCalls({ bytes, capability, multiprocessors }: StandInGpu, handle: () => bigint) {
  const attributes: Record<number, number> = {
    [DeviceAttribute.MULTIPROCESSOR_COUNT]: multiprocessors,
    [DeviceAttribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN]: mostShared(capability),
    [DeviceAttribute.COMPUTE_CAPABILITY_MAJOR]: capability[0],
    [DeviceAttribute.COMPUTE_CAPABILITY_MINOR]: capability[1],
    [DeviceAttribute.MEMORY_POOLS_SUPPORTED]: 1,
  };
  return {
    cuDriverGetVersion: () => 13000,
    cuDeviceGetCount: () => 1,
    cuDeviceGetName: () => 'a stand-in',
    cuDeviceTotalMem: () => bytes,
    cuDeviceGetAttribute: (attribute) => attributes[attribute] ?? 0,
    cuDeviceCanAccessPeer: () => true,
    cuDevicePrimaryCtxRetain: handle,
    cuDevicePrimaryCtxRelease: nothing,
    cuCtxSetCurrent: nothing,
    cuCtxSynchronize: nothing,
  } satisfies Partial<GpuApi>;
}

/** Memory that is counted, and copies that are not made. */
function memoryCalls({ bytes }: StandInGpu, handle: () => bigint) {
  const sizes = new Map<bigint, number>();
  let used = 0;
  // Plans ask where a tensor begins: on a multiple of 256, as on a GPU.
  let next = 1n << 30n;
  return {
    cuMemGetInfo: () => ({ free: bytes - used, total: bytes }),
    cuDeviceGetDefaultMemPool: handle,
    cuMemPoolSetAttribute: nothing,
    cuMemPoolSetAccess: nothing,
    cuMemPoolTrimTo: nothing,
    cuMemAllocAsync(size) {
      if (used + size > bytes) throw new CudaError('CUDA_ERROR_OUT_OF_MEMORY', 'cuMemAllocAsync');
      const address = next;
      next += BigInt(Math.ceil(size / 256) * 256);
      sizes.set(address, size);
      used += size;
      return address;
    },
    cuMemFreeAsync(pointer) {
      used -= sizes.get(pointer) ?? 0;
      sizes.delete(pointer);
    },
    // Without memory to pin, copies are not even staged.
    cuMemAllocHost() {
      throw new CudaError('CUDA_ERROR_OUT_OF_MEMORY', 'cuMemAllocHost');
    },
    cuMemFreeHost: nothing,
    cuMemcpyHtoDAsync: nothing,
    cuMemcpyDtoHAsync: (target) => void target.fill(0),
    cuMemcpyDtoDAsync: nothing,
    cuMemcpyPeerAsync: nothing,
    cuMemsetD8Async: nothing,
  } satisfies Partial<GpuApi>;
}

/** Launches and tensor maps, which are looked at alone. */
function kernelCalls({ capability }: StandInGpu, handle: () => bigint) {
  return {
    cuModuleLoadData: handle,
    cuModuleUnload: nothing,
    cuModuleGetFunction: handle,
    cuFuncGetAttribute: () => 0,
    cuFuncSetAttribute: nothing,
    cuLaunchKernel(
      _kernel,
      [x, y, z],
      [threads],
      shared,
      _stream,
      _parameters,
      _offsets,
      { cluster = 1 } = {},
    ) {
      const fits = x < 2 ** 31 && y < 65536 && z < 65536 && x % cluster === 0;
      if (fits && threads <= 1024 && shared <= mostShared(capability)) return;
      const together = cluster > 1 ? ` in clusters of ${cluster}` : '';
      const what = `a grid [${x},${y},${z}] of ${threads} threads with ${shared} bytes of shared memory${together}`;
      throw new CudaError('CUDA_ERROR_INVALID_VALUE', 'cuLaunchKernel', what);
    },
    cuTensorMapEncodeTiled(map) {
      checkTiled(map);
      return new Uint8Array(128);
    },
    cuTensorMapEncodeIm2col(map) {
      checkIm2col(map);
      return new Uint8Array(128);
    },
  } satisfies Partial<GpuApi>;
}
