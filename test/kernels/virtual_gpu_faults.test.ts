// The detectors detect: every planted fault is reported as what it is, and the same kernel without it passes under the same
// settings. Faults are planted in the launch, in the PTX text, or in kernels that were written wrong.
import { test } from 'tap';
import { checkFaults as check, outcome, without } from '../virtual-gpu/fault_cases.ts';
import { survivors, synchronisationMutants } from '../virtual-gpu/mutants.ts';
import { fromBf16, toBf16 } from '../virtual-gpu/numbers.ts';
import { type Bench, floatsFrom, newBench, schedules, testPtx } from '../virtual-gpu/run_kernel.ts';

const basic = testPtx('basic');
const hgemm = testPtx('hgemm');

/** vadd of 1000 elements, with one of its operands as the case wants it. */
const vadd = (
  bench: Bench,
  change: { a?: bigint; b?: bigint; c?: bigint; n?: number; grid?: number },
): undefined => {
  const { a, b, c, n = 1000, grid = 4 } = change;
  const args = [
    a ?? bench.give(floatsFrom(1000, 1)),
    b ?? bench.give(floatsFrom(1000, 2)),
    c ?? bench.room(4000),
    n,
  ];
  bench.launch(basic, 'vadd', grid, 256, args);
};

check('addresses', [
  ['control', /nothing/, (b) => vadd(b, {})],
  ['store past the end', /out of bounds/, (b) => vadd(b, { c: b.room(3996) })],
  ['load past the end', /out of bounds/, (b) => vadd(b, { a: b.give(floatsFrom(999, 1)) })],
  ['null pointer', /out of bounds/, (b) => vadd(b, { a: 0n })],
  [
    'use after free',
    /out of bounds/,
    (b) => {
      const a = b.give(floatsFrom(1000, 1));
      b.gpu.cuMemFreeAsync(a, 0n);
      return vadd(b, { a });
    },
  ],
  ['uninitialised read', /uninitialised/, (b) => vadd(b, { b: b.room(4000) })],
  [
    'output not written, seen by the host',
    /uninitialised/,
    (b) => {
      const c = b.room(4000);
      vadd(b, { c, n: 999 });
      b.floats(c, 1000);
      return undefined;
    },
  ],
  ['misaligned pointer', /misaligned/, (b) => vadd(b, { a: b.give(floatsFrom(1001, 1)) + 2n })],
  ['host copy past the end', /out of bounds/, (b) => void b.floats(b.give(floatsFrom(4, 1)), 5) as undefined],
  ['invalid free', /invalid free/, (b) => b.gpu.cuMemFreeAsync(b.room(64) + 16n, 0n) as undefined],
  ['too few bytes of parameters', /launch/, (b) => launchRaw(b, 20)],
  [
    'block larger than .maxntid',
    /refused/,
    (b) => b.launch(basic, 'sgemm', 1, 512, [0n, 0n, 0n, 1, 1, 1]) as undefined,
  ],
  [
    'float4 from an array aligned to 4',
    /misaligned/,
    (b) => b.launch(basic, 'bad_float4', 1, 256, [b.give(floatsFrom(256, 1))]) as undefined,
  ],
]);

function launchRaw(bench: Bench, bytes: number): undefined {
  const kernel = bench.gpu.cuModuleGetFunction(bench.gpu.cuModuleLoadData(basic), 'vadd');
  bench.gpu.cuLaunchKernel(kernel, [1, 1, 1], [32, 1, 1], 0, 0n, new Uint8Array(bytes), [0, 8, 16, 24]);
}

const sgemm = (bench: Bench, ptx = basic): boolean => {
  const [a, b] = [floatsFrom(40 * 40, 1), floatsFrom(40 * 40, 2)];
  const c = bench.room(40 * 40 * 4);
  bench.launch(ptx, 'sgemm', [3, 3, 1], 256, [bench.give(a), bench.give(b), c, 40, 40, 40]);
  const got = bench.floats(c, 1600);
  return got.every((v, i) => {
    let want = 0;
    for (let q = 0; q < 40; q++) want += a[Math.floor(i / 40) * 40 + q] * b[q * 40 + (i % 40)];
    return Math.abs(v - want) < 1e-4;
  });
};
const exchange = (bench: Bench, kernel: string): undefined =>
  bench.launch(basic, kernel, 1, 32, [bench.give(floatsFrom(32, 1)), bench.room(128)]) as undefined;
const gridSum = (bench: Bench, kernel: string): undefined => {
  const args = [
    bench.give(floatsFrom(400, 1)),
    bench.room(16),
    bench.give(new Int32Array(1)),
    bench.room(4),
    400,
  ];
  bench.launch(basic, kernel, 4, 64, args);
};
const shift = (grid: number, block: number, n: number) => (bench: Bench) =>
  bench.launch(basic, 'bad_shift_in_place', grid, block, [bench.give(floatsFrom(n, 1)), n]) as undefined;

const badBarrier = (bench: Bench): undefined =>
  bench.launch(basic, 'bad_barrier', 1, 64, [bench.give(floatsFrom(64, 1))]) as undefined;

for (const schedule of schedules) {
  const noBarrier = (n: number) => without(basic, 'sgemm', /bar\.sync/, n);
  check(
    `races and barriers, ${schedule.async}, ${schedule.order}`,
    [
      ['control: sgemm', /nothing/, (b) => sgemm(b)],
      ['no barrier before reading the tile', /race|uninitialised/, (b) => sgemm(b, noBarrier(0))],
      ['no barrier before overwriting the tile', /race/, (b) => sgemm(b, noBarrier(1))],
      ['control: exchange in a warp', /nothing/, (b) => exchange(b, 'warp_exchange')],
      ['no __syncwarp', /race|uninitialised/, (b) => exchange(b, 'bad_warp_exchange')],
      ['divergent __syncthreads', /race|divergence|uninitialised/, (b) => badBarrier(b)],
      ['in place with a neighbour, within a warp', /race/, shift(1, 32, 32)],
      ['in place with a neighbour, across warps', /race/, shift(1, 64, 64)],
      ['in place with a neighbour, across blocks', /race/, shift(2, 1, 2)],
      [
        'two blocks write one word',
        /race/,
        (b) => b.launch(basic, 'bad_same_word', 2, 1, [b.room(4)]) as undefined,
      ],
      [
        'control: one block writes it',
        /nothing/,
        (b) => b.launch(basic, 'bad_same_word', 1, 1, [b.room(4)]) as undefined,
      ],
      ['control: last block with both fences', /nothing/, (b) => gridSum(b, 'grid_sum')],
      ['last block without the releasing fence', /race/, (b) => gridSum(b, 'bad_grid_sum_release')],
      ['last block without the acquiring fence', /race/, (b) => gridSum(b, 'bad_grid_sum_acquire')],
      ['control: warps that hand over to each other', /nothing/, (b) => handOff(b)],
      ['a write after bar.arrive', /race/, (b) => handOff(b, 'st.shared.u32 [%mine], %t;')],
      ['a read after bar.arrive', /race|uninit/, (b) => handOff(b, 'ld.shared.u32 %v, [%theirs];')],
    ],
    { schedule },
  );
}

/** named_barrier with its barrier widened to more threads than come. */
function missingWarp(bench: Bench): undefined {
  const ptx = basic.replace('bar.sync 1, 64;', 'bar.sync 1, 96;');
  bench.launch(ptx, 'named_barrier', 1, 128, [bench.give(floatsFrom(64, 1)), bench.room(256)]);
}

/**
 * The first warp writes, arrives at barrier 1 and waits at 2 for the second, which waits at 1 first. `late` is written by the
 * first warp after its arrival, which nothing orders before the second's read.
 */
function handOff(bench: Bench, late = ''): boolean {
  const ptx = `.version 7.0\n.target sm_80\n.address_size 64
.visible .entry hand_off(.param .u64 to)
{ .reg .pred %p; .reg .b32 %t, %s, %mine, %theirs, %v; .reg .b64 %to, %o; .shared .align 4 .b8 tile[256];
ld.param.u64 %to, [to]; mov.u32 %t, %tid.x; mov.u32 %s, tile; mad.lo.s32 %mine, %t, 4, %s; xor.b32 %v, %t, 32;
mad.lo.s32 %theirs, %v, 4, %s; setp.lt.u32 %p, %t, 32; @!%p bra SECOND;
st.shared.u32 [%mine], %t; bar.arrive 1, 64; ${late} bar.sync 2, 64; ld.shared.u32 %v, [%theirs]; bra.uni BOTH;
SECOND: bar.sync 1, 64; ld.shared.u32 %v, [%theirs]; st.shared.u32 [%mine], %t; bar.arrive 2, 64;
BOTH: mul.wide.u32 %o, %t, 4; add.s64 %to, %to, %o; st.global.u32 [%to], %v; ret; }`;
  const to = bench.room(256);
  bench.launch(ptx, 'hand_off', 1, 64, [to]);
  return bench.ints(to, 64).every((v, t) => v === (t ^ 32));
}

const tooLate = hgemm.replaceAll('cp.async.wait_group 1;', 'cp.async.wait_group 2;');

function copies(bench: Bench, ptx: string, size = 64): boolean {
  const [a, b] = [floatsFrom(64 * size, 1), floatsFrom(size * 64, 2)].map((x) => Uint16Array.from(x, toBf16));
  const c = bench.room(64 * 64 * 4);
  bench.launch(ptx, 'hgemm', 1, 128, [bench.give(a), bench.give(b), c, 64, 64, size]);
  const [x, y] = [a, b].map((bits) => Float32Array.from(bits, fromBf16));
  return bench.floats(c, 4096).every((v, i) => {
    let want = 0;
    for (let q = 0; q < size; q++) want += x[Math.floor(i / 64) * size + q] * y[q * 64 + (i % 64)];
    return Math.abs(v - want) < 1e-3;
  });
}

check(
  'without the race detector',
  [
    ['divergent __syncthreads', /divergence/, (b) => badBarrier(b)],
    ['a barrier that one warp never reaches', /deadlock/, (b) => missingWarp(b)],
    [
      'cp.async waited one group too late: late completion shows it',
      /wrong|uninitialised/,
      (b) => copies(b, tooLate),
    ],
  ],
  { races: false },
);
check(
  'what a simple emulator would see',
  [['cp.async waited too late', /nothing/, (b) => copies(b, tooLate)]],
  {
    races: false,
    schedule: { async: 'early' },
  },
);

for (const async of ['late', 'early', 'random'] as const) {
  const mutant = (what: RegExp, n = 0) => without(hgemm, 'hgemm', what, n);
  check(
    `asynchronous copies, ${async}`,
    [
      ['control', /nothing/, (b) => copies(b, hgemm, 128)],
      ['waited one group too late', /race|uninitialised/, (b) => copies(b, tooLate, 128)],
      ['never waited for', /race|uninitialised/, (b) => copies(b, mutant(/without.*wait_group/), 128)],
      ['no barrier after the wait', /race|uninitialised/, (b) => copies(b, mutant(/bar\.sync/), 128)],
      ['no barrier before the next copy', /race/, (b) => copies(b, mutant(/bar\.sync/, 1), 128)],
      [
        'source beyond its array',
        /out of bounds/,
        (b) => {
          const bits = Uint16Array.from(floatsFrom(64 * 63, 1), toBf16);
          b.launch(hgemm, 'hgemm', 1, 128, [b.give(bits), b.give(bits), b.room(64 * 64 * 4), 64, 64, 64]);
          return undefined;
        },
      ],
    ],
    { schedule: { async } },
  );
}

/** A warp whose thread t has %t = t, the address %own of word t of 32 that are given, and %all = -1. */
const warp =
  (body: string) =>
  (bench: Bench): undefined => {
    const ptx = `.version 7.0\n.target sm_80\n.address_size 64
.visible .entry warp(.param .u64 words)
{ .reg .pred %p; .reg .b32 %t, %s, %v, %all; .reg .b64 %own, %o; .shared .align 16 .b8 tile[128];
ld.param.u64 %own, [words]; mov.u32 %t, %tid.x; mov.u32 %all, -1; mul.wide.u32 %o, %t, 4; add.s64 %own, %own, %o;
mov.u32 %s, tile; mad.lo.s32 %s, %t, 4, %s; setp.lt.u32 %p, %t, 16; ${body} ret; }`;
    bench.launch(ptx, 'warp', 1, 32, [bench.give(floatsFrom(32, 1))]);
  };
const half = 'shfl.sync.bfly.b32 %v, %t, 1, 31,';
const begun = 'cp.async.ca.shared.global [%s], [%own], 4;';
check('what the ISA leaves undefined', [
  ['control: a shuffle of all', /nothing/, warp(`${half} -1;`)],
  ['control: one of those that take part', /nothing/, warp(`@%p bra LOW; ret; LOW: ${half} 0xffff;`)],
  ['a shuffle by threads outside its mask', /divergence/, warp(`${half} 0xffff;`)],
  ['a vote by threads outside its mask', /divergence/, warp('vote.sync.ballot.b32 %v, %p, 0xffff0000;')],
  ['__syncwarp of others', /divergence/, warp('bar.warp.sync 1;')],
  ['masks that differ', /divergence/, warp(`@%p shr.u32 %all, %all, 16; ${half} %all;`)],
  ['a barrier beyond the sixteen', /barrier/, warp('bar.sync 16, 32;')],
  ['control: ld.global.nc of what the host wrote', /nothing/, warp('ld.global.nc.b32 %v, [%own];')],
  [
    'ld.global.nc of what the grid wrote',
    /race/,
    warp('st.global.b32 [%own], %t; ld.global.nc.b32 %v, [%own];'),
  ],
  ['ld.global.nc in place', /race/, warp('ld.global.nc.b32 %v, [%own]; st.global.b32 [%own], %v;')],
  ['control: copies all waited for', /nothing/, warp(`${begun} cp.async.wait_all;`)],
  [
    'control: and an empty group after them',
    /nothing/,
    warp(`${begun} cp.async.wait_all; cp.async.commit_group;`),
  ],
  ['a copy on its way at the end', /async/, warp(`${begun} cp.async.commit_group; cp.async.wait_group 1;`)],
  ['one that no group holds', /async/, warp(begun)],
]);

test('every report names the kernel, the block, the thread, the instruction and its source line', (t) => {
  const { message } = outcome(() => vadd(newBench(), { a: 8n }));
  t.match(
    message,
    /in kernel vadd block \(0,0,0\) thread \(\d+,0,0\) at "ld\.global\S* %f\d+, \[%rd\d+\]" \(PTX line \d+, basic\.cu:\d+\)/,
  );
  const race = outcome(() => sgemm(newBench(), without(basic, 'sgemm', /bar\.sync/, 1)));
  t.match(race.message, /write-after-read on shared\+0x\w+ with thread \d+ at "ld\.shared.*in kernel sgemm/);
  t.end();
});

test('a loop that never ends is reported', (t) => {
  const { kind } = outcome(() => {
    const bench = newBench();
    bench.launch(basic, 'bad_endless', 1, 1, [bench.give(new Int32Array(1))]);
    return undefined;
  });
  t.equal(kind, 'timeout');
  t.end();
});

test('synchronisation mutants of the test kernels die', (t) => {
  const mutants = [
    ...synchronisationMutants(basic, (kernel) => ['sgemm', 'softmax', 'warp_exchange'].includes(kernel)),
    ...synchronisationMutants(hgemm),
  ];
  const alive = survivors(mutants, ({ kernel, ptx }) => {
    const bench = newBench();
    let right = true;
    if (kernel === 'sgemm') right = sgemm(bench, ptx);
    else if (kernel === 'hgemm') right = copies(bench, ptx, 192);
    else if (kernel === 'softmax')
      bench.launch(ptx, 'softmax', 1, 128, [bench.give(floatsFrom(300, 1)), bench.room(1200), 300]);
    else bench.launch(ptx, kernel, 1, 32, [bench.give(floatsFrom(32, 1)), bench.room(128)]);
    if (!right) throw new Error('a wrong result');
  });
  t.comment(`${mutants.length} mutants`);
  // block_sum's last barrier guards a second use of its array, which softmax does not make.
  const equivalent = alive.filter((m) => m.kernel === 'softmax' && /bar\.sync/.test(m.name));
  t.ok(equivalent.length <= 1);
  t.same(
    alive.filter((m) => !equivalent.includes(m)).map((m) => `${m.kernel} ${m.name}`),
    [],
  );
  t.end();
});
