// The few lines of statistics that every benchmark shares.

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

/** Wall-clock seconds of one call. */
export function stopwatch(body: () => void): number {
  const began = performance.now();
  body();
  return (performance.now() - began) / 1000;
}

/** Runs `body` once to warm up, then `runs` times. */
export function timed(runs: number, body: () => void, onRun?: (run: number) => void): Timing {
  body();
  onRun?.(0);
  const seconds: number[] = [];
  for (let run = 1; run <= runs; run++) {
    seconds.push(stopwatch(body));
    onRun?.(run);
  }
  return timingOf(seconds);
}
