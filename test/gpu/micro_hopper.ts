// Micro-kernels of what sm_90a adds: wgmma of every width that our kernels use, boxes by TMA in each swizzle as they lie in
// shared memory, stmatrix; and the kernels of virtual-gpu/kernels/hopper.cu and cluster.cu, where all of it works together.
import { type GpuApi, TensorMapDataType, TensorMapSwizzle } from '../../engine/cuda/api.ts';
import { sizeOf } from '../../engine/tensor.ts';
import { clusterPtx, runExchange, runMulticast } from '../virtual-gpu/cluster_runs.ts';
import {
  halves,
  hopper,
  im2colShape,
  runCopySignal,
  runIm2col,
  runWgemm,
  runWgmmaSmall,
  type WgemmShape,
} from '../virtual-gpu/hopper_runs.ts';
import { fromBf16, fromE4m3, toBf16, toF16 } from '../virtual-gpu/numbers.ts';
import { type Bench, bytesOf, floatsFrom } from '../virtual-gpu/run_kernel.ts';
import { type Agree, sameBits, within } from './agreement.ts';
import type { MicroKernel } from './micro.ts';
import { bounds, integers } from './micro_matrix.ts';

export const THREADS = 128;
export const onHopper = { group: 'hopper', hopper: true } as const;

export const kernel = (parameters: string, registers: string, body: string) => `.version 8.0
.target sm_90a
.address_size 64
.visible .entry op(${parameters})
{
.reg .pred %p<4>; .reg .b32 %t, %s, %b, %n, %x, %y, %z, %r<8>; .reg .b64 %m, %to, %from, %o, %w<8>; ${registers}
mov.u32 %t, %tid.x;
${body}
ret;
}`;

/** %n bytes between global %from or %to and shared memory from %s on, by all threads. */
const copyWords = (label: string, move: string) => `shl.b32 %r1, %t, 2;
${label}: setp.ge.u32 %p1, %r1, %n; @%p1 bra ${label}_END; cvt.u64.u32 %o, %r1; add.s32 %r2, %s, %r1;
${move}
add.s32 %r1, %r1, ${4 * THREADS}; bra ${label};
${label}_END:`;
const toShared = 'add.s64 %w3, %from, %o; ld.global.u32 %r3, [%w3]; st.shared.u32 [%r2], %r3;';
const toGlobal = 'ld.shared.u32 %r3, [%r2]; add.s64 %w3, %to, %o; st.global.u32 [%w3], %r3;';

// wgmma

/** The operands as 8 x 8 core matrices of 128 bytes: 128 bytes apart along k, 256 along m or n. */
function coreMatrices(values: Uint16Array): Uint16Array {
  return values.map(
    (_, i) =>
      values[
        (Math.floor(i / 128) * 8 + (Math.floor(i / 8) % 8)) * 16 + (Math.floor(i / 64) % 2) * 8 + (i % 8)
      ],
  );
}

/** Operands that lie across k, in chunks of so many bytes of m or n, swizzled, 16 k after one another; 0: core matrices. */
interface Across {
  readonly a: number;
  readonly b: number;
}

/** All of a descriptor but the address: leading offset at bit 16, stride at 32, both in 16 bytes, the swizzle at 62. */
function layoutOf(span: number): string {
  const swizzle = [0, 128, 64, 32].indexOf(span);
  const [leading, stride] = span ? [16 * span, 8 * span] : [128, 256];
  const bits = (BigInt(swizzle) << 62n) | (BigInt(stride >> 4) << 32n) | (BigInt(leading >> 4) << 16n);
  return `0x${bits.toString(16)}`;
}

/** One wgmma of 64 x n x 16, of bytes x 32; each thread stores its sums as it holds them. With `registers` a comes from them. */
function wgmmaPtx(n: number, type: string, registers: boolean, across: Across = { a: 0, b: 0 }): string {
  const sums = Array.from({ length: n / 2 }, (_, i) => `%d${i}`);
  const descriptor = (at: string, to: string, span: number) =>
    `mov.u32 %r4, ${at}; shr.u32 %r4, %r4, 4; cvt.u64.u32 ${to}, %r4; or.b64 ${to}, ${to}, ${layoutOf(span)};`;
  const operand = registers ? '{%a0, %a1, %a2, %a3}' : '%w1';
  const turned = [...(registers ? [] : [across.a]), across.b].map((span) => (span ? ', 1' : ', 0'));
  const [k, flags] = type === 'e4m3' ? [32, '1, 1'] : [16, `1, 1${turned.join('')}`];
  return kernel(
    '.param .u64 to, .param .u64 a, .param .u64 b',
    `.reg .f32 %d<${n / 2}>; .reg .b32 %a<4>; .shared .align 1024 .b8 sa[2048]; .shared .align 1024 .b8 sb[${n * 32}];`,
    `ld.param.u64 %from, [a]; mov.u32 %s, sa; mov.u32 %n, 2048; ${copyWords('A', toShared)}
mul.wide.u32 %o, %t, 16; add.s64 %w3, %from, %o; ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%w3];
ld.param.u64 %from, [b]; mov.u32 %s, sb; mov.u32 %n, ${n * 32}; ${copyWords('B', toShared)}
fence.proxy.async.shared::cta; bar.sync 0;
${descriptor('sa', '%w1', across.a)} ${descriptor('sb', '%w2', across.b)}
${sums.map((d) => `mov.f32 ${d}, 0f40000000;`).join(' ')}
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n${n}k${k}.f32.${type}.${type} {${sums.join(', ')}}, ${operand}, %w2, 1, ${flags};
wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
ld.param.u64 %to, [to]; mul.wide.u32 %o, %t, ${2 * n}; add.s64 %to, %to, %o;
${sums.map((d, i) => `st.global.f32 [%to+${4 * i}], ${d};`).join(' ')}`,
  );
}

function wgmma(n: number, type: 'bf16' | 'f16', exact: boolean, registers = false): MicroKernel {
  const encode = type === 'bf16' ? toBf16 : toF16;
  const values = (count: number, seed: number) =>
    Uint16Array.from(exact ? integers(count, seed) : floatsFrom(count, seed), encode);
  const ptx = wgmmaPtx(n, type, registers);
  const [a, b] = [values(64 * 16, n), values(n * 16, n + 1)];
  const run = (bench: Bench<GpuApi>) => {
    const to = bench.room(64 * n * 4);
    // Registers take a as it comes, for their bits are what matters, not their places.
    const from = [registers ? a : coreMatrices(a), coreMatrices(b)].map((each) => bench.give(each));
    bench.launch(ptx, 'op', 1, THREADS, [to, ...from]);
    return bench.bytes(to, 64 * n * 4);
  };
  // Terms are at most 1, sums begin at 2: see micro_matrix.ts.
  const agree = exact ? sameBits('f32') : within(Array(64 * n).fill(18 * 2 * 2 ** -23));
  const kind = `${exact ? 'integers' : 'random'}${registers ? ', a in registers' : ''}`;
  return { ...onHopper, name: `wgmma.m64n${n}k16 ${type}, ${kind}`, ptx, run, agree };
}

/** Integers in shared memory as they come: which element a place holds is what the two GPUs have to agree on. */
function wgmmaAcross(n: number, across: Across): MicroKernel {
  const ptx = wgmmaPtx(n, 'bf16', false, across);
  const [a, b] = [64, n].map((size) => Uint16Array.from(integers(size * 16, size), toBf16));
  const run = (bench: Bench<GpuApi>) => {
    const to = bench.room(64 * n * 4);
    bench.launch(ptx, 'op', 1, THREADS, [to, bench.give(a), bench.give(b)]);
    return bench.bytes(to, 64 * n * 4);
  };
  const name = `wgmma.m64n${n}k16 across k, swizzles of ${across.a} and ${across.b} bytes`;
  return { ...onHopper, name, ptx, run, agree: sameBits('f32') };
}

const integerBytes = [0x00, 0x38, 0x40, 0xb8, 0xc0]; // 0, 1, 2, -1, -2
const spread = (x: number) => Math.floor(x * 1e6);
const bytesTo16 = Array.from({ length: 256 }, (_, code) => code).filter(
  (code) => Math.abs(fromE4m3(code)) <= 16,
);

/** Bytes of e4m3, two to a half's place: rows are as long, and core matrices as large. */
function wgmmaOfBytes(n: number, exact: boolean): MicroKernel {
  const codes = exact ? integerBytes : bytesTo16;
  const byte = (x: number) => codes[Math.abs(x) % codes.length];
  const pairs = (count: number, seed: number) => {
    const numbers = exact ? integers : (size: number, from: number) => floatsFrom(size, from).map(spread);
    const [low, high] = [numbers(count, seed), numbers(count, seed + 7)];
    return Uint16Array.from({ length: count }, (_, i) => byte(low[i]) | (byte(high[i]) << 8));
  };
  const ptx = wgmmaPtx(n, 'e4m3', false);
  const [a, b] = [pairs(64 * 16, n), pairs(n * 16, n + 1)];
  const run = (bench: Bench<GpuApi>) => {
    const to = bench.room(64 * n * 4);
    bench.launch(ptx, 'op', 1, THREADS, [
      to,
      ...[coreMatrices(a), coreMatrices(b)].map((each) => bench.give(each)),
    ]);
    return bench.bytes(to, 64 * n * 4);
  };
  // Terms are at most 256, each cut off at 13 bits of the largest of them, and the sum at 13 of its own.
  const agree = exact ? sameBits('f32') : within(Array(64 * n).fill(2 * (33 * 2 ** -5 + 1)));
  return { ...onHopper, name: `wgmma.m64n${n}k32 e4m3, ${exact ? 'integers' : 'random'}`, ptx, run, agree };
}

// TMA

const mapParameters =
  '.param .align 64 .b8 map[128], .param .u64 data, .param .u32 x, .param .u32 y, .param .u32 z, .param .u32 bytes';
const tile = '.shared .align 1024 .b8 tile[16384]; .shared .align 8 .b8 barrier[8];';
const readMap = `mov.u32 %s, tile; mov.u32 %b, barrier; mov.b64 %m, map; cvta.param.u64 %m, %m;
ld.param.u32 %x, [x]; ld.param.u32 %y, [y]; ld.param.u32 %z, [z]; ld.param.u32 %n, [bytes]; setp.ne.b32 %p2, %t, 0;`;

const whenLoaded = `TRY: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%b], 0; @%p3 bra THERE; bra TRY;
THERE: ld.param.u64 %to, [data]; ${copyWords('OUT', toGlobal)}`;

const loadBy = (parameters: string, load: string): string =>
  kernel(
    parameters,
    tile,
    `${readMap} @%p2 bra ISSUED; prefetch.tensormap [%m];
mbarrier.init.shared::cta.b64 [%b], 1; fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], %n;
${load}
ISSUED: bar.sync 0;
${whenLoaded}`,
  );

const loadPtx = loadBy(
  mapParameters,
  `cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%m, {%x, %y, %z}];
cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%s], [%m, {%x, %y, %z}], [%b];`,
);

const imagePtx = loadBy(
  `${mapParameters}, .param .u32 image`,
  `ld.param.u32 %r1, [image];
cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%s], [%m, {%x, %y, %z, %r1}], [%b];`,
);

/** A box of 4 x 3 pixels of an image of two, [2, 5, 6, 64] halves, at (x, y), outside on some sides. */
function boxOfImage([x, y, image]: readonly number[]): MicroKernel {
  const bytes = 4 * 3 * 64 * 2;
  const run = (bench: Bench<GpuApi>) => {
    const map = bench.gpu.cuTensorMapEncodeTiled({
      dataType: TensorMapDataType.BFLOAT16,
      globalAddress: bench.give(halves(2 * 5 * 6 * 64, 16)),
      globalDim: [64, 6, 5, 2],
      globalStrides: [128, 6 * 128, 5 * 6 * 128],
      elementStrides: [1, 1, 1, 1],
      swizzle: TensorMapSwizzle.B128,
      boxDim: [64, 4, 3, 1],
    });
    const data = bench.room(bytes);
    bench.launch(imagePtx, 'op', 1, THREADS, [map, data, 0, x, y, bytes, image]);
    return bench.bytes(data, bytes);
  };
  const name = `TMA load 4d, of image ${image} at ${x}, ${y}`;
  return { ...onHopper, name, ptx: imagePtx, run, agree: sameBits('u16') };
}

const storePtx = kernel(
  mapParameters,
  tile,
  `${readMap} ld.param.u64 %from, [data]; ${copyWords('IN', toShared)}
fence.proxy.async.shared::cta; bar.sync 0; @%p2 bra STORED;
cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%m, {%x, %y, %z}], [%s];
cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
STORED:`,
);

/** [3, 20, 80] halves; a box of `columns` x 12 x 2 begins at (x, y, z), outside on some sides. */
const [SLABS, ROWS, COLUMNS] = [3, 20, 80];

function box(
  how: 'load' | 'store',
  swizzle: keyof typeof TensorMapSwizzle,
  columns: number,
  at: readonly number[],
): MicroKernel {
  const ptx = how === 'load' ? loadPtx : storePtx;
  const bytes = columns * 12 * 2 * 2;
  const run = (bench: Bench<GpuApi>) => {
    const global = halves(SLABS * ROWS * COLUMNS, 8);
    const tensor = bench.give(global);
    const map = bench.gpu.cuTensorMapEncodeTiled({
      dataType: TensorMapDataType.BFLOAT16,
      globalAddress: tensor,
      globalDim: [COLUMNS, ROWS, SLABS],
      globalStrides: [COLUMNS * 2, ROWS * COLUMNS * 2],
      elementStrides: [1, 1, 1],
      swizzle: TensorMapSwizzle[swizzle],
      boxDim: [columns, 12, 2],
    });
    const data = how === 'load' ? bench.room(bytes) : bench.give(halves(bytes / 2, 9));
    bench.launch(ptx, 'op', 1, THREADS, [map, data, ...at, bytes]);
    return how === 'load' ? bench.bytes(data, bytes) : bench.bytes(tensor, global.byteLength);
  };
  const name = `TMA ${how} 3d, swizzle ${swizzle}, ${columns} columns at ${at.join(', ')}`;
  return { ...onHopper, name, ptx, run, agree: sameBits('u16') };
}

const bulkPtx = kernel(
  '.param .u64 data, .param .u64 from, .param .u32 bytes',
  tile,
  `mov.u32 %s, tile; mov.u32 %b, barrier; ld.param.u64 %from, [from]; ld.param.u32 %n, [bytes]; setp.ne.b32 %p2, %t, 0;
@%p2 bra ISSUED; mbarrier.init.shared::cta.b64 [%b], 1; fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], %n;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%from], %n, [%b];
ISSUED: bar.sync 0;
${whenLoaded}`,
);

function bulkLoad(): MicroKernel {
  const bytes = 1008;
  const run = (bench: Bench<GpuApi>) => {
    const data = bench.room(bytes);
    bench.launch(bulkPtx, 'op', 1, THREADS, [data, bench.give(halves(bytes / 2, 12)), bytes]);
    return bench.bytes(data, bytes);
  };
  return { ...onHopper, name: 'bulk copy to shared memory', ptx: bulkPtx, run, agree: sameBits('u16') };
}

// stmatrix

const stmatrixPtx = (trans: string) =>
  kernel(
    '.param .u64 to, .param .u64 from',
    '.reg .b32 %a<4>; .shared .align 128 .b8 tile[2048];',
    `ld.param.u64 %to, [to]; ld.param.u64 %from, [from]; mov.u32 %s, tile; mov.u32 %n, 2048;
mul.wide.u32 %o, %t, 16; add.s64 %w3, %from, %o; ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%w3];
shl.b32 %r5, %t, 4; add.s32 %r5, %r5, %s;
stmatrix.sync.aligned.m8n8.x4${trans}.shared.b16 [%r5], {%a0, %a1, %a2, %a3};
bar.sync 0; ${copyWords('OUT', toGlobal)}`,
  );

const stmatrix = (trans: string): MicroKernel => {
  const ptx = stmatrixPtx(trans);
  const run = (bench: Bench<GpuApi>) => {
    const to = bench.room(2048);
    bench.launch(ptx, 'op', 1, THREADS, [to, bench.give(halves(1024, 10))]);
    return bench.bytes(to, 2048);
  };
  return { ...onHopper, name: `stmatrix.x4${trans}`, ptx, run, agree: sameBits('u16') };
};

// Whole kernels

/**
 * nvcc's PTX for any supported driver: of the version that its instructions need, and without the source lines, whose names of
 * functions are not in the file (the virtual GPU reads them, ptxas would refuse).
 */
const asOurs = (ptx: string) =>
  ptx.replace(/^\s*\.(loc|file)\b.*$/gm, '').replace(/^\.version .*$/m, '.version 8.0');
const assembled = asOurs(hopper);
const clusters = asOurs(clusterPtx);

function whole(
  name: string,
  run: (bench: Bench<GpuApi>) => Parameters<typeof bytesOf>[0],
  agree: Agree,
  ptx = assembled,
): MicroKernel {
  return { ...onHopper, name, ptx, run: (bench) => bytesOf(run(bench)), agree };
}

const bf16 = (values: ArrayLike<number>) => Uint16Array.from(values, toBf16);

function wgemm(shape: WgemmShape, exact: boolean): MicroKernel {
  const { m = 128, n = 64, k = 320 } = shape;
  const make = (count: number, seed: number) => (exact ? bf16(integers(count, seed)) : halves(count, seed));
  const [a, b] = [make(m * k, 1), make(n * k, 2)];
  const [left, right] = [a, b].map((bits) => Float64Array.from(bits, fromBf16));
  const agree = exact ? sameBits('f32') : within(bounds(left, (j, q) => right[j * k + q], [m, n, k], 0));
  const name = `TMA and wgmma, ${m} x ${n} x ${k}, ${exact ? 'integers' : 'random'}`;
  return whole(name, (bench) => runWgemm(bench, a, b, shape, assembled), agree);
}

/** Clusters of blocks, by the kernels of virtual-gpu/kernels/cluster.cu. */
const ofClusters = (cluster: number): MicroKernel[] => {
  const shape = { cluster, blocks: 8 };
  return [
    whole(
      `shared memory of the other blocks of ${cluster}`,
      (bench) => runExchange(bench, shape, clusters),
      sameBits('u32'),
      clusters,
    ),
    ...(['multicast', 'multicast_pixels', 'multicast_boxes'] as const).map((kernel) =>
      whole(
        `TMA ${kernel} to ${cluster} blocks`,
        (bench) => runMulticast(kernel, bench, shape, clusters),
        sameBits('u16'),
        clusters,
      ),
    ),
  ];
};

const wholeKernels = (): MicroKernel[] => [
  wgemm({}, true),
  wgemm({}, false),
  wgemm({ m: 200, n: 136, k: 104 }, true),
  whole(
    'wgmma of operands that threads wrote',
    (bench) => runWgmmaSmall(bench, bf16(integers(64 * 16, 3)), bf16(integers(8 * 16, 4)), assembled),
    sameBits('f32'),
  ),
  whole(
    'TMA im2col load, tiled store',
    (bench) => runIm2col(bench, halves(sizeOf(im2colShape), 5), assembled),
    sameBits('u16'),
  ),
  whole(
    'cp.async that signals an mbarrier, bulk store',
    (bench) => runCopySignal(bench, floatsFrom(512, 6), assembled),
    sameBits('f32'),
  ),
];

export const hopperKernels = (): MicroKernel[] => [
  ...([8, 64, 80, 96, 128, 160, 256] as const).flatMap((n) => [
    wgmma(n, 'bf16', true),
    wgmma(n, 'f16', true),
  ]),
  wgmmaOfBytes(160, true),
  wgmmaOfBytes(256, true),
  wgmmaOfBytes(64, false),
  wgmma(160, 'bf16', false),
  wgmma(256, 'f16', false),
  wgmma(64, 'bf16', true, true),
  wgmma(64, 'f16', true, true),
  wgmmaAcross(256, { a: 128, b: 128 }),
  wgmmaAcross(160, { a: 0, b: 64 }),
  wgmmaAcross(80, { a: 128, b: 32 }),
  ...(['load', 'store'] as const).flatMap((how) => [
    box(how, 'NONE', 16, [0, 0, 0]),
    box(how, 'B32', 16, [32, 5, 1]),
    box(how, 'B64', 32, [16, 3, 0]),
    box(how, 'B128', 64, [0, 0, 1]),
    box(how, 'B128', 64, [40, 11, 2]),
  ]),
  // A store that begins below zero was an illegal instruction on an H200.
  box('load', 'B128', 64, [-8, -3, -1]),
  // Nothing of it lies inside: a pair's last tile, which is asked for ahead as well.
  box('load', 'B128', 64, [0, 32, 0]),
  box('load', 'B128', 64, [128, 0, 5]),
  ...[
    [1, 1, 0],
    [-1, -2, 1],
    [3, 4, 0],
    [0, 0, 2],
  ].map(boxOfImage),
  bulkLoad(),
  stmatrix(''),
  stmatrix('.trans'),
  ...wholeKernels(),
  ...[1, 2, 4].flatMap(ofClusters),
  ...(['multicast_pixels', 'multicast_boxes'] as const).map((kernel) =>
    whole(
      `TMA ${kernel} of images that are not there`,
      (bench) => runMulticast(kernel, bench, { missing: 3 }, clusters),
      sameBits('u16'),
      clusters,
    ),
  ),
];
