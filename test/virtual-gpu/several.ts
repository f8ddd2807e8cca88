// Several virtual GPUs behind one driver: a call goes to the GPU whose context is current, and what it is given must be that
// GPU's own. Work is done when it is queued, so that copies between GPUs wait for each other is kept account of: each GPU counts
// its work (all its streams are taken for one), and knows how far it has waited for the others. A copy that may come before what
// is queued on its source, and work that may come before a copy from its memory has been made, are reports.
import type { Context, Event, GpuApi } from '../../engine/cuda/api.ts';
import { CudaError } from '../../engine/cuda/errors.ts';
import { cudaDevice } from '../../engine/device.ts';
import { failingGpu } from './failing.ts';
import { openVirtualGpu, type VirtualGpu, type VirtualGpuOptions } from './gpu.ts';
import { GpuReport } from './report.ts';

/** Calls that change the memory of their GPU, or may. */
const changing: ReadonlySet<string> = new Set<keyof GpuApi>([
  'cuMemFreeAsync',
  'cuMemcpyHtoDAsync',
  'cuMemcpyDtoDAsync',
  'cuMemsetD8Async',
  'cuLaunchKernel',
  'cuGraphLaunch',
]);

/** How much of each GPU's work is known to be done. */
type Clock = number[];

interface Member {
  readonly gpu: VirtualGpu;
  readonly index: number;
  readonly context: Context;
  /** To ask its GPU whether a stream is its own. */
  readonly event: Event;
  /** What its next work comes after; at its own place, how much it has queued. */
  readonly clock: Clock;
  /** Copies that read its memory: the work of another GPU. */
  readers: { index: number; at: number }[];
}

const join = (into: Clock, from: Clock): void => {
  for (const [i, at] of from.entries()) into[i] = Math.max(into[i], at);
};

export function openVirtualGpus(count: number, options: VirtualGpuOptions = {}): GpuApi {
  const members = Array.from({ length: count }, (_, index): Member => {
    const gpu = openVirtualGpu({ ...options, place: index });
    return {
      gpu,
      index,
      context: gpu.cuDevicePrimaryCtxRetain(0),
      event: gpu.cuEventCreate(0),
      clock: Array<number>(count).fill(0),
      readers: [],
    };
  });
  const events = new Map<Event, Clock>();
  let current: Member | undefined;
  const here = (call: string): Member => {
    if (!current) throw new CudaError('CUDA_ERROR_INVALID_CONTEXT', call, 'no context is current');
    return current;
  };
  const byOrdinal = (call: string, ordinal: number): VirtualGpu => {
    if (!members[ordinal]) throw new CudaError('CUDA_ERROR_INVALID_DEVICE', call);
    return members[ordinal].gpu;
  };
  const byContext = (call: string, context: Context): Member => {
    const found = members.find((member) => member.context === context);
    if (!found) throw new CudaError('CUDA_ERROR_INVALID_CONTEXT', call, 'no such context');
    return found;
  };
  /** Counts work that changes memory, once nobody reads there. */
  const change = (member: Member, call: string): number => {
    const early = member.readers.find(({ index, at }) => member.clock[index] < at);
    if (early)
      throw new GpuReport(
        'race',
        `${call} on GPU ${member.index} does not wait for GPU ${early.index}'s copy`,
      );
    member.readers = [];
    return ++member.clock[member.index];
  };
  const clockOf = (call: string, event: Event): Clock => {
    const clock = events.get(event);
    if (!clock) throw new CudaError('CUDA_ERROR_INVALID_HANDLE', call, 'no such event was recorded');
    return clock;
  };
  /** The host has waited for this. */
  const done = (clock: Clock): void => {
    for (const member of members) join(member.clock, clock);
  };
  const forward = Object.keys(members[0].gpu).map((name) => [
    name,
    (...args: unknown[]): unknown => {
      const member = here(name);
      if (changing.has(name)) change(member, name);
      return (member.gpu as unknown as Record<string, (...args: unknown[]) => unknown>)[name](...args);
    },
  ]);
  const api = Object.fromEntries(forward) as GpuApi;
  return {
    ...api,
    cuDriverGetVersion: () => members[0].gpu.cuDriverGetVersion(),
    cuDeviceGetCount: () => count,
    cuDeviceGetName: (ordinal) => byOrdinal('cuDeviceGetName', ordinal).cuDeviceGetName(0),
    cuDeviceTotalMem: (ordinal) => byOrdinal('cuDeviceTotalMem', ordinal).cuDeviceTotalMem(0),
    cuDeviceGetAttribute: (attribute, ordinal) =>
      byOrdinal('cuDeviceGetAttribute', ordinal).cuDeviceGetAttribute(attribute, 0),
    cuDeviceGetDefaultMemPool: (ordinal) =>
      byOrdinal('cuDeviceGetDefaultMemPool', ordinal).cuDeviceGetDefaultMemPool(0),
    cuDevicePrimaryCtxRetain(ordinal) {
      byOrdinal('cuDevicePrimaryCtxRetain', ordinal);
      return members[ordinal].context;
    },
    cuDevicePrimaryCtxRelease: () => undefined,
    cuCtxSetCurrent(context) {
      current = byContext('cuCtxSetCurrent', context);
    },
    cuMemcpyPeerAsync(target, targetContext, source, sourceContext, bytes, stream) {
      const call = 'cuMemcpyPeerAsync';
      const [to, from] = [byContext(call, targetContext), byContext(call, sourceContext)];
      const member = here(call);
      member.gpu.cuStreamWaitEvent(stream, member.event);
      if (to !== member) throw new CudaError('CUDA_ERROR_NOT_SUPPORTED', call, 'only targets copy here');
      if (member.clock[from.index] < from.clock[from.index])
        throw new GpuReport('race', `${call} does not wait for what is queued on GPU ${from.index}`);
      to.gpu.write(call, target, from.gpu.read(call, source, bytes));
      from.readers.push({ index: member.index, at: change(member, call) });
    },
    cuEventRecord(event, stream) {
      const { gpu, clock } = here('cuEventRecord');
      gpu.cuEventRecord(event, stream);
      events.set(event, [...clock]);
    },
    cuStreamWaitEvent(stream, event) {
      const { gpu, clock, event: own } = here('cuStreamWaitEvent');
      gpu.cuStreamWaitEvent(stream, own);
      join(clock, clockOf('cuStreamWaitEvent', event));
    },
    cuEventSynchronize(event) {
      here('cuEventSynchronize').gpu.cuEventSynchronize(event);
      done(clockOf('cuEventSynchronize', event));
    },
    cuStreamSynchronize(stream) {
      const { gpu, clock } = here('cuStreamSynchronize');
      gpu.cuStreamSynchronize(stream);
      done(clock);
    },
    cuCtxSynchronize() {
      const { gpu, clock } = here('cuCtxSynchronize');
      gpu.cuCtxSynchronize();
      done(clock);
    },
  };
}

/** As many devices as GPUs, each behind a driver that can be told to fail. */
export function openGpus(count: number, wrap: (api: GpuApi) => GpuApi = (api) => api) {
  const api = wrap(openVirtualGpus(count, { arenaBytes: 2 ** 22, memoryBytes: 2 ** 22 }));
  const failing = Array.from({ length: count }, () => failingGpu(api));
  return { failing, devices: failing.map((gpu, ordinal) => cudaDevice(gpu.api, ordinal)) };
}
