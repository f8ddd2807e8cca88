// The CUDA driver API as the engine sees it: the calls of cuda.h that the `cuda` device makes, under their own names, with
// results returned instead of written through pointers. Behind this interface stand libcuda through koffi (libcuda.ts), a GPU
// that only counts (stand_in.ts), and in the tests the virtual GPU and a wrapper that makes the n-th call fail. A call that does
// not return CUDA_SUCCESS throws CudaError. Handles and addresses are bigints, 0n is null (and the default stream).
import type { CudaResult } from './errors.ts';

export type DevicePointer = bigint;
export type Context = bigint;
export type Stream = bigint;
export type Event = bigint;
export type Module = bigint;
export type Kernel = bigint;
export type Graph = bigint;
export type GraphExec = bigint;
export type MemPool = bigint;

export type Dim3 = readonly [x: number, y: number, z: number];

/** CUdevice_attribute, as far as it is asked for. */
export const DeviceAttribute = {
  MAX_SHARED_MEMORY_PER_BLOCK: 8,
  MULTIPROCESSOR_COUNT: 16,
  L2_CACHE_SIZE: 38,
  COMPUTE_CAPABILITY_MAJOR: 75,
  COMPUTE_CAPABILITY_MINOR: 76,
  MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: 97,
  MEMORY_POOLS_SUPPORTED: 115,
} as const;

/** CUfunction_attribute, as far as it is asked for or set. */
export const FunctionAttribute = {
  MAX_THREADS_PER_BLOCK: 0,
  SHARED_SIZE_BYTES: 1,
  LOCAL_SIZE_BYTES: 3,
  NUM_REGS: 4,
  /** Set before a launch whose dynamic shared memory exceeds 48 KiB. */
  MAX_DYNAMIC_SHARED_SIZE_BYTES: 8,
} as const;

/** CUmemPool_attribute: bytes that a pool keeps when the stream is synchronized. */
export const RELEASE_THRESHOLD = 4;

/** A CUmemAccessDesc's location and leave: a device, reading and writing. */
export const MemAccess = {
  LOCATION_TYPE_DEVICE: 1,
  FLAGS_PROT_READWRITE: 3,
} as const;

/** CU_EVENT_DISABLE_TIMING. */
export const DISABLE_TIMING = 2;

/** CUtensorMapDataType. */
export const TensorMapDataType = {
  UINT8: 0,
  UINT16: 1,
  INT32: 3,
  FLOAT16: 6,
  FLOAT32: 7,
  BFLOAT16: 9,
} as const;

/** CUtensorMapSwizzle: the span whose 16-byte pieces are permuted. */
export const TensorMapSwizzle = { NONE: 0, B32: 1, B64: 2, B128: 3 } as const;

/** What both kinds of tensor map say. Lists run from the innermost dimension outwards; strides are in bytes. */
interface TensorMapBase {
  readonly dataType: number;
  readonly globalAddress: DevicePointer;
  readonly globalDim: readonly number[];
  /** One less than the rank: the innermost stride is the element's size. */
  readonly globalStrides: readonly number[];
  readonly elementStrides: readonly number[];
  readonly swizzle: number;
}

export interface TiledMap extends TensorMapBase {
  readonly boxDim: readonly number[];
}

export interface Im2colMap extends TensorMapBase {
  readonly pixelBoxLowerCorner: readonly number[];
  readonly pixelBoxUpperCorner: readonly number[];
  readonly channelsPerPixel: number;
  readonly pixelsPerColumn: number;
}

/** CUlaunchAttribute, as far as they are set. */
export interface LaunchAttributes {
  /** So many neighbours along x run together; 1 unless told. */
  readonly cluster?: number;
  /**
   * Programmatic dependent launch: blocks may begin while the kernel before it in the stream still runs, for which the kernel
   * waits by itself (CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION).
   */
  readonly programmatic?: boolean;
}

export interface GpuApi {
  cuDriverGetVersion(): number;
  cuDeviceGetCount(): number;
  cuDeviceGetName(device: number): string;
  cuDeviceTotalMem(device: number): number;
  cuDeviceGetAttribute(attribute: number, device: number): number;
  /** Whether a GPU can read the memory of another by itself. */
  cuDeviceCanAccessPeer(device: number, peer: number): boolean;
  cuDevicePrimaryCtxRetain(device: number): Context;
  cuDevicePrimaryCtxRelease(device: number): void;
  cuCtxSetCurrent(context: Context): void;
  /** Waits for all work of the context, and is where errors of kernels show. */
  cuCtxSynchronize(): void;

  cuMemGetInfo(): { free: number; total: number };
  /** The pool that cuMemAllocAsync takes from. */
  cuDeviceGetDefaultMemPool(device: number): MemPool;
  cuMemPoolSetAttribute(pool: MemPool, attribute: number, value: bigint): void;
  /** Lets a GPU read and write what comes from another's pool, also what came from it before. */
  cuMemPoolSetAccess(pool: MemPool, device: number): void;
  /** Gives all but `keep` bytes of what is free in the pool back to the system. */
  cuMemPoolTrimTo(pool: MemPool, keep: number): void;
  cuMemAllocAsync(bytes: number, stream: Stream): DevicePointer;
  cuMemFreeAsync(pointer: DevicePointer, stream: Stream): void;
  /** Pinned host memory for staging; give the same array to cuMemFreeHost. */
  cuMemAllocHost(bytes: number): Uint8Array;
  cuMemFreeHost(memory: Uint8Array): void;
  /** The source must stay as it is until the stream is synchronized, wherever it lies. */
  cuMemcpyHtoDAsync(target: DevicePointer, source: Uint8Array, stream: Stream): void;
  /** The bytes are valid once the stream is synchronized. */
  cuMemcpyDtoHAsync(target: Uint8Array, source: DevicePointer, stream: Stream): void;
  cuMemcpyDtoDAsync(target: DevicePointer, source: DevicePointer, bytes: number, stream: Stream): void;
  /** From the memory of one context to another's; needs no peer access. */
  cuMemcpyPeerAsync(
    target: DevicePointer,
    targetContext: Context,
    source: DevicePointer,
    sourceContext: Context,
    bytes: number,
    stream: Stream,
  ): void;
  cuMemsetD8Async(pointer: DevicePointer, value: number, bytes: number, stream: Stream): void;

  cuModuleLoadData(ptx: string): Module;
  cuModuleUnload(module: Module): void;
  cuModuleGetFunction(module: Module, name: string): Kernel;
  cuFuncGetAttribute(attribute: number, kernel: Kernel): number;
  cuFuncSetAttribute(kernel: Kernel, attribute: number, value: number): void;
  /**
   * Queues a kernel. `parameters` is the packed parameter block that packParameters of manifest.ts makes from the .entry's
   * own list, and `offsets` says where in it each of them begins; the driver checks neither, so the packing does. Attributes
   * go by cuLaunchKernelEx.
   */
  cuLaunchKernel(
    kernel: Kernel,
    grid: Dim3,
    block: Dim3,
    sharedBytes: number,
    stream: Stream,
    parameters: Uint8Array,
    offsets: readonly number[],
    attributes?: LaunchAttributes,
  ): void;

  cuStreamCreate(flags: number): Stream;
  cuStreamDestroy(stream: Stream): void;
  cuStreamSynchronize(stream: Stream): void;
  /** The event may be another context's. */
  cuStreamWaitEvent(stream: Stream, event: Event): void;
  cuEventCreate(flags: number): Event;
  cuEventDestroy(event: Event): void;
  cuEventRecord(event: Event, stream: Stream): void;
  cuEventSynchronize(event: Event): void;
  /** Milliseconds between two recorded events. */
  cuEventElapsedTime(start: Event, end: Event): number;

  /** The 128 opaque bytes of a CUtensorMap, passed by value as a kernel parameter of that size. */
  cuTensorMapEncodeTiled(map: TiledMap): Uint8Array;
  cuTensorMapEncodeIm2col(map: Im2colMap): Uint8Array;

  cuStreamBeginCapture(stream: Stream): void;
  cuStreamEndCapture(stream: Stream): Graph;
  cuGraphInstantiate(graph: Graph): GraphExec;
  cuGraphLaunch(exec: GraphExec, stream: Stream): void;
  cuGraphExecDestroy(exec: GraphExec): void;
  cuGraphDestroy(graph: Graph): void;
}

/** The results after which the context is lost and the process must end: its memory and every later call are void. */
export const stickyResults: ReadonlySet<CudaResult> = new Set<CudaResult>([
  'CUDA_ERROR_ILLEGAL_ADDRESS',
  'CUDA_ERROR_LAUNCH_TIMEOUT',
  'CUDA_ERROR_ASSERT',
  'CUDA_ERROR_HARDWARE_STACK_ERROR',
  'CUDA_ERROR_ILLEGAL_INSTRUCTION',
  'CUDA_ERROR_MISALIGNED_ADDRESS',
  'CUDA_ERROR_INVALID_ADDRESS_SPACE',
  'CUDA_ERROR_INVALID_PC',
  'CUDA_ERROR_LAUNCH_FAILED',
  'CUDA_ERROR_ECC_UNCORRECTABLE',
  'CUDA_ERROR_CONTAINED',
]);
