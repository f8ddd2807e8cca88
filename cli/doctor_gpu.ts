// What `sdxl doctor` tells of NVIDIA GPUs: the driver and how new the kernels may be that it reads, then each GPU with what of
// its memory is free.
import { existsSync } from 'node:fs';
import { DeviceAttribute, type GpuApi } from '../engine/cuda/api.ts';
import { CudaError } from '../engine/cuda/errors.ts';
import { openCudaLibrary } from '../engine/cuda/libcuda.ts';
import { OLDEST_DRIVER, ptxCeiling, versionName } from '../engine/cuda/versions.ts';
import { gib } from '../io/byte_sizes.ts';

export interface Finding {
  name: string;
  value: string | number;
  /** What to do about it, where something is amiss. */
  mend?: string;
}

/** A picture of 1024x1024 in bfloat16 fits 8 GiB of which 0.75 are the driver's (test/kernels/gpu_memory.test.ts). */
const PICTURE_BYTES = 7.25 * 2 ** 30;

const reasonOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

/** The driver and its GPUs; one finding where there is none. */
export function gpus(open: () => GpuApi = openCudaLibrary): Finding[] {
  try {
    const api = open();
    const count = api.cuDeviceGetCount();
    return [driver(api), ...Array.from({ length: count }, (_, ordinal) => gpu(api, ordinal))];
  } catch (error) {
    // A library that refuses has a reason to tell, wherever its driver is loaded: under WSL and Windows there is no such file.
    if (!(error instanceof CudaError) && !existsSync('/proc/driver/nvidia/version'))
      return [{ name: 'gpu', value: 'no NVIDIA driver is loaded' }];
    return [{ name: 'gpu', value: 'an NVIDIA driver that cannot be used', mend: reasonOf(error) }];
  }
}

function driver(api: GpuApi): Finding {
  const version = api.cuDriverGetVersion();
  return {
    name: 'nvidia driver',
    value: `for CUDA ${versionName(version)}, reads PTX up to ${ptxCeiling(version).toFixed(1)}`,
    mend: version < OLDEST_DRIVER ? 'install driver r535 or later (CUDA 12.2)' : undefined,
  };
}

function gpu(api: GpuApi, ordinal: number): Finding {
  const name = `cuda:${ordinal}`;
  try {
    const attribute = (key: keyof typeof DeviceAttribute) =>
      api.cuDeviceGetAttribute(DeviceAttribute[key], ordinal);
    const [major, minor] = [attribute('COMPUTE_CAPABILITY_MAJOR'), attribute('COMPUTE_CAPABILITY_MINOR')];
    const { free, total } = memoryOf(api, ordinal);
    const model = `${api.cuDeviceGetName(ordinal)}, compute capability ${major}.${minor}`;
    return {
      name,
      value: `${model}, ${gib(free, 1)} free of ${gib(total, 1)}; used with --device ${name}`,
      mend:
        major < 8
          ? 'it is older than Ampere (compute capability 8.0), for which there are no kernels; use --device cpu'
          : free < PICTURE_BYTES
            ? `a picture of 1024x1024 takes ${gib(PICTURE_BYTES, 1)}: end other programs on this GPU, or draw at 512x512`
            : undefined,
    };
  } catch (error) {
    return { name, value: 'a GPU that cannot be used', mend: reasonOf(error) };
  }
}

/** Only a context can tell what is free. */
function memoryOf(api: GpuApi, ordinal: number): { free: number; total: number } {
  api.cuCtxSetCurrent(api.cuDevicePrimaryCtxRetain(ordinal));
  try {
    return api.cuMemGetInfo();
  } finally {
    api.cuDevicePrimaryCtxRelease(ordinal);
  }
}
