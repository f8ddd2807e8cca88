// `npm run test:mutants [family...]`: every synchronisation mutant of the kernels (mutant_judge.ts), or of those families, on two
// threads, a family in a storage type at a time. Ends with status 1 where fewer than 95 % of the mutants die that are not
// listed as equivalent in mutants_equivalent.ts.
import { isMainThread, parentPort, Worker } from 'node:worker_threads';
import { expectedFiles } from '../engine/cuda/build.ts';
import type { FloatDType } from '../io/dtype.ts';
import { isEquivalent, type Job, judge, type Verdict } from './mutant_judge.ts';

const LEAST_KILLED = 0.95;

/** Shares the jobs out to two threads. */
async function judgeAll(jobs: Job[]): Promise<Verdict[]> {
  const verdicts: Verdict[] = [];
  const one = () =>
    new Promise<void>((resolve, reject) => {
      const worker = new Worker(new URL(import.meta.url));
      const next = () => {
        const job = jobs.shift();
        if (job) worker.postMessage(job);
        else void worker.terminate().then(() => resolve());
      };
      worker.on('error', reject);
      worker.on('message', ({ found, job, seconds }: { found: Verdict[]; job: Job; seconds: number }) => {
        const alive = found.filter((v) => v.alive);
        console.log(
          `${job.family} ${job.dtype}: ${alive.length} of ${found.length} survive, ${seconds.toFixed(0)} s`,
        );
        for (const { kernel, mutant } of alive) console.log(`  ${kernel} ${mutant}`);
        verdicts.push(...found);
        next();
      });
      next();
    });
  await Promise.all([one(), one()]);
  return verdicts;
}

async function main(wanted: readonly string[]): Promise<void> {
  const jobs = expectedFiles()
    .filter(({ family }) => wanted.length === 0 || wanted.includes(family))
    .map(({ family, dtype }) => ({ family, dtype: dtype as FloatDType }));
  const verdicts = await judgeAll(jobs);
  const alive = verdicts.filter((v) => v.alive);
  const unexplained = alive.filter((v) => !isEquivalent(v));
  const real = verdicts.length - (alive.length - unexplained.length);
  for (const { kernel, mutant } of unexplained) console.log(`not explained: ${kernel} ${mutant}`);
  const killed = (real - unexplained.length) / Math.max(real, 1);
  console.log(
    `${verdicts.length} mutants, ${real} not equivalent, ${real - unexplained.length} of those die (${(100 * killed).toFixed(1)} %)`,
  );
  process.exitCode = killed >= LEAST_KILLED && verdicts.length > 0 ? 0 : 1;
}

if (isMainThread) await main(process.argv.slice(2));
else
  parentPort?.on('message', (job: Job) => {
    const started = Date.now();
    const found = judge(job);
    parentPort?.postMessage({ found, job, seconds: (Date.now() - started) / 1000 });
  });
