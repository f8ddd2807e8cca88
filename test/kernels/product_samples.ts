// Shapes for the matrix products beyond the records' own, on Ampere's path and on Hopper's (kernel_samples.ts says how plans are
// brought to cut them): edges of tiles, every epilogue, split sums, pairs of blocks, float32's halves, few channels.
import type { TileName } from '../../engine/cuda/plan_sm90.ts';
import type { AnySample } from '../support/op_cases.ts';

export interface FurtherSample {
  readonly sample: AnySample;
  readonly multiprocessors: number;
  /** Less shared memory than the GPU has, so that less fits. */
  readonly sharedBytes?: number;
  /** How many such updates, or layers of one x, run in one launch. */
  readonly together?: number;
  /** Meant for large tiles, which float32 has none of. */
  readonly large?: true;
  /** Run on Hopper alone; every product in `tile`, its k in `splits`, by pairs of blocks, where those are given. */
  readonly hopper?: { readonly tile?: TileName; readonly splits?: number; readonly paired?: boolean };
  /** Meant for float32's products on Hopper alone, and large enough to be worth their halves. */
  readonly float32?: true;
  /** Whether its gradients, which go by other kernels, are left to other samples. */
  readonly forward?: true;
}

export const one = (sample: AnySample): FurtherSample => ({ sample, multiprocessors: 1 });
export const large = (sample: AnySample): FurtherSample => ({ ...one(sample), large: true });

type Extra = 'bias' | 'shift' | 'residual';

interface Layer {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly activation?: string;
  readonly extras?: readonly Extra[];
  readonly splits?: number;
}

function linear({ m, n, k, activation = 'none', extras = [] }: Layer): AnySample {
  const h = activation === 'geglu' ? 2 * n : n;
  const optional = { bias: [h], residual: [m, n], shift: [] };
  const chosen = extras.map((name) => [name, optional[name]] as const);
  return { inputs: { x: [m, k], weight: [h, k], ...Object.fromEntries(chosen) }, attrs: { activation } };
}

/** The same with operands in 8-bit floats. */
function fp8(layer: Layer): AnySample {
  const { inputs, attrs } = linear(layer);
  const { x, weight, ...more } = inputs;
  return {
    inputs: { x, x_scale: [1], weight, weight_scale: [1], ...more },
    attrs: { ...(attrs as object), dtype: 'float32' },
    ints: { x: 56, weight: 56 },
    dtypes: { x: 'uint8', weight: 'uint8', x_scale: 'float32', weight_scale: 'float32' },
    nonnegative: ['x_scale', 'weight_scale'],
  };
}

type Padding = readonly [top: number, left: number, bottom: number, right: number];

interface Convolution {
  readonly x: readonly [n: number, h: number, w: number, c: number];
  /** Channels beside x's. */
  readonly skip?: number;
  readonly o: number;
  readonly side: number;
  readonly stride?: number;
  readonly padding?: Padding;
  readonly extras?: readonly Extra[];
  readonly splits?: number;
}

function conv2d(image: Convolution): AnySample {
  const { x, skip = 0, o, side, stride = 1, padding = [0, 0, 0, 0], extras = [] } = image;
  const [n, h, w, c] = x;
  const oh = Math.floor((h + padding[0] + padding[2] - side) / stride) + 1;
  const ow = Math.floor((w + padding[1] + padding[3] - side) / stride) + 1;
  const optional = { bias: [o], shift: [n, o], residual: [n, oh, ow, o] };
  const chosen = extras.map((name) => [name, optional[name]] as const);
  const beside: Record<string, number[]> = skip ? { skip: [n, h, w, skip] } : {};
  return {
    inputs: { x, ...beside, weight: [o, side, side, c + skip], ...Object.fromEntries(chosen) },
    attrs: { stride, padding },
  };
}

const all: readonly Extra[] = ['bias', 'shift', 'residual'];
const around: Padding = [1, 1, 1, 1];

const largeLayers: readonly Layer[] = [
  { m: 136, n: 144, k: 136, extras: ['bias'] },
  { m: 130, n: 129, k: 72, activation: 'quick_gelu', extras: ['bias', 'residual'] },
  { m: 129, n: 136, k: 72, activation: 'geglu', extras: ['bias', 'residual'] },
  { m: 70, n: 75, k: 64, activation: 'geglu', extras: ['bias'] },
  { m: 80, n: 72, k: 40, activation: 'silu' },
  { m: 80, n: 72, k: 40, activation: 'gelu' },
  { m: 72, n: 72, k: 1096, activation: 'gelu', extras: ['bias', 'residual'] },
  { m: 72, n: 77, k: 1096, activation: 'silu', extras: ['residual'] },
  { m: 1100, n: 72, k: 72 },
];
// Small tiles with k in splits.
const layers: readonly Layer[] = [
  { m: 18, n: 66, k: 1100, activation: 'quick_gelu', extras: ['bias', 'residual'] },
  { m: 19, n: 40, k: 1100, activation: 'gelu', extras: ['bias', 'residual'] },
  { m: 17, n: 34, k: 1100, activation: 'gelu', extras: ['bias'] },
  { m: 20, n: 28, k: 1100, activation: 'silu', extras: ['residual'] },
  // Few rows, and k for several turns of a lane.
  { m: 2, n: 5, k: 1544, activation: 'silu', extras: ['bias', 'residual'] },
  { m: 1, n: 3, k: 2064, activation: 'gelu', extras: ['bias'] },
  { m: 2, n: 7, k: 40 },
  { m: 16, n: 3, k: 1304, activation: 'quick_gelu', extras: ['bias', 'residual'] },
  { m: 9, n: 6, k: 776, extras: ['residual'] },
  { m: 1100, n: 24, k: 27 },
  { m: 9, n: 1600, k: 27 },
];

const largeImages: readonly Convolution[] = [
  { x: [1, 12, 13, 72], o: 80, side: 3, padding: around, extras: all },
  { x: [2, 17, 15, 72], o: 72, side: 3, stride: 2, padding: [0, 0, 1, 1], extras: ['bias'] },
  { x: [1, 8, 9, 128], o: 72, side: 3, padding: around, extras: all },
  { x: [1, 33, 33, 72], o: 72, side: 1 },
  { x: [1, 9, 8, 72], skip: 56, o: 72, side: 1, extras: ['bias'] },
];
const images: readonly Convolution[] = [
  { x: [1, 5, 5, 120], o: 23, side: 3, padding: around, extras: all },
  { x: [1, 13, 12, 40], o: 24, side: 3, padding: around },
  { x: [1, 5, 5, 120], o: 120, side: 3, padding: around, extras: ['shift'] },
  { x: [1, 9, 8, 24], o: 24, side: 3, stride: 2, padding: [0, 0, 1, 1] },
  // Pixels in splits, for few channels.
  { x: [1, 33, 33, 8], o: 16, side: 1 },
  { x: [1, 40, 41, 3], o: 5, side: 1 },
];

// Each way through the epilogue without splits, which leave it to the join; more rows of tiles than a band has.
const hopperLayers: readonly Layer[] = [
  { m: 200, n: 264, k: 136, extras: ['bias', 'residual'] },
  { m: 129, n: 64, k: 328, extras: ['bias'] },
  // Fewer steps than stages: the ring orders nothing between two items, of three, so that a warpgroup of two in turn has two.
  { m: 257, n: 64, k: 64, extras: ['bias'] },
  { m: 2056, n: 176, k: 64, extras: ['residual'] },
];
const hopperActivated: readonly Layer[] = [
  { m: 129, n: 64, k: 328, activation: 'gelu', extras: ['bias'] },
  { m: 1032, n: 176, k: 64, activation: 'silu', extras: ['residual'] },
  { m: 70, n: 72, k: 264, activation: 'quick_gelu', extras: ['bias', 'residual'], splits: 3 },
  { m: 70, n: 200, k: 72, activation: 'quick_gelu', extras: ['bias', 'residual'] },
];
const hopperGated: readonly Layer[] = [
  { m: 150, n: 136, k: 72, activation: 'geglu', extras: ['bias', 'residual'] },
  { m: 64, n: 88, k: 200, activation: 'geglu' },
  { m: 130, n: 168, k: 64, activation: 'geglu', extras: ['bias'] },
];
const byteLayers: readonly Layer[] = [
  // Several items to a warpgroup, each with a residual.
  { m: 70, n: 504, k: 160, activation: 'gelu', extras: ['bias', 'residual'] },
  { m: 130, n: 200, k: 528, extras: ['bias'], splits: 2 },
  { m: 129, n: 320, k: 144, activation: 'silu' },
  { m: 70, n: 136, k: 80, activation: 'geglu', extras: ['bias'] },
  { m: 130, n: 264, k: 64, activation: 'geglu' },
  // More steps than stages.
  { m: 64, n: 88, k: 720, activation: 'geglu', extras: ['bias', 'residual'] },
];
const hopperImages: readonly Convolution[] = [
  { x: [2, 9, 9, 40], o: 64, side: 3, padding: around, extras: all },
  { x: [3, 9, 12, 24], o: 72, side: 3, stride: 2, padding: [0, 0, 1, 1], extras: ['bias'] },
  { x: [1, 10, 13, 200], o: 264, side: 1, extras: all },
  { x: [2, 9, 8, 264], o: 72, side: 1, extras: all, splits: 2 },
  // Channels in two tensors: x's not in whole steps, more steps of either than stages; both within each tap.
  { x: [1, 9, 8, 200], skip: 520, o: 72, side: 1, extras: ['bias'] },
  { x: [1, 9, 8, 72], skip: 24, o: 64, side: 3, padding: around },
  // Tiles that are boxes of an image: several rows of it, parts of one, of two images side by side, of a larger one.
  { x: [2, 16, 16, 40], o: 64, side: 3, padding: around, extras: all },
  { x: [1, 3, 256, 24], o: 72, side: 1, extras: ['bias'] },
  { x: [1, 8, 32, 72], skip: 24, o: 64, side: 3, padding: around },
  { x: [1, 18, 18, 24], o: 72, side: 3, extras: ['bias'] },
  { x: [3, 8, 16, 40], o: 72, side: 3, padding: around, extras: all }, // but for a tall tile, of two images
  { x: [1, 16, 16, 72], o: 64, side: 2, padding: [1, 1, 0, 0] },
];

/** Few channels in or out, beside im2col and col2im; strides, whose gradient of x spreads dy. */
const hopperNarrow: readonly Convolution[] = [
  { x: [2, 10, 13, 4], o: 72, side: 3, padding: around, extras: ['bias', 'residual'] },
  { x: [1, 12, 9, 5], o: 24, side: 3, stride: 2, padding: [0, 0, 1, 1] },
  { x: [1, 9, 9, 72], o: 3, side: 3, padding: around, extras: all },
  { x: [2, 8, 9, 40], o: 8, side: 3, extras: ['bias'] },
  { x: [1, 16, 15, 24], o: 16, side: 3, stride: 2, padding: around },
  { x: [2, 17, 12, 16], o: 24, side: 1, stride: 3 },
];

const halvedNarrow: Convolution = { x: [1, 16, 17, 264], o: 3, side: 3, padding: around, extras: all };

/** For pairs of blocks: an odd number of tiles down, whose last pair has one outside C, and several items to a pair. */
const pairedLayers: readonly Layer[] = [
  { m: 270, n: 168, k: 200, extras: ['bias', 'residual'] },
  { m: 200, n: 328, k: 264, splits: 2 },
];
const pairedActivated: readonly Layer[] = [
  { m: 270, n: 168, k: 72, activation: 'gelu', extras: ['bias', 'residual'] },
];
const pairedGated: readonly Layer[] = [
  { m: 270, n: 136, k: 264, activation: 'geglu', extras: ['bias', 'residual'] },
];
const pairedBytes: readonly Layer[] = [
  { m: 270, n: 200, k: 528, extras: ['bias'], splits: 2 },
  { m: 270, n: 136, k: 272, activation: 'geglu', extras: ['bias', 'residual'] },
];
const pairedImages: readonly Convolution[] = [
  { x: [2, 9, 17, 40], o: 64, side: 3, padding: around, extras: all },
  { x: [5, 9, 12, 24], o: 136, side: 1, extras: ['bias'] },
  { x: [3, 9, 12, 128], skip: 72, o: 80, side: 1, extras: ['bias'] },
  { x: [3, 16, 8, 40], o: 136, side: 3, padding: around, extras: all },
];

// Products of float32 on Hopper: as those of the half types, but that few are too small for it.
const halvedLayers: readonly Layer[] = [
  { m: 200, n: 264, k: 136, extras: ['bias', 'residual'] },
  { m: 250, n: 248, k: 72, activation: 'gelu' },
  { m: 257, n: 264, k: 64 },
  { m: 300, n: 264, k: 264, activation: 'silu', extras: ['bias', 'residual'], splits: 3 },
];
const halvedImages: readonly Convolution[] = [
  { x: [2, 9, 9, 40], o: 136, side: 3, padding: around, extras: all },
  { x: [3, 17, 16, 56], o: 136, side: 3, stride: 2, padding: [0, 0, 1, 1], extras: ['bias'] },
  { x: [1, 10, 13, 200], o: 264, side: 1, extras: all },
  { x: [2, 13, 12, 40], o: 136, side: 3, padding: around, extras: all, splits: 2 },
  { x: [2, 17, 8, 72], skip: 136, o: 264, side: 1, extras: ['bias'] },
  { x: [2, 8, 16, 40], skip: 24, o: 248, side: 3, padding: around },
  { x: [2, 9, 16, 40], skip: 24, o: 248, side: 3, padding: around },
  { x: [1, 3, 128, 72], o: 136, side: 3, padding: around, extras: all },
];
const pairedHalvedLayers: readonly Layer[] = [{ m: 270, n: 264, k: 200, extras: ['bias', 'residual'] }];
const pairedHalvedImages: readonly Convolution[] = [
  { x: [2, 9, 17, 40], o: 136, side: 3, padding: around, extras: all },
  { x: [5, 9, 12, 72], o: 136, side: 1, extras: ['bias'] },
  { x: [3, 16, 8, 40], o: 136, side: 3, padding: around, extras: all },
];

/** Batches of products, in every pairing of layouts. */
function matmul(transA: boolean, transB: boolean, [m, k, n] = [72, 40, 88]): FurtherSample {
  const inputs = { a: transA ? [2, k, m] : [2, m, k], b: transB ? [2, n, k] : [2, k, n] };
  return { sample: { inputs, attrs: { transA, transB } }, multiprocessors: 1, hopper: {} };
}

/** Each of the shapes in each of the tiles, on Hopper. */
function tiled<S extends Layer | Convolution>(
  tiles: readonly TileName[],
  shapes: readonly S[],
  sampleOf: (shape: S) => AnySample,
  paired = false,
): FurtherSample[] {
  return tiles.flatMap((tile) =>
    shapes.map((shape) => ({
      sample: sampleOf(shape),
      multiprocessors: 1,
      hopper: { tile, splits: shape.splits ?? 1, paired },
    })),
  );
}

/** The same in float32. */
const halved = <S extends Layer | Convolution>(
  shapes: readonly S[],
  sampleOf: (shape: S) => AnySample,
  paired = false,
): FurtherSample[] =>
  tiled(['256', '128_pingpong'], shapes, sampleOf, paired).map((further) => ({ ...further, float32: true }));

const linears: readonly FurtherSample[] = [
  ...largeLayers.map((layer) => large(linear(layer))),
  ...layers.map((layer) => one(linear(layer))),
  ...tiled(['256', '160', '160_pingpong', '160_tall', '80'], hopperLayers, linear),
  ...tiled(['160', '80'], hopperActivated, linear),
  ...tiled(['256', '160_pingpong'], hopperGated, linear),
  ...tiled(['256', '160', '160_pingpong', '160_tall', '80'], pairedLayers, linear, true),
  ...tiled(['160', '80'], pairedActivated, linear, true),
  ...tiled(['256', '160_pingpong'], pairedGated, linear, true),
  ...halved(halvedLayers, linear),
  ...halved(pairedHalvedLayers, linear, true),
];
/** Two or three layers of one x: tiles at the edges, several items to a block, fewer steps than stages, pairs. */
const threeLayers: readonly Layer[] = [
  { m: 136, n: 168, k: 200 },
  { m: 70, n: 64, k: 64 },
  { m: 390, n: 40, k: 64 }, // many items of one step, with little between two stores
];
const projections: readonly FurtherSample[] = [
  ...tiled(['256', '160', '160_pingpong'], threeLayers, linear),
  ...tiled(['256', '160', '160_pingpong'], [threeLayers[0]], linear, true),
  ...tiled(['256'], [{ m: 70, n: 66, k: 64 }], linear), // which TMA cannot store
].map((further, i) => ({ ...further, together: i % 4 ? 3 : 2 }));
const isActivated = ({ sample }: FurtherSample): boolean =>
  (sample.attrs as { activation: string }).activation !== 'none';

/** By op. */
export const productSamples: Record<string, readonly FurtherSample[]> = {
  linear: [...linears.filter((further) => !isActivated(further)), ...projections],
  linear_activated: linears.filter(isActivated),
  linear_fp8: [
    ...tiled(['256', '160_pingpong'], byteLayers, fp8),
    ...tiled(['256', '160_pingpong'], pairedBytes, fp8, true),
  ],
  matmul: [
    ...[matmul(false, false), matmul(false, true), matmul(true, false)],
    { ...matmul(false, true, [136, 136, 264]), float32: true },
    { ...matmul(false, false, [136, 136, 264]), float32: true },
    { ...matmul(false, false, [264, 200, 136]), float32: true },
  ],
  conv2d: [
    ...largeImages.map((image) => large(conv2d(image))),
    ...images.map((image) => one(conv2d(image))),
    ...tiled(['256', '160', '160_pingpong', '160_tall', '128_pingpong'], hopperImages, conv2d),
    ...tiled(['256', '160', '160_pingpong', '160_tall', '128_pingpong'], pairedImages, conv2d, true),
    ...hopperNarrow.map((image) => ({ ...one(conv2d(image)), hopper: {} })),
    // Of float32's halves, an odd number of columns.
    { ...one(conv2d(halvedNarrow)), hopper: {}, float32: true, forward: true },
    ...[...halved(halvedImages, conv2d), ...halved(pairedHalvedImages, conv2d, true)].map(
      (further): FurtherSample => ({ ...further, forward: true }),
    ),
  ],
};
