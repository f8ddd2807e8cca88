// After an error that costs the GPU's context (a sticky one, see api.ts) the driver would answer every later call with the same
// code, or hang. So the first error is told in full, with the kernel that was queued last; later calls are refused here at once,
// except that those which only give something back do nothing, so that clearing up raises no further error. And calls that take
// memory beside the pool's are made again when the pool has given back what it can: it may hold nearly all of the device's.
import { type GpuApi, stickyResults } from './api.ts';
import { CudaError, isOutOfMemory } from './errors.ts';

const givingBack: ReadonlySet<string> = new Set<keyof GpuApi>([
  'cuDevicePrimaryCtxRelease',
  'cuMemFreeAsync',
  'cuMemFreeHost',
  'cuModuleUnload',
  'cuStreamDestroy',
  'cuEventDestroy',
  'cuGraphExecDestroy',
  'cuGraphDestroy',
]);

/** For code, which is loaded as late as at a kernel's first launch, and for the nodes of a graph. */
const takingMemory: ReadonlySet<string> = new Set<keyof GpuApi>([
  'cuModuleLoadData',
  'cuModuleGetFunction',
  'cuLaunchKernel',
  'cuGraphLaunch',
]);

/** What a guard has to know: the GPU's name where errors should tell it, what was queued last, and what goes before each call. */
interface Guarded {
  gpu: string | undefined;
  lastKernel(): string | undefined;
  enter(): void;
  /** Gives memory back, more at each turn. */
  makeRoom(): Iterator<void>;
}

/** `api`, shut once its context is lost. */
export function guarded(api: GpuApi, { gpu, lastKernel, enter, makeRoom }: Guarded): GpuApi {
  let lost: CudaError | undefined;
  const guard = (name: string, call: (...args: unknown[]) => unknown) => {
    return (...args: unknown[]): unknown => {
      if (lost) {
        if (givingBack.has(name)) return undefined;
        throw new CudaError(lost.result, name, `the GPU was lost before, in ${lost.call}`, gpu);
      }
      let room: Iterator<void> | undefined;
      for (;;)
        try {
          enter();
          return call(...args);
        } catch (error) {
          if (!(error instanceof CudaError)) throw error;
          if (isOutOfMemory(error) && takingMemory.has(name)) {
            room ??= makeRoom();
            if (!room.next().done) continue;
          }
          if (!stickyResults.has(error.result))
            throw new CudaError(error.result, error.call, error.detail, gpu);
          const kernel = lastKernel();
          lost = new CudaError(
            error.result,
            error.call,
            kernel ? `the last kernel queued was ${kernel}` : undefined,
            gpu,
          );
          throw lost;
        }
    };
  };
  const calls = Object.entries(api).map(([name, call]) => [name, guard(name, call)]);
  return Object.fromEntries(calls) as GpuApi;
}
