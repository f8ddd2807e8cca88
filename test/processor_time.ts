// What a call costs of the processor, for tests that hold a bound on it.

/**
 * Microseconds of one of `count` calls: the process's own time, and of many rounds the fastest, as others run on this machine too.
 */
export function processorTime(count: number, run: () => void): number {
  const rounds = Array.from({ length: 20 }, () => {
    const began = process.cpuUsage();
    for (let i = 0; i < count; i++) run();
    const { user, system } = process.cpuUsage(began);
    return (user + system) / count;
  });
  return Math.min(...rounds);
}
