// The engine's Driver on an NVIDIA GPU, behind the calls of api.ts: one context and one stream, memory in stream order, and
// kernels by symbol (launcher.ts).
import type { Block, Driver } from '../driver.ts';
import { MemoryPool } from '../memory.ts';
import {
  type Context,
  DeviceAttribute,
  DISABLE_TIMING,
  type Event,
  type GpuApi,
  type MemPool,
  RELEASE_THRESHOLD,
  type Stream,
} from './api.ts';
import { CudaError, type CudaResult, isOutOfMemory } from './errors.ts';
import { openExchange } from './exchange.ts';
import { Recorder } from './graph.ts';
import { guarded } from './guard.ts';
import { Launcher } from './launcher.ts';
import { openStaging } from './staging.ts';

export interface CudaDriver extends Driver {
  readonly memory: MemoryPool;
  readonly name: string;
  /** Compute capability as major * 10 + minor. */
  readonly capability: number;
  readonly multiprocessors: number;
  readonly context: Context;
  readonly stream: Stream;
  /** Waits for everything queued. */
  synchronize(): void;
}

/** The driver whose context is current, of all of this process. */
let current: GpuApi | undefined;

/** Opens GPU `ordinal`. Throws CudaError where there is none, or an older one than Ampere. */
export function openCudaDriver(unguarded: GpuApi, ordinal = 0): CudaDriver {
  let launcher: Launcher | undefined;
  let context: Context | undefined;
  let queue: Queue | undefined;
  const enter = (): void => {
    if (context === undefined || current === api) return;
    unguarded.cuCtxSetCurrent(context);
    current = api;
  };
  const count = unguarded.cuDeviceGetCount();
  const label = count > 1 ? `cuda:${ordinal}` : undefined;
  const api: GpuApi = guarded(unguarded, {
    gpu: label,
    lastKernel: () => launcher?.last,
    enter,
    makeRoom: () => (queue as Queue).memory.makeRoom(),
  });
  if (ordinal >= count)
    throw new CudaError(
      'CUDA_ERROR_INVALID_DEVICE',
      'cuDeviceGet',
      `${count} GPU${count === 1 ? '' : 's'} visible`,
      `cuda:${ordinal}`,
    );
  const { capability, multiprocessors, sharedBytes } = checkedGpu(api, ordinal, label);
  context = api.cuDevicePrimaryCtxRetain(ordinal);
  try {
    queue = openQueue(api, ordinal, context, label);
    const gpu = { multiprocessors, sharedBytes, hopper: capability === 90 };
    launcher = new Launcher(api, gpu, queue);
    const { launch, launchAll } = launcher;
    const name = api.cuDeviceGetName(ordinal);
    return { ...queue, name, capability, multiprocessors, launch, launchAll };
  } catch (error) {
    api.cuDevicePrimaryCtxRelease(ordinal);
    throw error;
  }
}

/** What plans have to know of a GPU. @throws CudaError for one that the kernels are not for */
function checkedGpu(api: GpuApi, ordinal: number, label: string | undefined) {
  const attribute = (name: keyof typeof DeviceAttribute) =>
    api.cuDeviceGetAttribute(DeviceAttribute[name], ordinal);
  const refused = (result: CudaResult, why: string) =>
    new CudaError(result, 'cuDeviceGetAttribute', why, label);
  const capability = 10 * attribute('COMPUTE_CAPABILITY_MAJOR') + attribute('COMPUTE_CAPABILITY_MINOR');
  if (capability < 80) {
    const found = `${api.cuDeviceGetName(ordinal)} has compute capability ${capability / 10}`;
    throw refused('CUDA_ERROR_NO_BINARY_FOR_GPU', found);
  }
  if (!attribute('MEMORY_POOLS_SUPPORTED'))
    throw refused('CUDA_ERROR_NOT_SUPPORTED', 'the GPU has no memory pools');
  return {
    capability,
    multiprocessors: attribute('MULTIPROCESSOR_COUNT'),
    sharedBytes: attribute('MAX_SHARED_MEMORY_PER_BLOCK_OPTIN'),
  };
}

/** All of a driver but its kernels: a stream, the memory that goes with it, and copies and recordings in it. */
export type Queue = Pick<CudaDriver, 'context' | 'stream' | 'memory'> &
  Omit<Driver, 'launch' | 'launchAll'> & { synchronize(): void };

function openQueue(api: GpuApi, ordinal: number, context: Context, label: string | undefined): Queue {
  const pool = api.cuDeviceGetDefaultMemPool(ordinal);
  const stream = api.cuStreamCreate(1); // CU_STREAM_NON_BLOCKING
  const staging = openStaging(api, stream);
  const recorder = new Recorder(api, stream);
  let marked: Event | undefined;
  const queue: Omit<Queue, 'memory'> = {
    label,
    context,
    stream,
    ...allocations(api, pool, stream, recorder),
    upload(block, offset, source) {
      recorder.refuse('bytes were uploaded');
      staging.upload(block.address + BigInt(offset), source);
    },
    download(block, offset, target) {
      recorder.refuse('a tensor was read');
      staging.download(target, block.address + BigInt(offset));
    },
    exchange: openExchange({ api, ordinal, context, pool, stream }, () =>
      recorder.refuse('tensors were copied'),
    ),
    clear(block, bytes) {
      if (bytes > 0) api.cuMemsetD8Async(block.address, 0, bytes, stream);
    },
    capture: (launches) => recorder.record(launches),
    synchronize: () => api.cuStreamSynchronize(stream),
    mark() {
      const event = (marked ??= api.cuEventCreate(DISABLE_TIMING));
      api.cuEventRecord(event, stream);
      return () => api.cuEventSynchronize(event);
    },
  };
  return { ...queue, memory: new MemoryPool(queue) };
}

/** Memory in the order of the stream. What is freed stays in the driver's pool until trim(). */
function allocations(api: GpuApi, pool: MemPool, stream: Stream, recorder: Recorder) {
  // It would else go back to the system at each synchronization.
  api.cuMemPoolSetAttribute(pool, RELEASE_THRESHOLD, 2n ** 64n - 1n);
  return {
    allocate(bytes: number): Block | undefined {
      recorder.refuse('memory was allocated');
      try {
        return { bytes, address: api.cuMemAllocAsync(bytes, stream) };
      } catch (error) {
        if (isOutOfMemory(error)) return undefined;
        throw error;
      }
    },
    free: (block: Block) => api.cuMemFreeAsync(block.address, stream),
    trim() {
      // Frees are in stream order: only what the stream has passed can go.
      api.cuStreamSynchronize(stream);
      api.cuMemPoolTrimTo(pool, 0);
    },
    room: () => api.cuMemGetInfo(),
  };
}
