// What a call costs of the processor, for tests that hold a bound on it.

/** Microseconds that an op may take from JavaScript. */
export const BOUND = 10;

/** Rounds at least, and at most: seconds of bad luck with what else runs on this machine. */
const [FEWEST, MOST] = [20, 200];

/**
 * Microseconds of one of `count` calls: the process's own time, and of many rounds the fastest, as others run on this machine too.
 * While none is within the bound, there are more rounds.
 */
export function processorTime(count: number, run: () => void): number {
  let fastest = Number.POSITIVE_INFINITY;
  for (let round = 0; round < FEWEST || (fastest >= BOUND && round < MOST); round++) {
    const began = process.cpuUsage();
    for (let i = 0; i < count; i++) run();
    const { user, system } = process.cpuUsage(began);
    fastest = Math.min(fastest, (user + system) / count);
  }
  return fastest;
}
