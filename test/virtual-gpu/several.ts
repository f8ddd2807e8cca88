// Several virtual GPUs behind one driver: a call goes to the GPU whose context is current, and what it is given must be that
// GPU's own; but a copy may read another's memory, by itself where that GPU's pool is open to it. Who has waited for whom is
// kept account of (clocks.ts).
import type { Context, DevicePointer, Event, GpuApi, MemPool, Stream } from '../../engine/cuda/api.ts';
import { CudaError } from '../../engine/cuda/errors.ts';
import { cudaDevice } from '../../engine/device.ts';
import { type Account, type Clock, join, openAccount } from './clocks.ts';
import { failingGpu } from './failing.ts';
import { openVirtualGpu, type VirtualGpu, type VirtualGpuOptions } from './gpu.ts';

/** Calls that change the memory of their GPU, or may. */
const changing: ReadonlySet<string> = new Set<keyof GpuApi>([
  'cuMemFreeAsync',
  'cuMemcpyHtoDAsync',
  'cuMemsetD8Async',
  'cuLaunchKernel',
  'cuGraphLaunch',
]);

interface Member {
  readonly gpu: VirtualGpu;
  readonly account: Account;
  readonly context: Context;
  readonly pool: MemPool;
  /** To ask its GPU whether a stream is its own. */
  readonly event: Event;
  /** GPUs that its pool is open to. */
  readonly open: Set<number>;
}

const ARENA_BYTES = 2 ** 22;

export interface SeveralOptions extends VirtualGpuOptions {
  /** Whether a GPU can read another's memory by itself. */
  readonly peers?: boolean;
}

function openVirtualGpus(count: number, { peers = false, ...options }: SeveralOptions = {}): GpuApi {
  const members = Array.from({ length: count }, (_, index): Member => {
    const gpu = openVirtualGpu({ arenaBytes: ARENA_BYTES, ...options, place: index });
    return {
      gpu,
      account: openAccount(index, count),
      context: gpu.cuDevicePrimaryCtxRetain(0),
      pool: gpu.cuDeviceGetDefaultMemPool(0),
      event: gpu.cuEventCreate(0),
      open: new Set(),
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
  const byAddress = (address: DevicePointer): Member =>
    members[Math.floor(Number(address & 0xffffffffn) / (options.arenaBytes ?? ARENA_BYTES))];
  /** A copy from another GPU's memory into that of the current one. */
  const fetch = (call: string, target: DevicePointer, source: DevicePointer, bytes: number, from: Member) => {
    const to = here(call);
    const span = (begin: bigint) => ({ begin, end: begin + BigInt(bytes) });
    const carried = from.gpu.read(call, source, bytes);
    to.account.fetch(call, span(target), from.account, span(source));
    to.gpu.write(call, target, carried);
  };
  const ownStream = (call: string, stream: Stream) => {
    const { gpu, event } = here(call);
    gpu.cuStreamWaitEvent(stream, event);
  };
  const clockOf = (call: string, event: Event): Clock => {
    const clock = events.get(event);
    if (!clock) throw new CudaError('CUDA_ERROR_INVALID_HANDLE', call, 'no such event was recorded');
    return clock;
  };
  /** The host has waited for this. */
  const done = (clock: Clock): void => {
    for (const { account } of members) join(account.clock, clock);
  };
  const forward = Object.keys(members[0].gpu).map((name) => [
    name,
    (...args: unknown[]): unknown => {
      const member = here(name);
      if (changing.has(name)) member.account.work(name);
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
    cuDeviceCanAccessPeer: (device, peer) => peers && device !== peer,
    cuMemPoolSetAccess(pool, device) {
      const member = members.find((each) => each.pool === pool);
      if (!peers || !member) throw new CudaError('CUDA_ERROR_INVALID_VALUE', 'cuMemPoolSetAccess');
      member.open.add(device);
    },
    cuMemcpyDtoDAsync(target, source, bytes, stream) {
      const call = 'cuMemcpyDtoDAsync';
      const [member, from] = [here(call), byAddress(source)];
      if (from === member) {
        member.account.work(call);
        member.gpu.cuMemcpyDtoDAsync(target, source, bytes, stream);
        return;
      }
      ownStream(call, stream);
      if (!from.open.has(member.account.index))
        throw new CudaError(
          'CUDA_ERROR_INVALID_VALUE',
          call,
          'memory of a pool that is not open to this GPU',
        );
      fetch(call, target, source, bytes, from);
    },
    cuMemcpyPeerAsync(target, targetContext, source, sourceContext, bytes, stream) {
      const call = 'cuMemcpyPeerAsync';
      const from = byContext(call, sourceContext);
      ownStream(call, stream);
      if (byContext(call, targetContext) !== here(call))
        throw new CudaError('CUDA_ERROR_NOT_SUPPORTED', call, 'only targets copy here');
      fetch(call, target, source, bytes, from);
    },
    cuEventRecord(event, stream) {
      const { gpu, account } = here('cuEventRecord');
      gpu.cuEventRecord(event, stream);
      events.set(event, [...account.clock]);
    },
    cuStreamWaitEvent(stream, event) {
      ownStream('cuStreamWaitEvent', stream);
      join(here('cuStreamWaitEvent').account.clock, clockOf('cuStreamWaitEvent', event));
    },
    cuEventSynchronize(event) {
      here('cuEventSynchronize').gpu.cuEventSynchronize(event);
      done(clockOf('cuEventSynchronize', event));
    },
    cuStreamSynchronize(stream) {
      const { gpu, account } = here('cuStreamSynchronize');
      gpu.cuStreamSynchronize(stream);
      done(account.clock);
    },
    cuCtxSynchronize() {
      const { gpu, account } = here('cuCtxSynchronize');
      gpu.cuCtxSynchronize();
      done(account.clock);
    },
  };
}

export interface GpusOptions extends SeveralOptions {
  /** The driver as they are to have it. */
  readonly wrap?: (api: GpuApi) => GpuApi;
}

/** As many devices as GPUs, each behind a driver that can be told to fail. */
export function openGpus(count: number, { wrap = (api) => api, ...options }: GpusOptions = {}) {
  const api = wrap(openVirtualGpus(count, { memoryBytes: ARENA_BYTES, ...options }));
  const failing = Array.from({ length: count }, () => failingGpu(api));
  return { failing, devices: failing.map((gpu, ordinal) => cudaDevice(gpu.api, ordinal)) };
}
