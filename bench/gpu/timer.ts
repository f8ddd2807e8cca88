// Device time of a call by CUDA events: in a graph, where the host does not show, and launched one by one, as a caller without
// a graph has it. Calls rotate over several sets of buffers, together larger than three times the L2 cache.
import { DeviceAttribute, type Event, type GpuApi, type Stream } from '../../engine/cuda/api.ts';
import type { CudaDriver } from '../../engine/cuda/device.ts';
import type { Replay } from '../../engine/driver.ts';
import { median } from '../timing.ts';
import type { BenchGpu, Timing } from './gpu.ts';

export interface Timer {
  /** Sets of buffers to rotate over, when one is this large. */
  setsFor(bytes: number): number;
  /** Times `call(set)`, which must only launch, on memory that its first run has taken. */
  time(sets: number, call: (set: number) => void, options?: { samples?: number; restMs?: number }): Timing;
  /** Times work that cannot be captured, or captures itself. */
  events(samples: number, work: () => void): Timing;
  sync(): void;
}

/**
 * Replays of a timing, at least; about how long a graph is, and how many calls it has at most. They are few, and the GPU rests before
 * them, as with the peer's: a large product that has run for some 50 ms is slowed by 10 % and more, for its power.
 */
const SAMPLES = 12;
const REST_MS = 100;
const GRAPH_US = 1000;
const MOST_CALLS = 400;
const DEFAULT_L2 = 50 * 2 ** 20;

export function openTimer({ api, ordinal, device }: BenchGpu, smoke: boolean): Timer {
  const driver = device.driver as CudaDriver & { capture(queue: () => void): Replay };
  const l2 = api.cuDeviceGetAttribute(DeviceAttribute.L2_CACHE_SIZE, ordinal) || DEFAULT_L2;
  const { sync, between } = marksIn(driver.stream, api);
  const rest = (ms: number) => {
    sync();
    if (!smoke) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms);
  };
  return {
    sync,
    setsFor: (bytes) => (smoke ? 2 : Math.max(2, Math.min(64, Math.ceil((3 * l2) / bytes)))),
    time(sets, call, { samples = SAMPLES, restMs = REST_MS } = {}) {
      for (let set = 0; set < sets; set++) call(set);
      sync();
      const estimate = Math.max(0.5, between(3, () => call(0))[2]);
      const rounds = smoke ? 1 : Math.ceil(Math.min(GRAPH_US / estimate, MOST_CALLS) / sets);
      const calls = sets * Math.max(1, rounds);
      const graph = driver.capture(() => {
        for (let i = 0; i < calls; i++) call(i % sets);
      });
      rest(restMs);
      between(2, graph.launch);
      const replayed = between(smoke ? 2 : samples, graph.launch).map((us) => us / calls);
      graph.release();
      const began = performance.now();
      let launch = 0;
      const [eager] = between(1, () => {
        for (let i = 0; i < calls; i++) call(i % sets);
        launch = ((performance.now() - began) * 1000) / calls;
      });
      return { ...summary(replayed), eager_us: eager / calls, launch_us: launch };
    },
    events: (samples, work) => summary(between(smoke ? 1 : samples, work)),
  };
}

/** Events in a stream, kept for the next timing. */
function marksIn(stream: Stream, api: GpuApi) {
  const marks: Event[] = [];
  const mark = (i: number): void => {
    marks[i] ??= api.cuEventCreate(0);
    api.cuEventRecord(marks[i], stream);
  };
  const sync = () => api.cuStreamSynchronize(stream);
  /** Microseconds between one mark and the next of `count` runs of `work`. */
  const between = (count: number, work: () => void): number[] => {
    mark(0);
    for (let i = 1; i <= count; i++) {
      work();
      mark(i);
    }
    sync();
    return Array.from({ length: count }, (_, i) => api.cuEventElapsedTime(marks[i], marks[i + 1]) * 1000);
  };
  return { sync, between };
}

function summary(us: readonly number[]): Timing {
  const sorted = [...us].sort((a, b) => a - b);
  const at = (part: number) => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * part))];
  const half = us.length >> 1;
  const [first, second] = half ? [median(us.slice(0, half)), median(us.slice(half))] : [1, 1];
  const drift = (100 * Math.abs(first - second)) / Math.min(first, second);
  return { us: median(us), p10: at(0.1), p90: at(0.9), samples: us.length, drift_pct: drift || 0 };
}
