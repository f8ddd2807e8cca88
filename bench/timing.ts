// The few lines of statistics that every benchmark shares.
import type { Device } from '../engine/device.ts';

export interface Timing {
  /** Seconds. */
  median: number;
  min: number;
  max: number;
  runs: number;
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

export const timingOf = (seconds: readonly number[]): Timing => ({
  median: median(seconds),
  min: Math.min(...seconds),
  max: Math.max(...seconds),
  runs: seconds.length,
});

/** Wall-clock seconds of one call, with all that it has queued on the device. */
export function stopwatch(body: () => void, { driver }: Device): number {
  driver.synchronize?.();
  const began = performance.now();
  body();
  driver.synchronize?.();
  return (performance.now() - began) / 1000;
}
