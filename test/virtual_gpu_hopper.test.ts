// What sm_90a adds on the virtual GPU: TMA, mbarriers and wgmma give right results under every schedule, and each way of
// getting their synchronisation wrong is reported.
import { test } from 'tap';
import { TensorMapDataType, TensorMapSwizzle } from '../engine/cuda/api.ts';
import { CudaError } from '../engine/cuda/errors.ts';
import { checkFaults, type Fault, without } from './virtual-gpu/fault_cases.ts';
import type { VirtualGpuOptions } from './virtual-gpu/gpu.ts';
import { survivors, synchronisationMutants } from './virtual-gpu/mutants.ts';
import { fromBf16, toBf16 } from './virtual-gpu/numbers.ts';
import { type Bench, floatsFrom, newBench, schedules, testPtx } from './virtual-gpu/run_kernel.ts';

const hopper = testPtx('hopper');
const onHopper: VirtualGpuOptions = { capability: [9, 0] };

const halves = (count: number, seed: number) => Uint16Array.from(floatsFrom(count, seed), toBf16);
const map = (dims: readonly number[], strides: readonly number[], address: bigint) => ({
  ...{
    dataType: TensorMapDataType.BFLOAT16,
    globalAddress: address,
    globalDim: dims,
    globalStrides: strides,
  },
  ...{ elementStrides: dims.map(() => 1), swizzle: TensorMapSwizzle.B128 },
});

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

interface Shape {
  readonly m?: number;
  readonly n?: number;
  readonly k?: number;
  readonly flags?: number;
  readonly sharedBytes?: number;
}

function wgemm(
  bench: Bench,
  ptx = hopper,
  { m = 128, n = 64, k = 320, flags = 0, sharedBytes }: Shape = {},
): boolean {
  const [a, b] = [halves(m * k, 1), halves(n * k, 2)];
  const d = bench.room(m * n * 4);
  const [mapA, mapB] = [
    [a, m, 128],
    [b, n, 64],
  ].map(([values, rows, box]) =>
    bench.gpu.cuTensorMapEncodeTiled({
      ...map([k, rows as number], [k * 2], bench.give(values as Uint16Array)),
      boxDim: [64, box as number],
    }),
  );
  const grid = [Math.ceil(n / 64), Math.ceil(m / 128), 1] as const;
  bench.launch(ptx, 'wgemm', grid, 384, [mapA, mapB, d, m, n, k, flags], sharedBytes ?? 3 * 24576 + 1024);
  return isProduct(bench.floats(d, m * n), a, b, m, n, k);
}

function small(bench: Bench, ptx = hopper): boolean {
  const [a, b] = [halves(64 * 16, 3), halves(8 * 16, 4)];
  const d = bench.room(64 * 8 * 4);
  bench.launch(ptx, 'wgmma_small', 1, 128, [bench.give(a), bench.give(b), d]);
  return isProduct(bench.floats(d, 512), a, b, 64, 8, 16);
}

/** One tap of a 3 x 3 convolution with padding 1 over [2, 10, 12, 64], 64 pixels from (7, 3) on. */
function im2col(bench: Bench, ptx = hopper): boolean {
  const [n, h, w, c] = [2, 10, 12, 64];
  const x = halves(n * h * w * c, 5);
  const y = bench.room(64 * 128);
  const mapX = bench.gpu.cuTensorMapEncodeIm2col({
    ...map([c, w, h, n], [c * 2, w * c * 2, h * w * c * 2], bench.give(x)),
    ...{
      pixelBoxLowerCorner: [-1, -1],
      pixelBoxUpperCorner: [-1, -1],
      channelsPerPixel: 64,
      pixelsPerColumn: 64,
    },
  });
  const mapY = bench.gpu.cuTensorMapEncodeTiled({ ...map([64, 64], [128], y), boxDim: [64, 64] });
  bench.launch(ptx, 'im2col', 1, 32, [mapX, mapY, 7, 3], 8192 + 1024);
  const got = new Uint16Array(bench.ints(y, 2048).buffer);
  return got.every((value, at) => {
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
  const y = bench.room(2048);
  bench.launch(ptx, 'copy_signal', 1, 128, [bench.give(x), y]);
  return bench.floats(y, 512).every((v, i) => v === x[(i + 128) % 512] * 2);
}

for (const schedule of schedules) {
  test(`TMA, mbarriers and wgmma, ${schedule.async} copies, ${schedule.order} order`, (t) => {
    const options = { ...onHopper, schedule };
    for (const shape of [{}, { m: 200, n: 136, k: 104 }, { k: 64 }]) {
      t.ok(wgemm(newBench(options), hopper, shape), `wgemm ${JSON.stringify(shape)}`);
    }
    t.ok(small(newBench(options)), 'wgmma of operands without swizzle');
    t.ok(im2col(newBench(options)), 'im2col load and tiled store');
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

test('tensor maps that a driver refuses are refused', (t) => {
  const { gpu } = newBench(onHopper);
  const good = { ...map([64, 8], [128], 0x7f4000001000n), boxDim: [64, 8] };
  const cases: [string, object][] = [
    ['address', { globalAddress: 0x7f4000001008n }],
    ['stride', { globalStrides: [130] }],
    ['box', { boxDim: [64, 257] }],
    ['swizzle span', { boxDim: [72, 8] }],
    ['rank', { boxDim: [64] }],
  ];
  gpu.cuTensorMapEncodeTiled(good);
  for (const [name, change] of cases) {
    t.throws(() => gpu.cuTensorMapEncodeTiled({ ...good, ...change }), CudaError, name);
  }
  t.end();
});

test('synchronisation mutants of the Hopper kernels die', (t) => {
  const runs: Record<string, (bench: Bench, ptx: string) => boolean> = {
    wgemm: (bench, ptx) => wgemm(bench, ptx, { k: 640 }),
    ...{ wgmma_small: small, im2col, copy_signal: copySignal },
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
