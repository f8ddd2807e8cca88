// The programs for a machine with a GPU, proved on one without: a case that dies, hangs or loses the context is named and
// costs no other; what the time did not reach is told as not run; a wrong bit is a failure; and every instruction of our
// kernels has its micro-kernel.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { type Outcome, type Result, runSections, type Section } from '../bench/gpu/sections.ts';
import { expectedFiles } from '../engine/cuda/build.ts';
import { readPtx } from '../engine/cuda/kernels.ts';
import { packageRoot } from './golden.ts';
import { sameBits, ulps, within } from './gpu/agreement.ts';
import { microKernels, opcodesOf } from './gpu/micro.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-gpu-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

/** A child whose cases do what their labels say. */
const child = join(folder, 'child.mjs');
writeFileSync(
  child,
  `import { runCases } from ${JSON.stringify(join(packageRoot, 'dist', 'bench', 'gpu', 'sections.js'))};
import { CudaError } from ${JSON.stringify(join(packageRoot, 'dist', 'engine', 'cuda', 'errors.js'))};
const acts = {
  good: () => ({}),
  bad: () => ({ problem: 'off by one' }),
  dies() { console.error('illegal'); process.exit(3); },
  killed() { process.kill(process.pid, 'SIGKILL'); for (;;); },
  hangs() { for (;;); },
  lost() { throw new CudaError('CUDA_ERROR_ILLEGAL_ADDRESS', 'cuStreamSynchronize'); },
};
const labels = process.argv[2].split(',');
runCases({ name: 'all', cases: () => labels.map((label) => ({ label, run: acts[label] })) }, Number(process.argv.at(-1)));`,
);

async function outcomes(labels: string, limit = 60, caseLimit = 3): Promise<Outcome<Result>[]> {
  const all: Outcome<Result>[] = [];
  const run = () => ({});
  const section: Section<Result> = {
    name: 'all',
    cases: () => labels.split(',').map((label) => ({ label, run })),
  };
  const note = (outcome: Outcome<Result>) => void all.push(outcome);
  const args = [labels];
  await runSections({ script: child, args, sections: [section], jobs: 1, limit, caseLimit, note });
  return all;
}

const told = (all: readonly Outcome<Result>[]) =>
  all.map((each) => `${each.label} ${each.status}${each.status === 'ran' ? '' : `: ${each.problem}`}`);

test('a case that dies is named, and the others run', async (t) => {
  t.same(told(await outcomes('good,dies,bad,killed,good,lost,good')), [
    'good ran',
    'dies crashed: its process ended with status 3: illegal',
    'bad ran',
    'killed crashed: its process ended by SIGKILL',
    'good ran',
    'lost ran',
    'good ran',
  ]);
  const [lost] = await outcomes('lost');
  t.match(lost, { result: { problem: /CudaError: cuStreamSynchronize.*ILLEGAL_ADDRESS/ } });
});

test('a hang ends at its limit, and crashes have an end', async (t) => {
  t.same(told(await outcomes('hangs,good', 60, 1)), ['hangs crashed: no end after 1 seconds', 'good ran']);
  t.same(told(await outcomes('dies,dies,dies,dies,good')).slice(-2), [
    'dies crashed: its process ended with status 3: illegal',
    'good not run: 4 crashes in this section',
  ]);
});

test('what the time does not reach is not run', async (t) => {
  t.same(told(await outcomes('good,hangs,good', 2, 60)), [
    'good ran',
    'hangs not run: 2 seconds were over',
    'good not run: 2 seconds were over',
  ]);
});

test('agreement: equal bits, neighbours, bounds', (t) => {
  const bytes = (...values: number[]) => new Uint8Array(Float32Array.from(values).buffer);
  const bits = (...values: number[]) => new Uint8Array(Uint32Array.from(values).buffer);
  t.equal(sameBits('f32')(bytes(1, Number.NaN), bits(0x3f800000, 0x7fffffff)).problem, undefined);
  t.match(sameBits('f32')(bits(0x3f800001, 0), bytes(1, 0)), { problem: /1 of 2 elements.*worst, 0/ });
  t.match(sameBits('f32')(bytes(0), bytes(-0)), { problem: /1 of 1/ });
  t.match(sameBits('u32')(bits(1, 2), bits(1)), { problem: /2 elements, 1 on the virtual GPU/ });
  t.same(ulps('f32', 2)(bits(0x3f800002), bytes(1)), { error: 2 });
  t.same(ulps('f32', 2)(bits(0x80000001), bits(1)), { error: 2 });
  t.ok(ulps('f32', 2)(bits(0x3f800003), bytes(1)).problem);
  t.equal(within([0.5])(bytes(1.5), bytes(1)).problem, undefined);
  t.ok(within([0.4])(bytes(1.5), bytes(1)).problem);
  t.ok(within([9])(bytes(Number.NaN), bytes(1)).problem);
  t.ok(ulps('f32', 2)(bytes(Number.NaN), bytes(1)).problem);
  t.end();
});

test('every instruction of our kernels has a micro-kernel', (t) => {
  const covered = new Set(microKernels().flatMap(({ ptx }) => [...opcodesOf(ptx)]));
  const used = new Set(
    expectedFiles().flatMap(({ family, dtype }) => [...opcodesOf(readPtx(family, dtype))]),
  );
  t.ok(used.size > 100);
  t.same(
    [...used].filter((opcode) => !covered.has(opcode)),
    [],
  );
  t.end();
});

const run = (...args: string[]) =>
  spawnSync(process.execPath, [join(packageRoot, 'dist', 'test', 'gpu', 'run.js'), ...args], {
    encoding: 'utf8',
    timeout: 120_000,
  });

test('test:gpu on the virtual GPU', (t) => {
  const out = join(folder, 'out');
  const { status, stdout } = run('--device', 'virtual', '--only', 'micro warp,op slice', '--out', out);
  t.match(stdout, /micro warp +12 +12 +0 +0 +0 +0 /);
  t.match(stdout, /\d+ passed, 0 failed, 0 not run, 0 skipped\n$/);
  t.equal(status, 0);
  const { rows, totals, gpu, date, commit, driver } = JSON.parse(
    readFileSync(join(out, 'test-gpu.json'), 'utf8'),
  );
  t.equal(gpu, 'virtual GPU');
  t.ok(date && commit && driver);
  t.equal(rows.length, 4);
  const lines = readFileSync(join(out, 'test-gpu.jsonl'), 'utf8').trim().split('\n');
  t.equal(lines.length, totals.passed);
  const late = run('--device', 'virtual', '--only', 'op slice', '--out', out, '--limit', '0.01');
  t.match(late.stdout, /0 passed, 0 failed, \d+ not run/);
  t.equal(late.status, 1);
  t.match(run('--only', 'op slize', '--out', out), {
    status: 2,
    stderr: /no section begins with "op slize"/,
  });
  t.match(run('--device', 'tpu'), { status: 2, stderr: /unknown device "tpu"/ });
  t.end();
});
