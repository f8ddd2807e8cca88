// Host memory, which copies use while the program goes on. Work on the virtual GPU is done when it is queued, so the copy's
// lateness is played: what a copy reads must not have changed, and what it writes is rubbish, until its stream or an event
// recorded after it is waited for. That ordinary memory is mostly copied before the call returns is not promised ("might be
// synchronous with respect to the host"), so it is no better here than pinned memory.
import { GpuReport } from './report.ts';

/** What the host sees of a download that has not been waited for. */
const RUBBISH = 0xcb;

interface Copy {
  readonly memory: Uint8Array;
  readonly bytes: Uint8Array;
  readonly direction: 'up' | 'down';
}

export interface HostMemory {
  pin(bytes: number): Uint8Array;
  unpin(memory: Uint8Array): void;
  /** A copy from `source` was queued. */
  reads(source: Uint8Array, stream: bigint): void;
  /** A copy of `bytes` to `target` was queued. */
  writes(target: Uint8Array, bytes: Uint8Array, stream: bigint): void;
  /** Copies queued so far on a stream. */
  queued(stream: bigint): number;
  /** The first `count` copies of a stream, or all, are over. */
  settle(stream: bigint, count?: number): void;
  settleAll(): void;
}

export function openHostMemory(): HostMemory {
  const pinned = new Set<ArrayBufferLike>();
  const streams = new Map<bigint, { done: number; pending: Copy[] }>();
  const stateOf = (stream: bigint) => {
    const state = streams.get(stream) ?? { done: 0, pending: [] };
    streams.set(stream, state);
    return state;
  };
  const settle = (stream: bigint, count = Number.POSITIVE_INFINITY): void => {
    const state = stateOf(stream);
    while (state.done < count && state.pending.length) {
      finish(state.pending.shift() as Copy);
      state.done++;
    }
  };
  return {
    pin(bytes) {
      const memory = new Uint8Array(bytes);
      pinned.add(memory.buffer);
      return memory;
    },
    unpin(memory) {
      if (!pinned.delete(memory.buffer)) throw new GpuReport('invalid free', 'cuMemFreeHost: not pinned');
    },
    reads(memory, stream) {
      stateOf(stream).pending.push({ memory, bytes: memory.slice(), direction: 'up' });
    },
    writes(memory, bytes, stream) {
      memory.fill(RUBBISH);
      stateOf(stream).pending.push({ memory, bytes, direction: 'down' });
    },
    queued(stream) {
      const { done, pending } = stateOf(stream);
      return done + pending.length;
    },
    settle,
    settleAll() {
      for (const stream of streams.keys()) settle(stream);
    },
  };
}

function finish({ memory, bytes, direction }: Copy): void {
  if (direction === 'down') memory.set(bytes);
  else if (Buffer.compare(memory, bytes) !== 0)
    throw new GpuReport('race', 'the host wrote memory that a copy to the GPU was still reading');
}
