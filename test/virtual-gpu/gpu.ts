// The virtual GPU behind the driver API: what a CUDA program sees of it. Work runs when it is queued, so a fault is thrown
// as a GpuReport by the launch that commits it; what a real driver refuses is refused here with the same CudaError.
import { DeviceAttribute, FunctionAttribute, type GpuApi } from '../../engine/cuda/api.ts';
import { CudaError } from '../../engine/cuda/errors.ts';
import { mostShared } from '../../engine/cuda/stand_in.ts';
import { PROGRAMMATIC_LAUNCH } from '../../engine/cuda/versions.ts';
import { mostWarps } from './agents.ts';
import { type Copies, openCopies } from './copies.ts';
import { type Coverage, coverageOf } from './coverage.ts';
import { openHostMemory } from './host_memory.ts';
import { loadModule } from './load.ts';
import { type LoadedKernel, newMachine, type Schedule } from './machine.ts';
import { parsePtx } from './parser.ts';
import type { PtxModule } from './ptx.ts';
import { GpuReport } from './report.ts';
import { runGrid } from './schedule.ts';
import { encodeIm2col, encodeTiled } from './tensor_map.ts';

export interface VirtualGpuOptions {
  readonly schedule?: Partial<Schedule>;
  /** Look for races; true unless told otherwise. */
  readonly races?: boolean;
  /** What the device says it has. */
  readonly memoryBytes?: number;
  /** Plans cut their work by it; 4 unless told otherwise. */
  readonly multiprocessors?: number;
  /** The most that a block may have of shared memory; what the capability has unless told otherwise. */
  readonly sharedBytes?: number;
  /** Room for all that is ever allocated: addresses are reused only when it is full. */
  readonly arenaBytes?: number;
  /** Which of several GPUs it is: none has an address or a handle of another. */
  readonly place?: number;
  readonly capability?: readonly [major: number, minor: number];
  /** As cuDriverGetVersion: 1000 major + 10 minor. */
  readonly driverVersion?: number;
}

export interface VirtualGpu extends GpuApi, Pick<Copies, 'read' | 'write'> {
  setSchedule(schedule: Partial<Schedule>): void;
  /** Per kernel name, over all modules loaded so far. */
  coverage(): Coverage[];
  /** Counts coverage from here on. */
  clearCoverage(): void;
  liveAllocations(): number;
  readonly stats: { instructions: number; matrixProducts: number; launches: number };
}

/** The newest PTX version that a driver of a CUDA release reads. */
const newestPtx = (driverVersion: number): number =>
  driverVersion >= 13000
    ? 9 + (driverVersion % 1000) / 100
    : driverVersion >= 12000
      ? 8 + (driverVersion % 1000) / 100
      : 7.8;

const parsed = new Map<string, PtxModule>();

export function openVirtualGpu(options: VirtualGpuOptions = {}): VirtualGpu {
  const [major, minor] = options.capability ?? [8, 9];
  const memoryBytes = options.memoryBytes ?? 2 ** 34;
  const driverVersion = options.driverVersion ?? 13000;
  const optin = options.sharedBytes ?? mostShared([major, minor]);
  const place = options.place ?? 0;
  const arenaBegin = place * (options.arenaBytes ?? 2 ** 28);
  const arenaBytes = arenaBegin + (options.arenaBytes ?? 2 ** 28);
  const m = newMachine({ arenaBytes, arenaBegin, registerWords: 2 ** 22 });
  m.detectRaces = options.races ?? true;
  Object.assign(m.schedule, options.schedule);
  const stats = Object.assign(m.stats, { launches: 0 });

  const pool = (BigInt(place) << 32n) + 0x500n;
  let nextHandle = (BigInt(place) << 32n) + 0x1000n;
  const handles = new Map<bigint, unknown>();
  const loadedKernels: LoadedKernel[] = [];
  const sizes = new Map<bigint, number>();
  let used = 0;

  const register = (kind: string, value: unknown): bigint => {
    nextHandle += 16n;
    handles.set(nextHandle, { kind, value });
    return nextHandle;
  };
  const find = <T>(call: string, kind: string, handle: bigint): T => {
    const found = handles.get(handle) as { kind: string; value: T } | undefined;
    if (found?.kind !== kind) throw new CudaError('CUDA_ERROR_INVALID_HANDLE', call, `no such ${kind}`);
    return found.value;
  };
  const release = (call: string, kind: string, handle: bigint): void => {
    find(call, kind, handle);
    handles.delete(handle);
  };

  interface StreamState {
    /** Work recorded for a graph, while one is captured. */
    captured?: (() => void)[];
  }
  const defaultStream: StreamState = {};
  const streamOf = (call: string, stream: bigint): StreamState =>
    stream === 0n ? defaultStream : find<StreamState>(call, 'stream', stream);
  const enqueue = (call: string, stream: bigint, work: () => void): void => {
    const { captured } = streamOf(call, stream);
    if (captured) captured.push(work);
    else work();
  };
  const settle = (call: string, stream: bigint): void => {
    if (streamOf(call, stream).captured)
      throw new CudaError('CUDA_ERROR_NOT_SUPPORTED', call, 'the stream is being captured');
  };
  let captures = 0;
  /** Calls that a driver refuses to a thread that captures, on whatever stream (CU_STREAM_CAPTURE_MODE_THREAD_LOCAL). */
  const outsideCapture = (call: string): void => {
    if (captures) throw new CudaError('CUDA_ERROR_NOT_SUPPORTED', call, 'a stream is being captured');
  };
  const { u8, shadow8 } = m.global;
  const { range, read, write } = openCopies(m.arena);
  const host = openHostMemory();

  const api: GpuApi = {
    cuDriverGetVersion: () => driverVersion,
    cuDeviceGetCount: () => 1,
    cuDeviceGetName: () => 'virtual GPU',
    cuDeviceTotalMem: () => memoryBytes,
    cuDeviceGetAttribute(attribute, device) {
      if (device !== 0) throw new CudaError('CUDA_ERROR_INVALID_DEVICE', 'cuDeviceGetAttribute');
      const values: Record<number, number> = {
        [DeviceAttribute.MAX_SHARED_MEMORY_PER_BLOCK]: 48 * 1024,
        [DeviceAttribute.MULTIPROCESSOR_COUNT]: options.multiprocessors ?? 4,
        [DeviceAttribute.COMPUTE_CAPABILITY_MAJOR]: major,
        [DeviceAttribute.COMPUTE_CAPABILITY_MINOR]: minor,
        [DeviceAttribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN]: optin,
        [DeviceAttribute.MEMORY_POOLS_SUPPORTED]: 1,
      };
      return values[attribute] ?? 0;
    },
    cuDeviceCanAccessPeer: () => false,
    cuDevicePrimaryCtxRetain(device) {
      if (device !== 0) throw new CudaError('CUDA_ERROR_INVALID_DEVICE', 'cuDevicePrimaryCtxRetain');
      return register('context', undefined);
    },
    cuDevicePrimaryCtxRelease() {},
    cuCtxSetCurrent: (context) => find('cuCtxSetCurrent', 'context', context),
    cuCtxSynchronize() {
      settle('cuCtxSynchronize', 0n);
      host.settleAll();
    },

    cuMemGetInfo: () => ({ free: memoryBytes - used, total: memoryBytes }),
    cuMemAllocAsync(bytes, stream) {
      settle('cuMemAllocAsync', stream);
      if (bytes <= 0) throw new CudaError('CUDA_ERROR_INVALID_VALUE', 'cuMemAllocAsync', `${bytes} bytes`);
      const address = used + bytes <= memoryBytes ? m.arena.allocate(bytes) : undefined;
      if (address === undefined)
        throw new CudaError('CUDA_ERROR_OUT_OF_MEMORY', 'cuMemAllocAsync', `${bytes} bytes`);
      sizes.set(address, bytes);
      used += bytes;
      return address;
    },
    cuMemFreeAsync(pointer, stream) {
      settle('cuMemFreeAsync', stream);
      if (!m.arena.free(pointer)) {
        throw new GpuReport(
          'invalid free',
          `cuMemFreeAsync(0x${pointer.toString(16)}): no live allocation starts there`,
        );
      }
      used -= sizes.get(pointer) ?? 0;
      sizes.delete(pointer);
    },
    cuDeviceGetDefaultMemPool: () => pool,
    cuMemPoolSetAttribute(given) {
      if (given !== pool) throw new CudaError('CUDA_ERROR_INVALID_VALUE', 'cuMemPoolSetAttribute');
    },
    cuMemPoolSetAccess() {
      throw new CudaError('CUDA_ERROR_INVALID_DEVICE', 'cuMemPoolSetAccess', 'there is one GPU');
    },
    cuMemPoolTrimTo(given) {
      if (given !== pool) throw new CudaError('CUDA_ERROR_INVALID_VALUE', 'cuMemPoolTrimTo');
    },
    cuMemAllocHost(bytes) {
      outsideCapture('cuMemAllocHost');
      return host.pin(bytes);
    },
    cuMemFreeHost(memory) {
      outsideCapture('cuMemFreeHost');
      host.unpin(memory);
    },
    // A graph would copy again what then lies in the host's memory: nobody may capture that here.
    cuMemcpyHtoDAsync(target, source, stream) {
      settle('cuMemcpyHtoDAsync', stream);
      write('cuMemcpyHtoDAsync', target, source);
      host.reads(source, stream);
    },
    cuMemcpyDtoHAsync(target, source, stream) {
      settle('cuMemcpyDtoHAsync', stream);
      host.writes(target, read('cuMemcpyDtoHAsync', source, target.byteLength), stream);
    },
    cuMemcpyDtoDAsync(target, source, bytes, stream) {
      enqueue('cuMemcpyDtoDAsync', stream, () => {
        const from = range('cuMemcpyDtoDAsync', source, bytes);
        const to = range('cuMemcpyDtoDAsync', target, bytes);
        u8.copyWithin(to, from, from + bytes);
        shadow8.copyWithin(to, from, from + bytes);
      });
    },
    cuMemcpyPeerAsync() {
      throw new CudaError('CUDA_ERROR_INVALID_CONTEXT', 'cuMemcpyPeerAsync', 'there is one GPU');
    },
    cuMemsetD8Async(pointer, value, bytes, stream) {
      enqueue('cuMemsetD8Async', stream, () => {
        const to = range('cuMemsetD8Async', pointer, bytes);
        u8.fill(value, to, to + bytes);
        shadow8.fill(3, to, to + bytes);
      });
    },

    cuModuleLoadData(ptx) {
      outsideCapture('cuModuleLoadData');
      const known = parsed.get(ptx) ?? parsePtx(ptx);
      parsed.set(ptx, known);
      const target = /^sm_(\d+)(\d)([af]?)$/.exec(known.target);
      if (Number(known.version) > newestPtx(driverVersion)) {
        throw new CudaError('CUDA_ERROR_UNSUPPORTED_PTX_VERSION', 'cuModuleLoadData', `PTX ${known.version}`);
      }
      const own = Number(target?.[1]) * 10 + Number(target?.[2]);
      const here = major * 10 + minor;
      if (!target || own > here || (target[3] && own !== here)) {
        throw new CudaError(
          'CUDA_ERROR_NO_BINARY_FOR_GPU',
          'cuModuleLoadData',
          `PTX for ${known.target} on sm_${here}`,
        );
      }
      const loaded = loadModule(m, known);
      loadedKernels.push(...loaded.kernels.values());
      return register('module', loaded);
    },
    cuModuleUnload(module) {
      const { globals } = find<{ globals: bigint[] }>('cuModuleUnload', 'module', module);
      for (const address of globals) m.arena.free(address);
      release('cuModuleUnload', 'module', module);
    },
    cuModuleGetFunction(module, name) {
      const { kernels } = find<{ kernels: Map<string, LoadedKernel> }>(
        'cuModuleGetFunction',
        'module',
        module,
      );
      const kernel = kernels.get(name);
      if (!kernel) throw new CudaError('CUDA_ERROR_NOT_FOUND', 'cuModuleGetFunction', `no kernel ${name}`);
      return register('kernel', { kernel, dynamicLimit: 48 * 1024 - kernel.staticBytes });
    },
    cuFuncGetAttribute(attribute, handle) {
      const { kernel } = find<KernelState>('cuFuncGetAttribute', 'kernel', handle);
      if (attribute === FunctionAttribute.MAX_THREADS_PER_BLOCK) return kernel.source.maxThreads;
      if (attribute === FunctionAttribute.SHARED_SIZE_BYTES) return kernel.staticBytes;
      return attribute === FunctionAttribute.LOCAL_SIZE_BYTES ? kernel.localBytes : 0;
    },
    cuFuncSetAttribute(handle, attribute, value) {
      const state = find<KernelState>('cuFuncSetAttribute', 'kernel', handle);
      if (attribute !== FunctionAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES) return;
      if (value + state.kernel.staticBytes > optin) {
        throw new CudaError(
          'CUDA_ERROR_INVALID_VALUE',
          'cuFuncSetAttribute',
          `${value} bytes of dynamic shared memory`,
        );
      }
      state.dynamicLimit = value;
    },
    cuLaunchKernel(handle, grid, block, sharedBytes, stream, parameters, offsets, attributes = {}) {
      const { cluster = 1, programmatic } = attributes;
      const { kernel, dynamicLimit } = find<KernelState>('cuLaunchKernel', 'kernel', handle);
      const refuse = (detail: string): never => {
        throw new CudaError('CUDA_ERROR_INVALID_VALUE', 'cuLaunchKernel', `${kernel.source.name}: ${detail}`);
      };
      const { name, maxThreads, parameters: own, parameterBytes } = kernel.source;
      const threads = block[0] * block[1] * block[2];
      if ([...grid, ...block].some((n) => !Number.isInteger(n) || n < 1))
        refuse(`grid [${grid}] of blocks [${block}]`);
      if (grid[0] >= 2 ** 31 || grid[1] > 65535 || grid[2] > 65535) refuse(`grid [${grid}] is too large`);
      if (block[2] > 64 || threads > maxThreads)
        refuse(`${threads} threads exceed the kernel's ${maxThreads}`);
      if (sharedBytes > dynamicLimit)
        refuse(`${sharedBytes} bytes of dynamic shared memory exceed ${dynamicLimit}`);
      if (parameters.length !== parameterBytes) {
        const detail = `kernel ${name} takes ${parameterBytes} bytes of parameters, the launch brings ${parameters.length}`;
        throw new GpuReport('launch', detail);
      }
      if (offsets.length !== own.length)
        throw new GpuReport('launch', `kernel ${name} takes ${own.length} parameters, not ${offsets.length}`);
      if (cluster > 1 && (major < 9 || cluster > 8 || grid[0] % cluster))
        refuse(`clusters of ${cluster} blocks in a grid [${grid}]`);
      const uncapturable = programmatic && driverVersion < PROGRAMMATIC_LAUNCH;
      if (uncapturable && streamOf('cuLaunchKernel', stream).captured) refuse('programmatic in a capture');
      const warps = Math.ceil(threads / 32) * cluster;
      if (warps > mostWarps) refuse(`the virtual GPU runs ${mostWarps} warps together, not ${warps}`);
      if (warps * kernel.flow.planes * 32 > m.registers.length) refuse('too many registers');
      // As the driver does: each parameter from where it lies to the kernel's own place for it.
      const packed = new Uint8Array(parameterBytes);
      own.forEach(({ offset, bytes }, i) => {
        packed.set(parameters.subarray(offsets[i], offsets[i] + bytes), offset);
      });
      enqueue('cuLaunchKernel', stream, () => {
        new Uint8Array(m.parameters.buffer).set(packed);
        stats.launches++;
        runGrid(m, kernel, grid, block, sharedBytes, attributes);
      });
    },

    cuStreamCreate: () => register('stream', {}),
    cuStreamDestroy: (stream) => release('cuStreamDestroy', 'stream', stream),
    cuStreamSynchronize(stream) {
      settle('cuStreamSynchronize', stream);
      host.settle(stream);
    },
    cuStreamWaitEvent(stream, event) {
      streamOf('cuStreamWaitEvent', stream);
      find('cuStreamWaitEvent', 'event', event);
    },
    cuEventCreate: () => register('event', { at: Number.NaN, stream: 0n, copies: 0 }),
    cuEventDestroy: (event) => release('cuEventDestroy', 'event', event),
    cuEventRecord(event, stream) {
      const state = find<EventState>('cuEventRecord', 'event', event);
      enqueue('cuEventRecord', stream, () => {
        Object.assign(state, { at: performance.now(), stream, copies: host.queued(stream) });
      });
    },
    cuEventSynchronize(event) {
      const { stream, copies } = find<EventState>('cuEventSynchronize', 'event', event);
      host.settle(stream, copies);
    },
    cuEventElapsedTime(start, end) {
      const [a, b] = [start, end].map((e) => find<EventState>('cuEventElapsedTime', 'event', e).at);
      if (Number.isNaN(a + b))
        throw new CudaError('CUDA_ERROR_INVALID_HANDLE', 'cuEventElapsedTime', 'not recorded');
      return b - a;
    },

    cuTensorMapEncodeTiled: (map) => encodeTiled(m.tensorMaps, map),
    cuTensorMapEncodeIm2col: (map) => encodeIm2col(m.tensorMaps, map),

    cuStreamBeginCapture(stream) {
      settle('cuStreamBeginCapture', stream);
      if (stream === 0n)
        throw new CudaError('CUDA_ERROR_NOT_SUPPORTED', 'cuStreamBeginCapture', 'the default stream');
      streamOf('cuStreamBeginCapture', stream).captured = [];
      captures++;
    },
    cuStreamEndCapture(stream) {
      const state = streamOf('cuStreamEndCapture', stream);
      if (!state.captured)
        throw new CudaError('CUDA_ERROR_INVALID_VALUE', 'cuStreamEndCapture', 'nothing is captured');
      const graph = register('graph', state.captured);
      state.captured = undefined;
      captures--;
      return graph;
    },
    cuGraphInstantiate: (graph) =>
      register('graph exec', [...find<(() => void)[]>('cuGraphInstantiate', 'graph', graph)]),
    cuGraphLaunch(exec, stream) {
      const work = find<(() => void)[]>('cuGraphLaunch', 'graph exec', exec);
      enqueue('cuGraphLaunch', stream, () => {
        for (const run of work) run();
      });
    },
    cuGraphExecDestroy: (exec) => release('cuGraphExecDestroy', 'graph exec', exec),
    cuGraphDestroy: (graph) => release('cuGraphDestroy', 'graph', graph),
  };

  return {
    ...api,
    stats,
    setSchedule: (schedule) => Object.assign(m.schedule, schedule),
    coverage: () => coverageOf(loadedKernels),
    clearCoverage() {
      for (const { visits } of loadedKernels) visits.fill(0);
    },
    liveAllocations: () => sizes.size,
    read,
    write,
  };
}

interface EventState {
  at: number;
  /** Where it was recorded, after how many copies from and to pinned memory. */
  stream: bigint;
  copies: number;
}

interface KernelState {
  readonly kernel: LoadedKernel;
  dynamicLimit: number;
}
