// The kernels of kernels/cluster.cu as calls: arrays in, arrays out, on the virtual GPU or a real one.
import type { GpuApi } from '../../engine/cuda/api.ts';
import { bf16Map, halves } from './hopper_runs.ts';
import { type Bench, testPtx } from './run_kernel.ts';

export const clusterPtx = testPtx('cluster');

export interface ClusterShape {
  /** Blocks of a cluster, and of the grid. */
  readonly cluster?: number;
  readonly blocks?: number;
  readonly steps?: number;
  /** Images of multicast_pixels and multicast_boxes that are not there: zeros. */
  readonly missing?: number;
  readonly flags?: number;
}

/** Blocks that write into each other's shared memory: pairs (from the block before, to the block after), 64 a block. */
export function runExchange(
  bench: Bench<GpuApi>,
  { cluster = 2, blocks = 4, flags = 0 }: ClusterShape = {},
  ptx = clusterPtx,
): Int32Array {
  const x = Int32Array.from({ length: blocks * 64 }, (_, i) => 1000 + i);
  const y = bench.room(blocks * 128 * 4);
  bench.launch(ptx, 'exchange', blocks, 64, [bench.give(x), y, flags], 0, { cluster });
  return bench.ints(y, blocks * 128);
}

/** What it should give. */
export function exchanged({ cluster = 2, blocks = 4 }: ClusterShape = {}): Int32Array {
  return Int32Array.from({ length: blocks * 128 }, (_, at) => {
    const [block, t, own] = [Math.floor(at / 128), Math.floor((at % 128) / 2), at % 2];
    const [first, rank] = [block - (block % cluster), block % cluster];
    const before = first + ((rank + cluster - 1) % cluster);
    return 1000 + (own ? block * 64 + 63 - t : before * 64 + t);
  });
}

/** Halves that a step brings to each block: two boxes of 8 rows or pixels of 64. */
const STEP_HALVES = 1024;

type Multicast = 'multicast' | 'multicast_pixels' | 'multicast_boxes';

const IMAGE_HALVES = 9 * 64;
/** [16 steps][64] halves, or images [2 steps][1][9][64] of which the pixels 1 to 8 are read. */
const inputOf = (kernel: Multicast, steps: number, missing: number) =>
  halves(kernel === 'multicast' ? steps * STEP_HALVES : (2 * steps - missing) * IMAGE_HALVES, 21);

/** Two boxes a step, brought to all blocks of a cluster by turns: what each block saw. */
export function runMulticast(
  kernel: Multicast,
  bench: Bench<GpuApi>,
  { cluster = 2, blocks = 4, steps = 5, missing = 0, flags = 0 }: ClusterShape = {},
  ptx = clusterPtx,
): Uint16Array {
  const x = bench.give(inputOf(kernel, steps, missing));
  const images = bf16Map([64, 9, 1, 2 * steps - missing], [128, 2 * IMAGE_HALVES, 2 * IMAGE_HALVES], x);
  const { gpu } = bench;
  const maps: Record<Multicast, () => Uint8Array> = {
    multicast: () =>
      gpu.cuTensorMapEncodeTiled({
        ...bf16Map([64, 16 * steps, 1], [128, 2048 * steps], x),
        ...{ boxDim: [64, 8, 1], swizzle: 0 },
      }),
    multicast_pixels: () =>
      gpu.cuTensorMapEncodeIm2col({
        ...images,
        ...{ pixelBoxLowerCorner: [0, 0], pixelBoxUpperCorner: [-1, 0], swizzle: 0 },
        ...{ channelsPerPixel: 64, pixelsPerColumn: 8 },
      }),
    multicast_boxes: () => gpu.cuTensorMapEncodeTiled({ ...images, boxDim: [64, 8, 1, 1], swizzle: 0 }),
  };
  const y = bench.room(blocks * steps * STEP_HALVES * 2);
  bench.launch(ptx, kernel, blocks, 64, [maps[kernel](), y, steps, flags], 0, { cluster });
  return new Uint16Array(bench.ints(y, (blocks * steps * STEP_HALVES) / 2).buffer);
}

/** What it should give. */
export function multicasted(
  kernel: Multicast,
  { blocks = 4, steps = 5, missing = 0 }: ClusterShape = {},
): Uint16Array {
  const x = inputOf(kernel, steps, missing);
  const seen = kernel === 'multicast' ? x : x.filter((_, i) => i % IMAGE_HALVES >= 64);
  const all = steps * STEP_HALVES;
  return Uint16Array.from({ length: blocks * all }, (_, i) => seen[i % all] ?? 0);
}
