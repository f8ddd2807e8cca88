// `npm run test:mutants [family...]`: every synchronisation mutant of the kernels (mutant_judge.ts), or of those families, a family
// in a storage type at a time. Survivors are told as they are found. Ends with a table, and with status 1 where of any family
// fewer than 95 % of the mutants die that are not listed as equivalent in mutants_equivalent.ts.
import { isMainThread, parentPort, Worker } from 'node:worker_threads';
import { Command } from 'commander';
import { expectedFiles } from '../../engine/cuda/build.ts';
import { storageTypes } from '../../engine/cuda/kernels.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { type Job, judge, unexplained, type Verdict } from './mutant_judge.ts';

const LEAST_KILLED = 0.95;

interface Options {
  readonly types: string;
  readonly kernels?: string;
  readonly jobs: number;
}

type Message = { verdict: Verdict } | { done: Job; seconds: number } | { failed: Job; problem: string };

interface Row {
  readonly job: Job;
  readonly verdicts: Verdict[];
  seconds: number;
  problem?: string;
}

/** Shares the jobs out to threads. */
async function judgeAll(jobs: readonly Job[], threads: number): Promise<Row[]> {
  const waiting = [...jobs];
  const rows: Row[] = [];
  const one = () =>
    new Promise<void>((resolve, reject) => {
      const worker = new Worker(new URL(import.meta.url));
      let row: Row;
      const next = () => {
        const job = waiting.shift();
        if (!job) return void worker.terminate().then(() => resolve());
        row = { job, verdicts: [], seconds: 0 };
        rows.push(row);
        worker.postMessage(job);
      };
      worker.on('error', reject);
      worker.on('message', (message: Message) => {
        if ('verdict' in message) {
          const { verdict } = message;
          row.verdicts.push(verdict);
          if (verdict.alive) console.log(`lives: ${verdict.kernel} ${verdict.mutant}`);
          return;
        }
        if ('failed' in message) row.problem = message.problem;
        else row.seconds = message.seconds;
        console.log(lineOf(row));
        next();
      });
      next();
    });
  await Promise.all(Array.from({ length: threads }, one));
  return rows;
}

/** Of the mutants that are not equivalent, how many there are and how many die. */
function countsOf(verdicts: readonly Verdict[]): { real: number; dead: number } {
  const dead = verdicts.filter((v) => !v.alive).length;
  return { real: dead + unexplained(verdicts).length, dead };
}

function lineOf({ job, verdicts, seconds, problem }: Row): string {
  const { real, dead } = countsOf(verdicts);
  const share = real ? `${((100 * dead) / real).toFixed(1)} %` : '';
  const name = `${job.family} ${job.dtype}`.padEnd(34);
  if (problem) return `${name} FAILED: ${problem}`;
  return `${name} ${verdicts.length} mutants, ${verdicts.length - real} equivalent, ${dead} of ${real} die ${share}, ${seconds.toFixed(0)} s`;
}

async function main(): Promise<void> {
  const command = new Command('test:mutants')
    .argument('[families...]', 'all where none is named')
    .option('--types <names>', 'storage types, comma-separated', storageTypes.join(','))
    .option('--kernels <pattern>', 'kernels whose names match this alone')
    .option('--jobs <count>', 'threads', Number, 2)
    .parse();
  const { types, kernels, jobs } = command.opts<Options>();
  const wanted = command.args;
  const all = expectedFiles()
    .filter(({ family }) => wanted.length === 0 || wanted.includes(family))
    .filter(({ dtype }) => types.split(',').includes(dtype))
    .map(({ family, dtype }) => ({ family, dtype: dtype as FloatDType, kernels }));
  const rows = (await judgeAll(all, jobs)).filter(({ verdicts, problem }) => verdicts.length || problem);
  for (const { kernel, mutant } of rows.flatMap(({ verdicts }) => unexplained(verdicts)))
    console.log(`not explained: ${kernel} ${mutant}`);
  for (const row of rows) console.log(lineOf(row));
  const { real, dead } = countsOf(rows.flatMap(({ verdicts }) => verdicts));
  const total = rows.reduce((sum, { verdicts }) => sum + verdicts.length, 0);
  console.log(
    `${total} mutants, ${real} not equivalent, ${dead} of those die (${((100 * dead) / Math.max(real, 1)).toFixed(1)} %)`,
  );
  const good = rows.every((row) => {
    const counts = countsOf(row.verdicts);
    return !row.problem && counts.dead >= LEAST_KILLED * counts.real;
  });
  process.exitCode = good && real > 0 ? 0 : 1;
}

if (isMainThread) await main();
else
  parentPort?.on('message', (job: Job) => {
    const tell = (message: Message) => parentPort?.postMessage(message);
    const started = Date.now();
    try {
      judge(job, (verdict) => tell({ verdict }));
      tell({ done: job, seconds: (Date.now() - started) / 1000 });
    } catch (error) {
      tell({ failed: job, problem: String(error) });
    }
  });
