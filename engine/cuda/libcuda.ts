// The calls of api.ts on the NVIDIA driver's own library: no toolkit and no runtime library. Launch parameters are laid out in the
// scratch block of native.ts: the driver copies them before cuLaunchKernel returns. Each goes by its own pointer (kernelParams), not
// in one buffer (extra): a buffer must have the device's layout, which PTX does not tell. On Hopper ptxas moves a list of tensor maps
// 48 bytes on, so that they begin on a multiple of 64 in constant memory.
import koffi from 'koffi';
import { type GpuApi, type Im2colMap, MemAccess, type TiledMap } from './api.ts';
import { CudaError, resultName } from './errors.ts';
import { type NativeLibrary, openNative, SCRATCH_BYTES } from './native.ts';

const libraryName = process.platform === 'win32' ? 'nvcuda.dll' : 'libcuda.so.1';

/** Where in the scratch block the packed parameters lie, and the list of pointers to them. */
const PARAMETERS = 2048;
const POINTERS = 1024;
const MOST_PARAMETERS = (PARAMETERS - POINTERS) / 8;
/** And what a launch with attributes takes: cuda.h's CUlaunchConfig, and two CUlaunchAttributes. */
const CONFIG = 640;
const ATTRIBUTES = 704;
const ATTRIBUTE_BYTES = 72;
/** What the driver's compiler says of PTX that it refuses. */
const LOG = 2048;
const LOG_BYTES = 2048;

/** A GPU's CUdevice, by its number. */
type DeviceOf = (ordinal: number) => number;

/** Opens the NVIDIA driver's library, or the one at `path`. @throws UserError where there is none */
export function openCudaLibrary(path = libraryName): GpuApi {
  const native = openNative(path);
  native.call('cuInit', 'i', 0);
  const known = new Map<number, number>();
  const deviceOf: DeviceOf = (ordinal) => {
    const found = known.get(ordinal);
    if (found !== undefined) return found;
    native.call('cuDeviceGet', 'oi', native.scratch, ordinal);
    known.set(ordinal, native.int());
    return native.int();
  };
  return {
    ...deviceCalls(native, deviceOf),
    ...memoryCalls(native, deviceOf),
    ...copyCalls(native),
    ...moduleCalls(native),
    cuLaunchKernel: launcherOf(native),
    ...streamCalls(native),
    ...tensorMapCalls(native),
    ...graphCalls(native),
  };
}

/** GPUs and their contexts. */
function deviceCalls(native: NativeLibrary, deviceOf: DeviceOf) {
  const { call, made, int, text, scratch } = native;
  return {
    cuDriverGetVersion() {
      call('cuDriverGetVersion', 'o', scratch);
      return int();
    },
    cuDeviceGetCount() {
      call('cuDeviceGetCount', 'o', scratch);
      return int();
    },
    cuDeviceGetName(device) {
      call('cuDeviceGetName', 'oii', scratch, 256, deviceOf(device));
      return text(0, 256);
    },
    cuDeviceTotalMem: (device) => Number(made('cuDeviceTotalMem_v2', 'i', deviceOf(device))),
    cuDeviceGetAttribute(attribute, device) {
      call('cuDeviceGetAttribute', 'oii', scratch, attribute, deviceOf(device));
      return int();
    },
    cuDeviceCanAccessPeer(device, peer) {
      call('cuDeviceCanAccessPeer', 'oii', scratch, deviceOf(device), deviceOf(peer));
      return int() !== 0;
    },
    cuDevicePrimaryCtxRetain: (device) => made('cuDevicePrimaryCtxRetain', 'i', deviceOf(device)),
    cuDevicePrimaryCtxRelease: (device) => call('cuDevicePrimaryCtxRelease_v2', 'i', deviceOf(device)),
    cuCtxSetCurrent: (context) => call('cuCtxSetCurrent', 'h', context),
    cuCtxSynchronize: () => call('cuCtxSynchronize', ''),
  } satisfies Partial<GpuApi>;
}

/** Memory on the device, by its pools, and pinned memory on the host. */
function memoryCalls(native: NativeLibrary, deviceOf: DeviceOf) {
  const { call, made, word, scratch } = native;
  return {
    cuMemGetInfo() {
      call('cuMemGetInfo_v2', 'oo', scratch, scratch + 8n);
      return { free: Number(word()), total: Number(word(8)) };
    },
    cuDeviceGetDefaultMemPool: (device) => made('cuDeviceGetDefaultMemPool', 'i', deviceOf(device)),
    cuMemPoolSetAttribute: (pool, attribute, value) =>
      call('cuMemPoolSetAttribute', 'hib', pool, attribute, BigUint64Array.of(value)),
    cuMemPoolSetAccess(pool, device) {
      const { LOCATION_TYPE_DEVICE, FLAGS_PROT_READWRITE } = MemAccess;
      const leave = Int32Array.of(LOCATION_TYPE_DEVICE, deviceOf(device), FLAGS_PROT_READWRITE);
      call('cuMemPoolSetAccess', 'hbz', pool, leave, 1);
    },
    cuMemPoolTrimTo: (pool, keep) => call('cuMemPoolTrimTo', 'hz', pool, keep),
    cuMemAllocAsync: (bytes, stream) => made('cuMemAllocAsync', 'zh', bytes, stream),
    cuMemFreeAsync: (pointer, stream) => call('cuMemFreeAsync', 'hh', pointer, stream),
    cuMemAllocHost: (bytes) => new Uint8Array(koffi.view(made('cuMemAllocHost_v2', 'z', bytes), bytes)),
    cuMemFreeHost: (pinned) => call('cuMemFreeHost', 'b', pinned),
  } satisfies Partial<GpuApi>;
}

/** Copies in the order of a stream. */
function copyCalls({ call }: NativeLibrary) {
  return {
    cuMemcpyHtoDAsync: (target, source, stream) =>
      call('cuMemcpyHtoDAsync_v2', 'hbzh', target, source, source.byteLength, stream),
    cuMemcpyDtoHAsync: (target, source, stream) =>
      call('cuMemcpyDtoHAsync_v2', 'bhzh', target, source, target.byteLength, stream),
    cuMemcpyDtoDAsync: (target, source, bytes, stream) =>
      call('cuMemcpyDtoDAsync_v2', 'hhzh', target, source, bytes, stream),
    cuMemcpyPeerAsync: (target, targetContext, source, sourceContext, bytes, stream) =>
      call('cuMemcpyPeerAsync', 'hhhhzh', target, targetContext, source, sourceContext, bytes, stream),
    cuMemsetD8Async: (pointer, value, bytes, stream) =>
      call('cuMemsetD8Async', 'hizh', pointer, value, bytes, stream),
  } satisfies Partial<GpuApi>;
}

/** PTX, compiled by the driver, and its kernels. */
function moduleCalls(native: NativeLibrary) {
  const { call, made, int, word, scratch } = native;
  return {
    cuModuleLoadData(ptx) {
      const image = Buffer.from(`${ptx}\0`, 'latin1');
      const code = native.functionOf('cuModuleLoadData', 'ob')(scratch, image);
      if (code === 0) return word();
      throw resultName(code) === 'CUDA_ERROR_INVALID_PTX'
        ? invalid(native, image)
        : native.failed(code, 'cuModuleLoadData');
    },
    cuModuleUnload: (module) => call('cuModuleUnload', 'h', module),
    cuModuleGetFunction: (module, name) =>
      made('cuModuleGetFunction', 'hb', module, Buffer.from(`${name}\0`, 'latin1')),
    cuFuncGetAttribute(attribute, kernel) {
      call('cuFuncGetAttribute', 'oih', scratch, attribute, kernel);
      return int();
    },
    cuFuncSetAttribute: (kernel, attribute, value) =>
      call('cuFuncSetAttribute', 'hii', kernel, attribute, value),
  } satisfies Partial<GpuApi>;
}

/** Why PTX is invalid: what the compiler says when it is asked once more. */
function invalid({ functionOf, scratch, memory, text }: NativeLibrary, image: Uint8Array): CudaError {
  new Uint8Array(memory.buffer, LOG, LOG_BYTES).fill(0);
  // CU_JIT_ERROR_LOG_BUFFER and CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES, and their values in the place of pointers.
  const values = BigUint64Array.of(scratch + BigInt(LOG), BigInt(LOG_BYTES - 1));
  functionOf('cuModuleLoadDataEx', 'obibb')(scratch, image, 2, Int32Array.of(5, 6), values);
  const log = text(LOG, LOG_BYTES)
    .trim()
    .replace(/\s*\n\s*/g, '; ');
  return new CudaError('CUDA_ERROR_INVALID_PTX', 'cuModuleLoadData', log || undefined);
}

/** cuLaunchKernel, or cuLaunchKernelEx where there are attributes. */
function launcherOf({ functionOf, call, failed, scratch, memory }: NativeLibrary): GpuApi['cuLaunchKernel'] {
  const bytes = new Uint8Array(memory.buffer);
  const pointers = new BigUint64Array(memory.buffer, POINTERS, MOST_PARAMETERS);
  /** A kernel's list of pointers, by its offsets. */
  const lists = new WeakMap<readonly number[], BigUint64Array>();
  const listOf = (offsets: readonly number[]): BigUint64Array => {
    const known = lists.get(offsets);
    if (known) return known;
    const list = BigUint64Array.from(offsets, (offset) => scratch + BigInt(PARAMETERS + offset));
    lists.set(offsets, list);
    return list;
  };
  const kernelParams = scratch + BigInt(POINTERS);
  const launch = functionOf('cuLaunchKernel', 'hiiiiiiihoh');
  // A cluster's dimensions (id 4), of which x comes at each launch, and leave to begin before the kernel before has ended (id 6).
  new Uint32Array(memory.buffer, ATTRIBUTES, 5).set([4, 0, 1, 1, 1]);
  new Uint32Array(memory.buffer, ATTRIBUTES + ATTRIBUTE_BYTES, 3).set([6, 0, 1]);
  const config = scratch + BigInt(CONFIG);
  const sizes = new Uint32Array(memory.buffer, CONFIG, 7);
  const listed = [0, ATTRIBUTE_BYTES].map((offset) => scratch + BigInt(ATTRIBUTES + offset));
  return (kernel, grid, block, sharedBytes, stream, parameters, offsets, attributes = {}) => {
    const { cluster = 1, programmatic = false } = attributes;
    const { byteLength } = parameters;
    if (byteLength > SCRATCH_BYTES - PARAMETERS || offsets.length > MOST_PARAMETERS)
      throw new Error(`${byteLength} bytes of ${offsets.length} parameters`);
    bytes.set(parameters, PARAMETERS);
    pointers.set(listOf(offsets));
    const [gx, gy, gz] = grid;
    const [bx, by, bz] = block;
    if (cluster > 1 || programmatic) {
      const [first, end] = [cluster > 1 ? 0 : 1, programmatic ? 2 : 1];
      sizes.set([gx, gy, gz, bx, by, bz, sharedBytes]);
      memory.setBigUint64(CONFIG + 32, stream, true);
      memory.setBigUint64(CONFIG + 40, listed[first], true);
      memory.setUint32(CONFIG + 48, end - first, true);
      memory.setUint32(ATTRIBUTES + 8, cluster, true);
      call('cuLaunchKernelEx', 'ohoh', config, kernel, kernelParams, 0n);
      return;
    }
    const code = launch(kernel, gx, gy, gz, bx, by, bz, sharedBytes, stream, kernelParams, 0n);
    if (code !== 0) throw failed(code, 'cuLaunchKernel');
  };
}

/** Streams and events. */
function streamCalls(native: NativeLibrary) {
  const { call, made, memory, scratch } = native;
  return {
    cuStreamCreate: (flags) => made('cuStreamCreate', 'i', flags),
    cuStreamDestroy: (stream) => call('cuStreamDestroy_v2', 'h', stream),
    cuStreamSynchronize: (stream) => call('cuStreamSynchronize', 'h', stream),
    cuStreamWaitEvent: (stream, event) => call('cuStreamWaitEvent', 'hhi', stream, event, 0),
    cuEventCreate: (flags) => made('cuEventCreate', 'i', flags),
    cuEventDestroy: (event) => call('cuEventDestroy_v2', 'h', event),
    cuEventRecord: (event, stream) => call('cuEventRecord', 'hh', event, stream),
    cuEventSynchronize: (event) => call('cuEventSynchronize', 'h', event),
    cuEventElapsedTime(start, end) {
      call('cuEventElapsedTime', 'ohh', scratch, start, end);
      return memory.getFloat32(0, true);
    },
  } satisfies Partial<GpuApi>;
}

/** What TMA reads of a tensor. */
function tensorMapCalls({ call, memory, scratch }: NativeLibrary) {
  const encode = (symbol: string, signature: string, map: TiledMap | Im2colMap, own: readonly unknown[]) => {
    const u64 = (values: readonly number[]) => new BigUint64Array(values.map(BigInt));
    const sizes = [
      map.dataType,
      map.globalDim.length,
      map.globalAddress,
      u64(map.globalDim),
      u64(map.globalStrides),
    ];
    const last = [new Uint32Array(map.elementStrides), 0, map.swizzle, 2, 0];
    call(symbol, `oiihbb${signature}biiii`, scratch, ...sizes, ...own, ...last);
    return new Uint8Array(memory.buffer).slice(0, 128);
  };
  return {
    cuTensorMapEncodeTiled: (map) =>
      encode('cuTensorMapEncodeTiled', 'b', map, [new Uint32Array(map.boxDim)]),
    cuTensorMapEncodeIm2col: (map) =>
      encode('cuTensorMapEncodeIm2col', 'bbii', map, [
        new Int32Array(map.pixelBoxLowerCorner),
        new Int32Array(map.pixelBoxUpperCorner),
        map.channelsPerPixel,
        map.pixelsPerColumn,
      ]),
  } satisfies Partial<GpuApi>;
}

/** A stream recorded and replayed. */
function graphCalls(native: NativeLibrary) {
  const { call, made, word, scratch } = native;
  return {
    // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    cuStreamBeginCapture: (stream) => call('cuStreamBeginCapture_v2', 'hi', stream, 1),
    cuStreamEndCapture(stream) {
      call('cuStreamEndCapture', 'ho', stream, scratch);
      return word();
    },
    cuGraphInstantiate: (graph) => made('cuGraphInstantiateWithFlags', 'hh', graph, 0n),
    cuGraphLaunch: (exec, stream) => call('cuGraphLaunch', 'hh', exec, stream),
    cuGraphExecDestroy: (exec) => call('cuGraphExecDestroy', 'h', exec),
    cuGraphDestroy: (graph) => call('cuGraphDestroy', 'h', graph),
  } satisfies Partial<GpuApi>;
}
