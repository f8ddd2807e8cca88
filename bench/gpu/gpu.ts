// What the benchmarks of this folder run on, and what each of them gives.
import type { GpuApi } from '../../engine/cuda/api.ts';
import { cudaDevice, type Device } from '../../engine/device.ts';
import type { Case, Result } from './sections.ts';

export interface BenchGpu {
  readonly api: GpuApi;
  readonly ordinal: number;
  readonly device: Device;
}

/** The same GPU, where each launch waits for all that came before: no programmatic dependent launch. */
export function withoutPdl({ api, ordinal }: BenchGpu): BenchGpu {
  const plain: GpuApi = {
    ...api,
    cuLaunchKernel: (kernel, grid, block, shared, stream, parameters, offsets, { cluster } = {}) =>
      api.cuLaunchKernel(kernel, grid, block, shared, stream, parameters, offsets, { cluster }),
  };
  return { api: plain, ordinal, device: cudaDevice(plain, ordinal) };
}

/** Microseconds of one call. */
export interface Timing {
  /** Median of the replays, or of the launches where there is no graph. */
  us: number;
  p10: number;
  p90: number;
  samples: number;
  /** How far the medians of the run's two halves lie apart. */
  drift_pct: number;
  /** Launched one by one: device time between events, and the host's own time for the launch. */
  eager_us?: number;
  launch_us?: number;
}

/** What is compared with another program's measurement of the same thing. */
export type Key = Readonly<Record<string, string | number | boolean>>;

export interface Measure extends Result {
  name: string;
  key: Key;
  timing: Timing;
  /** Calls in one pass of the model. */
  count?: number;
  flops?: number;
  /** Read once and written once. */
  bytes?: number;
  /** Against float32 on the same device. */
  rel_err?: number;
  /** Other figures, each under a name with its unit. */
  more?: Readonly<Record<string, number>>;
}

export type BenchCase = Case<Measure>;
