// The programs for a machine with a GPU, proved on one without: a case that dies, hangs or loses the context is named and
// costs no other; what the time did not reach is told as not run; a wrong bit is a failure; and every instruction of our
// kernels has its micro-kernel.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { type Compared, compared, type Peer } from '../../bench/gpu/compare.ts';
import type { Key, Measure } from '../../bench/gpu/gpu.ts';
import { totalOf } from '../../bench/gpu/report.ts';
import { type Outcome, type Result, runSections, type Section } from '../../bench/gpu/sections.ts';
import { tuneSection } from '../../bench/gpu/tune.ts';
import { expectedFiles } from '../../engine/cuda/build.ts';
import { readPtx } from '../../engine/cuda/kernels.ts';
import { type Choice, type ProductKind, tilesOf } from '../../engine/cuda/plan_sm90.ts';
import { sameBits, ulps, within } from '../gpu/agreement.ts';
import { golden } from '../gpu/checks.ts';
import { microKernels, opcodesOf } from '../gpu/micro.ts';
import { packageRoot } from '../support/golden.ts';

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

async function outcomes(labels: string, limit = 60, caseLimit = 3, own?: number): Promise<Outcome<Result>[]> {
  const all: Outcome<Result>[] = [];
  const run = () => ({});
  const section: Section<Result> = {
    name: 'all',
    caseLimit: own,
    cases: () => labels.split(',').map((label) => ({ label, run })),
  };
  const note = (outcome: Outcome<Result>) => void all.push(outcome);
  const args = [labels];
  await runSections({ script: child, args, sections: [section], jobs: 1, limit, caseLimit, note });
  return all;
}

const told = (all: readonly Outcome<Result>[]) =>
  all.map((each) => `${each.label} ${each.status}${each.status === 'ran' ? '' : `: ${each.problem}`}`);

test('the tests that run on the device are there', (t) => {
  for (const file of golden) t.ok(existsSync(join(packageRoot, 'dist', 'test', file)), file);
  t.end();
});

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
  const named = ['hangs crashed: no end after 1 seconds', 'good ran'];
  t.same(told(await outcomes('hangs,good', 60, 1)), named);
  t.same(told(await outcomes('hangs,good', 60, 60, 1)), named, "the section's own limit");
  t.same(told(await outcomes('dies,dies,dies,dies,good')).slice(-2), [
    'dies crashed: its process ended with status 3: illegal',
    'good not run: 4 crashes in this section',
  ]);
});

test('what the time does not reach is not run', async (t) => {
  t.same(told(await outcomes('good,hangs,good', 8, 60)), [
    'good ran',
    'hangs not run: 8 seconds were over',
    'good not run: 8 seconds were over',
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
  const { status, stdout } = run('--device', 'virtual', '--only', 'micro warp,op slice,order', '--out', out);
  t.match(stdout, /micro warp +13 +13 +0 +0 +0 +0 /);
  t.match(stdout, /\d+ passed, 0 failed, 0 not run, 2 skipped\n$/, 'the base UNet is left out there');
  t.equal(status, 0);
  const { rows, totals, gpu, date, commit, driver } = JSON.parse(
    readFileSync(join(out, 'test-gpu.json'), 'utf8'),
  );
  t.equal(gpu, 'virtual GPU');
  t.ok(date && commit && driver);
  t.equal(rows.length, 5);
  const lines = readFileSync(join(out, 'test-gpu.jsonl'), 'utf8').trim().split('\n');
  t.equal(lines.length, totals.passed + totals.skipped);
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

const bench = (...args: string[]) =>
  spawnSync(process.execPath, [join(packageRoot, 'dist', 'test', 'gpu', 'bench.js'), ...args], {
    encoding: 'utf8',
    timeout: 120_000,
  });

test('bench:gpu on the virtual GPU, beside a peer', (t) => {
  const out = join(folder, 'bench');
  const peer = join(folder, 'peer.json');
  const rows = [
    { section: 'norm', name: 'group_norm eager', b: 2, c: 16, h: 4, w: 4, silu: true, us: 9 },
    { section: 'norm', name: 'group_norm compiled', b: 2, c: 16, h: 4, w: 4, silu: true, us: 8, graph_us: 4 },
  ];
  writeFileSync(peer, JSON.stringify({ meta: { torch: '2.11', gpu: 'none' }, results: rows }));
  const args = ['--device', 'virtual', '--smoke', '--only', 'copy,norm,adamw', '--out', out, '--peer', peer];
  const { status, stdout } = bench(...args);
  t.match(stdout, /\d+ measured, 0 failed, 0 not run\n$/);
  t.equal(status, 0);
  const record = JSON.parse(readFileSync(join(out, 'ours.json'), 'utf8'));
  const beside = record.rows.filter((row: Compared) => row.theirs_us !== undefined);
  t.match(beside, [{ section: 'norm', theirs: 'group_norm compiled', theirs_us: 4 }]);
  t.equal(beside[0].ratio, beside[0].ours_us / 4);
  t.ok(beside[0].rel_err > 0 && beside[0].rel_err < 1e-2);
  t.match(readFileSync(join(out, 'report.md'), 'utf8'), /# tiny at 32x32 on virtual GPU[\s\S]*PyTorch 2\.11/);
  t.end();
});

test('bench:gpu --tune: each kind of product by every tile, and a table that --choices reads', (t) => {
  const out = join(folder, 'tune');
  const tuned = bench('--device', 'virtual', '--smoke', '--tune', '--out', out);
  t.match(tuned.stdout, /8 measured, 0 failed, 0 not run\n$/);
  t.equal(tuned.status, 0);
  const choices = JSON.parse(readFileSync(join(out, 'choices.json'), 'utf8'));
  t.same(
    Object.keys(choices)
      .map((key) => key.split(' ')[0])
      .sort(),
    ['backward_weight', 'backward_x', 'forward', 'geglu', 'nn', 'nt', 'projections', 'tn'],
  );
  for (const [key, { tile, splits }] of Object.entries<Choice>(choices)) {
    t.ok(tilesOf[key.split(' ')[0] as ProductKind].includes(tile), `${key}: ${tile}`);
    t.equal(splits, 1);
  }
  const table = ['--choices', join(out, 'choices.json')];
  const again = bench('--device', 'virtual', '--smoke', '--only', 'ln', '--out', out, ...table);
  t.match(again.stdout, /4 measured, 0 failed, 0 not run\n$/);
  t.end();
});

test('bench:gpu --tune: what it tries at the size of SDXL', (t) => {
  const noGpu = () => {
    throw new Error('products are listed without a GPU');
  };
  const scale = { preset: 'sdxl-base', side: 1024, smoke: false };
  const labels = tuneSection(noGpu, scale)
    .cases()
    .map(({ label }) => label);
  t.equal(new Set(labels).size, labels.length);
  for (const key of [
    'nt 8192 640 10 1',
    'geglu 2048 5120 20 1',
    'projections 2048 1280 20 3', // q, k and v
    'projections 154 1280 32 2', // k and v of the text
    'nn 32768 640 80 1', // training has eight images
    'tn 10240 1280 128 1',
    'nt 8192 8192 128 1', // of no model
    'forward 32768 320 45 1', // a resnet's 3x3
    'forward 8192 320 45 1', // of stride 2
    'forward 8192 640 5 1', // a shortcut's 1x1
    'forward 8192 640 40 1', // an upsampler's 2x2, as sampling has it
    'forward 131072 640 90 1', // and its 3x3, as training has it
    'backward_x 131072 640 90 1',
    'backward_weight 640 640 2048 9',
  ])
    t.ok(labels.includes(key), key);
  t.notOk(labels.includes('backward_x 32768 640 40 1'), 'no gradient goes through the 2x2');
  t.end();
});

const measured = (key: Key, us: number, more: Partial<Measure> = {}): Measure => ({
  name: 'ours',
  key,
  timing: { us, p10: us, p90: us, samples: 50, drift_pct: 0 },
  ...more,
});

test("a peer's rows are found by shape, the fastest of them counts", (t) => {
  const shape = { b: 2, h: 10, lq: 4096, lk: 4096, d: 64 };
  const product = { m: 8192, n: 5120, k: 640, bias: true };
  const peer: Peer = {
    meta: {},
    results: [
      { section: 'sdpa', name: 'flash fwd b2', ...shape, us: 300 },
      { section: 'sdpa', name: 'cudnn fwd b2', ...shape, us: 290, graph_us: 250 },
      { section: 'sdpa', name: 'cudnn bwd b2', ...shape, us: 700 },
      { section: 'sdpa', name: 'efficient fwd b2', ...shape, error: 'no kernel' },
      { section: 'gemm', name: 'linear', ...product, variant: 'fwd', us: 90 },
      { section: 'gemm', name: 'TOTAL of one UNet forward fwd', us: 9 },
      { section: 'geglu', name: 'geglu compiled', m: 8192, c: 2560, us: 30 },
      { section: 'unet', name: 'CUDA graph b2 latent 128 bf16', us: 40_000 },
      { section: 'compile', name: 'default b2 latent 128 + CUDA graph', us: 30_000 },
      { section: 'train', name: 'train b8', batch: 8, ckpt: true, amp: false, us: 1e6 },
    ],
  };
  const ratio = (section: string, key: Key, us: number) => compared(section, measured(key, us), peer).ratio;
  t.equal(ratio('attention', { ...shape, variant: 'fwd' }, 200), 0.8);
  t.equal(ratio('attention backward', { ...shape, variant: 'bwd' }, 350), 0.5);
  t.equal(ratio('attention', { ...shape, lk: 77, variant: 'fwd' }, 200), undefined);
  t.equal(ratio('gemm', { ...product, variant: 'fwd' }, 45), 0.5);
  t.equal(ratio('geglu', { ...product, variant: 'fwd' }, 60), 0.5, 'two kernels against one');
  t.equal(ratio('geglu', { ...product, m: 64, variant: 'fwd' }, 60), undefined, 'not half of it');
  t.equal(ratio('unet', { how: 'graph', batch: 2 }, 15_000), 0.5);
  t.equal(ratio('train', { batch: 8, ckpt: true }, 5e5), 0.5);
  const row = compared('gemm', measured({}, 10, { flops: 5e9, bytes: 1e6 }), undefined);
  t.match(row, { tflops: 500, gbps: 100, theirs_us: undefined });
  t.end();
});

test('a pass is its calls by their counts, and half a peer is none', (t) => {
  const row = (us: number, count: number, theirs?: number) => ({
    ...compared('norm', measured({}, us, { count, bytes: us * 1e6 }), undefined),
    theirs_us: theirs,
  });
  t.match(totalOf([row(10, 2, 20), row(5, 4, 5), row(1, 0)]), {
    ours_us: 40,
    theirs_us: 60,
    ratio: 40 / 60,
    count: 6,
  });
  t.match(totalOf([row(10, 2, 20), row(5, 4)]), { ours_us: 40, theirs_us: undefined, ratio: undefined });
  t.equal(totalOf([row(10, 2)]), undefined);
  t.end();
});
