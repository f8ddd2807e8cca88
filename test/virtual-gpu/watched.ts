// A driver API over another one that tells of each launch, and may run a mutant in a kernel's place.
import { FunctionAttribute, type GpuApi, type Kernel } from '../../engine/cuda/api.ts';

export interface Watched {
  readonly api: GpuApi;
  /** Names of the kernels launched since it was last cleared. */
  readonly launched: Set<string>;
  /** From now on launches of `kernel` run the one of that name in `ptx`; without `ptx` the right one again. */
  replace(kernel: string, ptx?: string): void;
}

export function watched(gpu: GpuApi): Watched {
  const names = new Map<Kernel, string>();
  const launched = new Set<string>();
  const replaced = new Map<string, Kernel>();
  return {
    launched,
    replace(kernel, ptx) {
      if (ptx) replaced.set(kernel, gpu.cuModuleGetFunction(gpu.cuModuleLoadData(ptx), kernel));
      else replaced.delete(kernel);
    },
    api: {
      ...gpu,
      cuModuleGetFunction(module, name) {
        const kernel = gpu.cuModuleGetFunction(module, name);
        names.set(kernel, name);
        return kernel;
      },
      cuLaunchKernel(kernel, grid, block, shared, ...rest) {
        const name = names.get(kernel) as string;
        const other = replaced.get(name);
        launched.add(name);
        if (other) gpu.cuFuncSetAttribute(other, FunctionAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared);
        gpu.cuLaunchKernel(other ?? kernel, grid, block, shared, ...rest);
      },
    },
  };
}
