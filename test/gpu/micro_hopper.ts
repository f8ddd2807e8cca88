// Micro-kernels of what sm_90a adds: wgmma (micro_wgmma.ts), boxes by TMA in each swizzle as they lie in shared memory, stmatrix; and the
// kernels of virtual-gpu/kernels/hopper.cu and cluster.cu, where all of it works together.
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
import { fromBf16, toBf16 } from '../virtual-gpu/numbers.ts';
import { type Bench, bytesOf, floatsFrom } from '../virtual-gpu/run_kernel.ts';
import { type Agree, sameBits, within } from './agreement.ts';
import type { MicroKernel } from './micro.ts';
import { bounds, integers } from './micro_matrix.ts';
import { copyWords, kernel, onHopper, THREADS, toGlobal, toShared } from './micro_sm90.ts';
import { wgmmaKernels } from './micro_wgmma.ts';

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
  ...wgmmaKernels(),
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
