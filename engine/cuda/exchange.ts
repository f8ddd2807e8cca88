// A GPU's queue as other GPUs see it: events in its stream, and copies out of their memory. Where the hardware lets one GPU read
// another's memory (NVLink, or PCIe where the driver allows it) the other's pool is opened to it at the first copy, and bytes go
// straight; else the driver carries them through the host's memory. Memory of a pool goes by the pool's own leave, not by
// cuCtxEnablePeerAccess.
import type { Exchange } from '../driver.ts';
import { type Context, DISABLE_TIMING, type Event, type GpuApi, type MemPool, type Stream } from './api.ts';
import { CudaError } from './errors.ts';

/** What a GPU is to others. */
interface Gpu {
  readonly api: GpuApi;
  readonly ordinal: number;
  readonly context: Context;
  readonly pool: MemPool;
  readonly stream: Stream;
}

const gpus = new WeakMap<Exchange, Gpu>();

/** `check` throws where nothing may be copied now. */
export function openExchange(gpu: Gpu, check: () => void): Exchange {
  const { api, ordinal, context, stream } = gpu;
  let marker: Event | undefined;
  /** Whether this GPU reads that one's memory by itself. */
  const reached = new Map<Gpu, boolean>();
  const reaches = (other: Gpu): boolean => {
    const known = reached.get(other);
    if (known !== undefined) return known;
    const can = api.cuDeviceCanAccessPeer(ordinal, other.ordinal) && opened(other);
    reached.set(other, can);
    return can;
  };
  const opened = (other: Gpu): boolean => {
    try {
      other.api.cuMemPoolSetAccess(other.pool, ordinal);
      return true;
    } catch (error) {
      // Too many peers, for one; if a GPU is lost the next call says so.
      if (error instanceof CudaError) return false;
      throw error;
    }
  };
  const exchange: Exchange = {
    mark() {
      check();
      marker ??= api.cuEventCreate(DISABLE_TIMING);
      api.cuEventRecord(marker, stream);
      return marker;
    },
    after(mark) {
      check();
      api.cuStreamWaitEvent(stream, mark);
    },
    copy(to, from, source, bytes) {
      check();
      const other = gpus.get(source);
      if (!other) throw new Error('a GPU copies from GPUs');
      if (reaches(other)) api.cuMemcpyDtoDAsync(to.address, from.address, bytes, stream);
      else api.cuMemcpyPeerAsync(to.address, context, from.address, other.context, bytes, stream);
    },
    finish: () => api.cuStreamSynchronize(stream),
  };
  gpus.set(exchange, gpu);
  return exchange;
}
