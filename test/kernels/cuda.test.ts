// The cuda device on the virtual GPU: every op of the registry against the reference, in each storage type, through the
// same allocator, plans, launches and PTX that a real GPU gets (kernel_proof.ts). Every kernel of every PTX file has to be met:
// at three shapes or more, under three schedules, and with nearly all of its text.
import { Worker } from 'node:worker_threads';
import { test } from 'tap';
import { expectedFiles } from '../../engine/cuda/build.ts';
import { forHopper, readPtx, storageTypes } from '../../engine/cuda/kernels.ts';
import { readManifest } from '../../engine/cuda/manifest.ts';
import { plans } from '../../engine/cuda/plans.ts';
import { noLibrary, openNative } from '../support/native_library.ts';
import { type Coverage, mergeCoverage } from '../virtual-gpu/coverage.ts';
import { schedules } from '../virtual-gpu/run_kernel.ts';
import { type Check, type Job, provableOps, type Summary } from './kernel_proof.ts';

const SHAPES = 3;
const SCHEDULES = 3;
/** Of the basic blocks: of all kernels for a path together, and of each one for Hopper, whose rare turns are the point of it. */
const LEAST_COVERED = 0.95;

const kernelsOf = ({ family, dtype }: { family: string; dtype: string }): string[] => [
  ...readManifest(readPtx(family, dtype)).keys(),
];
const hopperKernels = new Set(
  expectedFiles()
    .filter(({ family }) => forHopper(family))
    .flatMap(kernelsOf),
);

const blocksOf = (own: readonly Coverage[]): number => own.reduce((sum, { blocks }) => sum + blocks, 0);
const missedOf = (own: readonly Coverage[]): number => own.reduce((sum, { missed }) => sum + missed.size, 0);
const shareOf = (own: readonly Coverage[]): number => 1 - missedOf(own) / blocksOf(own);
const ranOf = (own: readonly Coverage[]): string => `${blocksOf(own) - missedOf(own)} of ${blocksOf(own)}`;

/** Per kernel, the source lines of the blocks that never ran. */
const missedBlocks = (coverage: readonly Coverage[]): string[] =>
  coverage
    .filter(({ missed }) => missed.size)
    .map(
      ({ kernel, blocks, missed }) =>
        `${kernel} misses ${missed.size} of ${blocks}: ${[...new Set(missed.values())].join(', ')}`,
    );

/** Runs jobs on two threads, each taking the next when it is done, and gathers what they found. */
async function share(jobs: Job[], onChecks: (checks: Check[]) => void): Promise<Summary[]> {
  const one = () =>
    new Promise<Summary>((resolve, reject) => {
      const worker = new Worker(new URL('./kernel_worker.js', import.meta.url));
      const next = () => worker.postMessage(jobs.shift());
      worker.on('error', reject);
      worker.on('message', (answer: Check[] | Summary) => {
        if (Array.isArray(answer)) {
          onChecks(answer);
          next();
        } else {
          resolve(answer);
          void worker.terminate();
        }
      });
      next();
    });
  return Promise.all([one(), one()]);
}

test('every op and every kernel on the virtual GPU', async (t) => {
  // The longest first, so that the threads end together.
  const ops = [...new Set(['conv2d', 'linear', 'attention', ...provableOps])];
  const jobs = ops.flatMap((op) => storageTypes.map((dtype) => ({ op, dtype })));
  const summaries = await share(jobs, (checks) => {
    for (const { name, problem } of checks) t.equal(problem, undefined, name);
  });
  t.ok(schedules.length >= SCHEDULES);
  for (const kernel of expectedFiles().flatMap(kernelsOf)) {
    const shapes = new Set(summaries.flatMap(({ meetings }) => [...(meetings.get(kernel) ?? [])]));
    t.ok(shapes.size >= SHAPES, `${kernel} met ${shapes.size} shapes under ${schedules.length} schedules`);
  }
  const covered = mergeCoverage(summaries.flatMap(({ coverage }) => coverage));
  for (const path of ['Ampere', 'Hopper']) {
    const own = covered.filter(({ kernel }) => hopperKernels.has(kernel) === (path === 'Hopper'));
    const message = `${path}: ${ranOf(own)} basic blocks of PTX ran`;
    t.comment(message);
    t.ok(shareOf(own) >= LEAST_COVERED, message);
    for (const line of missedBlocks(shareOf(own) < LEAST_COVERED || path === 'Hopper' ? own : []))
      t.comment(line);
  }
  for (const one of covered.filter(({ kernel }) => hopperKernels.has(kernel)))
    t.ok(shareOf([one]) >= LEAST_COVERED, `${one.kernel}: ${ranOf([one])} basic blocks ran`);
  const { user, system } = process.cpuUsage();
  t.comment(`${Math.round((user + system) / 1e6)} s of processor time, shared by two threads`);
  t.end();
});

test('every kernel of the CPU library is planned, with the same parameters', { skip: noLibrary }, (t) => {
  const entries = new Map(
    expectedFiles().flatMap(({ family, dtype }) => [...readManifest(readPtx(family, dtype))]),
  );
  for (const [symbol, signature] of openNative().symbols) {
    const plan = plans.get(symbol.slice(0, symbol.lastIndexOf('_')));
    const own = entries
      .get(symbol)
      ?.parameters.map(({ kind }) => kind)
      .join('');
    t.equal(plan && (plan.signature ?? own), signature, symbol);
  }
  t.end();
});

test('the committed PTX is made from the committed sources', (t) => {
  for (const { family, dtype, digest } of expectedFiles()) {
    t.ok(readPtx(family, dtype).split('\n')[0].includes(digest), `${family} ${dtype}`);
  }
  t.end();
});
