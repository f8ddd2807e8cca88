// The kernels of kernels/hopper.cu as calls: arrays in, arrays out, on the virtual GPU or a real one.
import { type GpuApi, TensorMapDataType, TensorMapSwizzle } from '../../engine/cuda/api.ts';
import { toBf16 } from './numbers.ts';
import { type Bench, floatsFrom, testPtx } from './run_kernel.ts';

export const hopper = testPtx('hopper');

/** Repeatable bfloat16 numbers from -1 to 1, as bits. */
export const halves = (count: number, seed: number) => Uint16Array.from(floatsFrom(count, seed), toBf16);

/** What both kinds of map over bfloat16 say, in swizzled rows of 128 bytes. */
export const bf16Map = (dims: readonly number[], strides: readonly number[], address: bigint) => ({
  dataType: TensorMapDataType.BFLOAT16,
  globalAddress: address,
  globalDim: dims,
  globalStrides: strides,
  elementStrides: dims.map(() => 1),
  swizzle: TensorMapSwizzle.B128,
});

export interface WgemmShape {
  readonly m?: number;
  readonly n?: number;
  readonly k?: number;
  readonly flags?: number;
  readonly sharedBytes?: number;
}

/** a[m, k] b[n, k]^T by TMA, mbarriers and wgmma. */
export function runWgemm(
  bench: Bench<GpuApi>,
  a: Uint16Array,
  b: Uint16Array,
  { m = 128, n = 64, k = 320, flags = 0, sharedBytes = 3 * 24576 + 1024 }: WgemmShape = {},
  ptx = hopper,
): Float32Array {
  const d = bench.room(m * n * 4);
  const mapOf = (values: Uint16Array, rows: number, box: number) =>
    bench.gpu.cuTensorMapEncodeTiled({
      ...bf16Map([k, rows], [k * 2], bench.give(values)),
      boxDim: [64, box],
    });
  const args = [mapOf(a, m, 128), mapOf(b, n, 64), d, m, n, k, flags];
  bench.launch(ptx, 'wgemm', [Math.ceil(n / 64), Math.ceil(m / 128), 1], 384, args, sharedBytes);
  return bench.floats(d, m * n);
}

/** [64, 32] times [8, 32] transposed, a from registers. */
export function runWgmmaRegisters(bench: Bench, a: Uint16Array, b: Uint16Array, ptx = hopper): Float32Array {
  const d = bench.room(64 * 8 * 4);
  bench.launch(ptx, 'wgmma_registers', 1, 128, [bench.give(a), bench.give(b), d]);
  return bench.floats(d, 512);
}

/** a[64, 16] b[8, 16]^T by one wgmma of operands without swizzle. */
export function runWgmmaSmall(
  bench: Bench<GpuApi>,
  a: Uint16Array,
  b: Uint16Array,
  ptx = hopper,
): Float32Array {
  const d = bench.room(64 * 8 * 4);
  bench.launch(ptx, 'wgmma_small', 1, 128, [bench.give(a), bench.give(b), d]);
  return bench.floats(d, 512);
}

export const im2colShape = [2, 10, 12, 64] as const;

/** One tap of a 3 x 3 convolution with padding 1 over x of im2colShape, 64 pixels from (7, 3) on. */
export function runIm2col(bench: Bench<GpuApi>, x: Uint16Array, ptx = hopper): Uint16Array {
  const [n, h, w, c] = im2colShape;
  const y = bench.room(64 * 128);
  const mapX = bench.gpu.cuTensorMapEncodeIm2col({
    ...bf16Map([c, w, h, n], [c * 2, w * c * 2, h * w * c * 2], bench.give(x)),
    pixelBoxLowerCorner: [-1, -1],
    pixelBoxUpperCorner: [-1, -1],
    channelsPerPixel: 64,
    pixelsPerColumn: 64,
  });
  const mapY = bench.gpu.cuTensorMapEncodeTiled({ ...bf16Map([64, 64], [128], y), boxDim: [64, 64] });
  bench.launch(ptx, 'im2col', 1, 32, [mapX, mapY, 7, 3], 8192 + 1024);
  return new Uint16Array(bench.ints(y, 2048).buffer);
}

/** 512 numbers, doubled and turned by 128, through cp.async that signals an mbarrier and a bulk store. */
export function runCopySignal(bench: Bench<GpuApi>, x: Float32Array, ptx = hopper): Float32Array {
  const y = bench.room(2048);
  bench.launch(ptx, 'copy_signal', 1, 128, [bench.give(x), y]);
  return bench.floats(y, 512);
}
