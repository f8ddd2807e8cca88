// What follows an error after which the GPU's context is lost (a sticky one, see api.ts): the driver would answer every later
// call with the same code, or hang. So the first one is told in full, with the kernel that was queued last; later calls are
// refused here at once, and what only gives something back passes in silence, so that clearing up raises nothing anew.
import { type GpuApi, stickyResults } from './api.ts';
import { CudaError } from './errors.ts';

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

/** `api`, shut once its context is lost; `lastKernel` names what was queued last, `enter` goes before each call. */
export function guarded(api: GpuApi, lastKernel: () => string | undefined, enter: () => void): GpuApi {
  let lost: CudaError | undefined;
  const guard = (name: string, call: (...args: unknown[]) => unknown) => {
    return (...args: unknown[]): unknown => {
      if (lost) {
        if (givingBack.has(name)) return undefined;
        throw new CudaError(lost.result, name, `the GPU was lost before, in ${lost.call}`);
      }
      try {
        enter();
        return call(...args);
      } catch (error) {
        if (!(error instanceof CudaError) || !stickyResults.has(error.result)) throw error;
        const kernel = lastKernel();
        lost = new CudaError(
          error.result,
          error.call,
          kernel ? `the last kernel queued was ${kernel}` : undefined,
        );
        throw lost;
      }
    };
  };
  const calls = Object.entries(api).map(([name, call]) => [name, guard(name, call)]);
  return Object.fromEntries(calls) as GpuApi;
}
