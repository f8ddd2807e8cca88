// The driver API on libcuda.
import { UserError } from '../../io/errors.ts';
import type { GpuApi } from './api.ts';

/** Opens the NVIDIA driver's library. */
export function openCudaLibrary(): GpuApi {
  throw new UserError('the cuda device is not built yet in this version; use --device cpu');
}
