// The driver's result codes by their CUDA names, and the error that every failed call becomes: the call, the name, and
// what the user can do about it.
import { UserError } from '../../io/errors.ts';
import { memoryMend } from '../memory.ts';

/** CUresult: the codes that the calls of api.ts can return. */
export const cudaResults = {
  CUDA_ERROR_INVALID_VALUE: 1,
  CUDA_ERROR_OUT_OF_MEMORY: 2,
  CUDA_ERROR_NOT_INITIALIZED: 3,
  CUDA_ERROR_DEINITIALIZED: 4,
  CUDA_ERROR_STUB_LIBRARY: 34,
  CUDA_ERROR_DEVICE_UNAVAILABLE: 46,
  CUDA_ERROR_NO_DEVICE: 100,
  CUDA_ERROR_INVALID_DEVICE: 101,
  CUDA_ERROR_INVALID_IMAGE: 200,
  CUDA_ERROR_INVALID_CONTEXT: 201,
  CUDA_ERROR_NO_BINARY_FOR_GPU: 209,
  CUDA_ERROR_ECC_UNCORRECTABLE: 214,
  CUDA_ERROR_INVALID_PTX: 218,
  CUDA_ERROR_JIT_COMPILER_NOT_FOUND: 221,
  CUDA_ERROR_UNSUPPORTED_PTX_VERSION: 222,
  CUDA_ERROR_CONTAINED: 226,
  CUDA_ERROR_INVALID_HANDLE: 400,
  CUDA_ERROR_NOT_FOUND: 500,
  CUDA_ERROR_NOT_READY: 600,
  CUDA_ERROR_ILLEGAL_ADDRESS: 700,
  CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: 701,
  CUDA_ERROR_LAUNCH_TIMEOUT: 702,
  CUDA_ERROR_CONTEXT_IS_DESTROYED: 709,
  CUDA_ERROR_ASSERT: 710,
  CUDA_ERROR_HARDWARE_STACK_ERROR: 714,
  CUDA_ERROR_ILLEGAL_INSTRUCTION: 715,
  CUDA_ERROR_MISALIGNED_ADDRESS: 716,
  CUDA_ERROR_INVALID_ADDRESS_SPACE: 717,
  CUDA_ERROR_INVALID_PC: 718,
  CUDA_ERROR_LAUNCH_FAILED: 719,
  CUDA_ERROR_NOT_SUPPORTED: 801,
  CUDA_ERROR_SYSTEM_NOT_READY: 802,
  CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: 803,
  CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE: 804,
  CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: 901,
  CUDA_ERROR_UNKNOWN: 999,
} as const;

export type CudaResult = keyof typeof cudaResults;

const report = 'run again, and if it comes back report it with the output of `sdxl doctor --json`';
const reinstall = 'the kernels of this package are damaged or of another version; install it again';

const mends: Partial<Record<CudaResult, string>> = {
  CUDA_ERROR_OUT_OF_MEMORY: memoryMend,
  CUDA_ERROR_NO_DEVICE: 'no NVIDIA GPU is visible to the driver; use --device cpu',
  CUDA_ERROR_INVALID_DEVICE: 'there is no GPU of that number; see `sdxl doctor`',
  CUDA_ERROR_UNSUPPORTED_PTX_VERSION: 'the NVIDIA driver is too old for these kernels; install r535 or later',
  CUDA_ERROR_JIT_COMPILER_NOT_FOUND:
    'the driver lacks its PTX compiler (libnvidia-ptxjitcompiler); reinstall it',
  CUDA_ERROR_NO_BINARY_FOR_GPU: 'the GPU is older than Ampere (compute capability 8.0); use --device cpu',
  CUDA_ERROR_ECC_UNCORRECTABLE: 'the GPU found a memory error; reset or replace it',
  CUDA_ERROR_LAUNCH_TIMEOUT:
    'the system ended a kernel that ran too long; use a GPU without a screen, or a smaller size',
  CUDA_ERROR_ILLEGAL_ADDRESS: report,
  CUDA_ERROR_ASSERT: report,
  CUDA_ERROR_HARDWARE_STACK_ERROR: report,
  CUDA_ERROR_ILLEGAL_INSTRUCTION: report,
  CUDA_ERROR_MISALIGNED_ADDRESS: report,
  CUDA_ERROR_INVALID_ADDRESS_SPACE: report,
  CUDA_ERROR_INVALID_PC: report,
  CUDA_ERROR_LAUNCH_FAILED: report,
  CUDA_ERROR_INVALID_IMAGE: reinstall,
  CUDA_ERROR_INVALID_PTX: reinstall,
  CUDA_ERROR_NOT_FOUND: reinstall,
  CUDA_ERROR_STUB_LIBRARY: "the libcuda.so.1 that was found is the toolkit's stub; install the NVIDIA driver",
  CUDA_ERROR_CONTAINED: 'the GPU found a memory error and shut this program out; run again',
  CUDA_ERROR_SYSTEM_NOT_READY:
    'the links between the GPUs are not up; start nvidia-fabricmanager, or wait for it',
  CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE:
    'the libcuda.so.1 that was found is of a cuda-compat package, which this GPU does not take; remove it',
  CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: "the driver's library and kernel module differ; restart the machine",
  CUDA_ERROR_DEVICE_UNAVAILABLE: 'another program has the GPU to itself; wait for it, or use another GPU',
};

/** A driver call that failed. */
export class CudaError extends UserError {
  override readonly name: string = 'CudaError';
  readonly result: CudaResult;
  readonly call: string;
  readonly detail: string | undefined;

  /** `gpu` is told where there are several. */
  constructor(result: CudaResult, call: string, detail?: string, gpu?: string) {
    super(
      `${call} failed with ${result}${gpu ? ` on ${gpu}` : ''}${detail ? `: ${detail}` : ''}`,
      mends[result],
    );
    this.result = result;
    this.call = call;
    this.detail = detail;
  }
}

export const isOutOfMemory = (error: unknown): error is CudaError =>
  error instanceof CudaError && error.result === 'CUDA_ERROR_OUT_OF_MEMORY';

/** The name of a code that the driver returned. */
export function resultName(code: number): CudaResult {
  const found = Object.entries(cudaResults).find(([, value]) => value === code);
  return (found?.[0] ?? 'CUDA_ERROR_UNKNOWN') as CudaResult;
}
