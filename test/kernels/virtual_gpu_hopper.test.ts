// What sm_90a adds on the virtual GPU: TMA, mbarriers and wgmma give right results under every schedule, and each way of
// getting their synchronisation wrong is reported.
import { test } from 'tap';
import { sizeOf } from '../../engine/tensor.ts';
import { hopperKernels } from '../gpu/micro_hopper.ts';
import { checkFaults, type Fault, outcome, without } from '../virtual-gpu/fault_cases.ts';
import type { VirtualGpuOptions } from '../virtual-gpu/gpu.ts';
import {
  halves,
  hopper,
  im2colShape,
  runCopySignal,
  runIm2col,
  runWgemm,
  runWgmmaRegisters,
  runWgmmaSmall,
  type WgemmShape,
} from '../virtual-gpu/hopper_runs.ts';
import type { WarpOrder } from '../virtual-gpu/machine.ts';
import { survivors, synchronisationMutants } from '../virtual-gpu/mutants.ts';
import { fromBf16 } from '../virtual-gpu/numbers.ts';
import { type Bench, floatsFrom, newBench, schedules } from '../virtual-gpu/run_kernel.ts';

const onHopper: VirtualGpuOptions = { capability: [9, 0] };

/** Whether got[m, n] is a[m, k] b[n, k]^T. */
function isProduct(
  got: Float32Array,
  a: Uint16Array,
  b: Uint16Array,
  m: number,
  n: number,
  k: number,
): boolean {
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      let want = 0;
      for (let q = 0; q < k; q++) want += fromBf16(a[i * k + q]) * fromBf16(b[j * k + q]);
      if (!(Math.abs(got[i * n + j] - want) < 1e-3)) return false;
    }
  }
  return true;
}

function wgemm(bench: Bench, ptx = hopper, shape: WgemmShape = {}): boolean {
  const { m = 128, n = 64, k = 320 } = shape;
  const [a, b] = [halves(m * k, 1), halves(n * k, 2)];
  return isProduct(runWgemm(bench, a, b, shape, ptx), a, b, m, n, k);
}

function small(bench: Bench, ptx = hopper): boolean {
  const [a, b] = [halves(64 * 16, 3), halves(8 * 16, 4)];
  return isProduct(runWgmmaSmall(bench, a, b, ptx), a, b, 64, 8, 16);
}

function fromRegisters(bench: Bench, ptx = hopper): boolean {
  const [a, b] = [halves(64 * 32, 3), halves(8 * 32, 4)];
  return isProduct(runWgmmaRegisters(bench, a, b, ptx), a, b, 64, 8, 32);
}

function im2col(bench: Bench, ptx = hopper): boolean {
  const [, h, w, c] = im2colShape;
  const x = halves(sizeOf(im2colShape), 5);
  return runIm2col(bench, x, ptx).every((value, at) => {
    const pixel = 3 * w + 7 + Math.floor(at / c);
    const [image, row, column] = [
      Math.floor(pixel / (h * w)),
      (Math.floor(pixel / w) % h) - 1 + 2,
      pixel % w,
    ];
    const outside = row < 0 || row >= h || column >= w;
    return value === (outside ? 0 : x[((image * h + row) * w + column) * c + (at % c)]);
  });
}

function copySignal(bench: Bench, ptx = hopper): boolean {
  const x = floatsFrom(512, 6);
  return runCopySignal(bench, x, ptx).every((v, i) => v === x[(i + 128) % 512] * 2);
}

/** The lanes of a warp write a row that the first of them stores: bar.warp.sync alone orders them. */
const row = `.version 8.0
.target sm_90
.address_size 64
.visible .entry row(.param .u64 y) {
  .reg .pred %p<2>;
  .reg .b32 %r<4>;
  .reg .b64 %rd<3>;
  .shared .align 16 .b8 s[128];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, s;
  mad.lo.u32 %r3, %r1, 4, %r2;
  st.shared.u32 [%r3], %r1;
  fence.proxy.async.shared::cta;
  bar.warp.sync -1;
  setp.ne.u32 %p1, %r1, 0;
  @%p1 bra END;
  ld.param.u64 %rd1, [y];
  cvta.to.global.u64 %rd2, %rd1;
  cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r2], 128;
  cp.async.bulk.commit_group;
  cp.async.bulk.wait_group 0;
END:
  ret;
}
`;

function storedRow(bench: Bench, ptx = row): boolean {
  const y = bench.room(128);
  bench.launch(ptx, 'row', 1, 32, [y]);
  return bench.ints(y, 32).every((value, i) => value === i);
}

/** Half an operand's register taken apart and put together again by moves, before or after the fence of its wgmma. */
const repacked = (place: 'before' | 'after'): string =>
  hopper.replace(
    /(wgmma\.fence\.sync\.aligned;)((?:(?!wgmma\.fence)[\s\S])*?wgmma\.mma_async\S* \{[^}]*\}, \{(%r\d+),)/,
    (_, fence: string, rest: string, register: string) => {
      const moves = `{\n.reg .b16 low, high;\nmov.b32 {low, high}, ${register};\nmov.b32 ${register}, {low, high};\n}\n`;
      return place === 'before' ? `${moves}${fence}${rest}` : `${fence}\n${moves}${rest}`;
    },
  );

/** A kernel's text with the first match changed; what is planted before an instruction has a scope and names of its own. */
function changed(ptx: string, kernel: string, what: RegExp, by: (...found: string[]) => string): string {
  const [before, after] = ptx.split(`.entry ${kernel}(`);
  if (!what.test(after)) throw new Error(`${kernel} has no ${what}`);
  return `${before}.entry ${kernel}(${after.replace(what, by)}`;
}
const ofWarp = (shift: number, number: string, then: string) =>
  `{\n.reg .b32 warp;\n.reg .b64 wide;\n.reg .pred p;\nmov.u32 warp, %tid.x;\nshr.u32 warp, warp, ${shift};\nand.b32 warp, warp, ${number};\n${then}\n}\n`;

const product = /wgmma\.mma_async[^;]*\}, (%rd\d+), (%rd\d+), (\d)([^;]*);/;
/** Each warp of a warpgroup gives another leading offset, which a tile along k in swizzled rows does not use. */
const otherDescriptors = changed(hopper, 'wgemm', product, (all, _, b) =>
  ofWarp(5, '3', `cvt.u64.u32 wide, warp;\nshl.b64 wide, wide, 16;\nadd.s64 ${b}, ${b}, wide;\n${all}`),
);
/** The last warp of each warpgroup leaves a product out. */
const threeWarps = changed(hopper, 'wgemm', product, (all) =>
  ofWarp(5, '3', `setp.eq.u32 p, warp, 3;\n@p bra OVER;\n${all}\nOVER:`),
);
/** Every other lane adds to sums that are zero. */
const someAccumulate = changed(hopper, 'wgmma_small', product, (all, _, __, scale, rest) =>
  ofWarp(0, '1', `setp.eq.u32 p, warp, 1;\n${all.replace(`, ${scale}${rest}`, `, p${rest}`)}`),
);
const moreBits = changed(hopper, 'wgmma_small', product, (all, a) => `or.b64 ${a}, ${a}, 16384;\n${all}`);
const registers = (from: string, to: string) =>
  changed(hopper, 'wgemm', new RegExp(`setmaxnreg\\.${from};`), () => `setmaxnreg.${to};`);
/** Only the first warp of its warpgroup gives registers back. */
const oneWarpShrinks = changed(hopper, 'wgemm', /setmaxnreg\.dec[^;]*;/, (all) =>
  ofWarp(5, '3', `setp.ne.u32 p, warp, 0;\n@p bra OVER;\n${all}\nOVER:`),
);
const initsOnly = (kernel: string) =>
  changed(hopper, kernel, /fence\.proxy\.async[^;]*;/, () => 'fence.mbarrier_init.release.cluster;');
const counted = (kernel: string, what: string, count: number) =>
  changed(hopper, kernel, new RegExp(`(mbarrier\\.${what}[^;]*), %r\\d+;`), (_, all) => `${all}, ${count};`);
const loadedOver = (fence: string) =>
  changed(
    hopper,
    'im2col',
    /cp\.async\.bulk\.tensor\.4d\S* \[(%r\d+)\]/,
    (all, to) => `st.shared.u32 [${to}], 7;\n${fence}\n${all}`,
  );
const farOffset = changed(
  hopper,
  'im2col',
  /cp\.async\.bulk\.tensor\.4d[^;]*\{%rs\d+, ?(%rs\d+)\};/,
  (all, down) => `mov.u16 ${down}, 300;\n${all}`,
);

for (const schedule of schedules) {
  test(`TMA, mbarriers and wgmma, ${schedule.async} copies, ${schedule.order} order`, (t) => {
    const options = { ...onHopper, schedule };
    for (const shape of [{}, { m: 200, n: 136, k: 104 }, { k: 64 }]) {
      t.ok(wgemm(newBench(options), hopper, shape), `wgemm ${JSON.stringify(shape)}`);
    }
    t.ok(small(newBench(options)), 'wgmma of operands without swizzle');
    t.ok(fromRegisters(newBench(options)), 'wgmma with an operand in registers');
    t.ok(fromRegisters(newBench(options), repacked('before')), 'an operand packed before the fence');
    t.ok(im2col(newBench(options)), 'im2col load and tiled store');
    t.ok(storedRow(newBench(options)), "a warp's row, stored by one lane");
    t.ok(copySignal(newBench(options)), 'cp.async that signals an mbarrier, plain bulk store');
    t.end();
  });

  const mutant = (kernel: string, what: RegExp, n = 0) => without(hopper, kernel, what, n);
  const waits = synchronisationMutants(hopper, (kernel) => kernel === 'wgemm').filter((m) =>
    /try_wait/.test(m.name),
  );
  const faults: readonly Fault[] = [
    ['control', /nothing/, (b) => wgemm(b, hopper, { k: 640 })],
    [
      'empty barrier not waited for',
      /race|mbarrier|uninitialised|deadlock/,
      (b) => wgemm(b, waits.at(-1)!.ptx, { k: 640 }),
    ],
    ['full barrier not waited for', /race|uninitialised/, (b) => wgemm(b, waits[0].ptx, { k: 640 })],
    ['stage freed before wgmma.wait_group', /race/, (b) => wgemm(b, hopper, { k: 640, flags: 2 })],
    ['wgmma.wait_group missing', /async|race/, (b) => wgemm(b, mutant('wgemm', /wgmma\.wait_group/))],
    ['wgmma.fence missing', /async/, (b) => wgemm(b, mutant('wgemm', /wgmma\.fence/))],
    ['fence after mbarrier.init missing', /proxy fence/, (b) => wgemm(b, mutant('wgemm', /fence\.proxy/))],
    ['barrier after mbarrier.init missing', /race|mbarrier/, (b) => wgemm(b, mutant('wgemm', /bar\.sync/))],
    ['more bytes expected than come', /deadlock/, (b) => wgemm(b, hopper, { flags: 4 })],
    ['dynamic shared memory not aligned to the swizzle', /misaligned/, (b) => wgemm(b, hopper, { flags: 1 })],
    [
      'too little dynamic shared memory',
      /out of bounds/,
      (b) => wgemm(b, hopper, { sharedBytes: 3 * 24576 - 1024 }),
    ],
    [
      'fence.proxy.async missing before wgmma',
      /proxy fence/,
      (b) => small(b, mutant('wgmma_small', /fence\.proxy/)),
    ],
    [
      'barrier missing before wgmma',
      /race|uninitialised/,
      (b) => small(b, mutant('wgmma_small', /bar\.sync/)),
    ],
    [
      'operand in registers not fenced',
      /async/,
      (b) => fromRegisters(b, mutant('wgmma_registers', /wgmma\.fence/)),
    ],
    ['operand packed after the fence', /async/, (b) => fromRegisters(b, repacked('after'))],
    [
      'operand in registers overwritten in flight',
      /async/,
      (b) => fromRegisters(b, mutant('wgmma_registers', /wgmma\.wait_group/)),
    ],
    [
      'im2col: box not waited for',
      /race|uninitialised|async/,
      (b) => im2col(b, mutant('im2col', /try_wait/)),
    ],
    [
      'im2col: fence.mbarrier_init missing',
      /proxy fence/,
      (b) => im2col(b, mutant('im2col', /mbarrier_init/)),
    ],
    [
      'cp.async: its mbarrier not waited for',
      /race|uninitialised/,
      (b) => copySignal(b, mutant('copy_signal', /try_wait/)),
    ],
    [
      'bulk store without a proxy fence',
      /proxy fence/,
      (b) => copySignal(b, mutant('copy_signal', /fence\.proxy/)),
    ],
    ['descriptors differ between warps', /wgmma/, (b) => wgemm(b, otherDescriptors)],
    ['a warp leaves a product out', /wgmma/, (b) => wgemm(b, threeWarps)],
    ['lanes differ in whether they accumulate', /wgmma/, (b) => small(b, someAccumulate)],
    ['a descriptor of more than its fields', /wgmma/, (b) => small(b, moreBits)],
    [
      'more registers asked for than were given back',
      /deadlock/,
      (b) => wgemm(b, registers('inc.sync.aligned.u32 232', 'inc.sync.aligned.u32 240')),
    ],
    [
      'fewer registers asked for than held',
      /launch/,
      (b) => wgemm(b, registers('inc.sync.aligned.u32 232', 'inc.sync.aligned.u32 160')),
    ],
    ['only one warp gives registers back', /deadlock/, (b) => wgemm(b, oneWarpShrinks)],
    ['fence.mbarrier_init for what wgmma reads', /proxy fence/, (b) => small(b, initsOnly('wgmma_small'))],
    [
      'fence.mbarrier_init for what a bulk store reads',
      /proxy fence/,
      (b) => copySignal(b, initsOnly('copy_signal')),
    ],
    [
      'more bytes than an mbarrier counts',
      /mbarrier/,
      (b) => im2col(b, counted('im2col', 'arrive', 2 ** 20)),
    ],
    ['an mbarrier of no arrivals', /mbarrier/, (b) => im2col(b, counted('im2col', 'init', 0))],
    ['im2col: an offset beyond its bits', /tensor map/, (b) => im2col(b, farOffset)],
    ['a load over what a thread wrote', /proxy fence/, (b) => im2col(b, loadedOver(''))],
    ['the same, fenced', /nothing/, (b) => im2col(b, loadedOver('fence.proxy.async.shared::cta;'))],
    [
      'a barrier that is not there',
      /barrier/,
      (b) => storedRow(b, row.replace('bar.warp.sync -1;', 'bar.sync 16, 32;')),
    ],
    ['lanes not in step before one stores', /race/, (b) => storedRow(b, without(row, 'row', /warp\.sync/))],
  ];
  checkFaults(`planted faults, ${schedule.async}, ${schedule.order}`, faults, { ...onHopper, schedule });
}

checkFaults(
  'late stores',
  [
    [
      'bulk store not waited for',
      /async/,
      (b) => copySignal(b, without(hopper, 'copy_signal', /bulk\.wait_group/)),
    ],
    [
      'bulk store not committed',
      /async/,
      (b) => copySignal(b, without(hopper, 'copy_signal', /bulk\.commit_group/)),
    ],
  ],
  onHopper,
);

test('sums of 8-bit products keep 13 bits of mantissa', (t) => {
  const kernel = hopperKernels().find(({ name }) => name === 'wgmma.m64n64k32 e4m3, random')!;
  const sums = new Int32Array(Uint8Array.from(kernel.run(newBench(onHopper))).buffer);
  t.ok(sums.every((bits) => (bits & 0x3ff) === 0));
  t.ok(sums.filter((bits) => bits & 0x400).length > sums.length / 4, 'and the 13th is used');
  t.end();
});

test('a kernel that counts on lane 0 to be elected is found out', (t) => {
  const elected = row
    .replace('setp.ne.u32 %p1, %r1, 0;', 'elect.sync _|%p1, -1;\n  not.pred %p1, %p1;')
    .replace('cp.async.bulk.commit_group', '@%p2 cp.async.bulk.commit_group')
    .replace('ld.param', 'setp.eq.u32 %p2, %r1, 0;\n  ld.param')
    .replace('.pred %p<2>', '.pred %p<3>');
  const under = (order: WarpOrder) =>
    outcome(() => storedRow(newBench({ ...onHopper, schedule: { async: 'late', order, seed: 1 } }), elected));
  t.equal(under('forward').kind, 'nothing');
  t.equal(under('reverse').kind, 'async');
  t.end();
});

test('synchronisation mutants of the Hopper kernels die', (t) => {
  const runs: Record<string, (bench: Bench, ptx: string) => boolean> = {
    wgemm: (bench, ptx) => wgemm(bench, ptx, { k: 640 }),
    ...{ wgmma_small: small, wgmma_registers: fromRegisters, im2col, copy_signal: copySignal },
  };
  const mutants = synchronisationMutants(hopper);
  const alive = survivors(mutants, ({ kernel, ptx }) => {
    if (!runs[kernel](newBench(onHopper), ptx)) throw new Error('a wrong result');
  });
  t.comment(`${mutants.length} mutants`);
  // The arrival that frees a stage too early runs only with its flag, so taking it out changes nothing.
  const early = alive.filter((m) => m.kernel === 'wgemm' && /mbarrier\.arrive\.shared/.test(m.name));
  t.ok(early.length <= 1);
  t.same(
    alive.filter((m) => !early.includes(m)).map((m) => `${m.kernel} ${m.name}`),
    [],
  );
  t.end();
});
