// conv2d's products on Hopper (conv2d_sm90.cu, conv2d_backward_sm90.cu): what their operands, sizes and grids of pixels are. The
// pixels of a tile are a box of the image where they are whole rows of the grid, as at SDXL's own sizes. Else TMA's im2col walks a grid
// of base pixels over the image, row by row and image by image, which it takes from the corners of a bounding box.
import type { KernelArgument } from './manifest.ts';
import type { PlanContext } from './plan.ts';
import { divideUp } from './plan.ts';
import { splitSteps } from './plan_float32_sm90.ts';
import {
  across,
  along,
  boxColumns,
  type HopperProduct,
  hopperTakes,
  mapOf,
  type Operand,
  type Slabs,
  STEP,
  type Tile,
} from './plan_sm90.ts';

/** Pixel (x, y) of the grid stands at (x * stride + left, y * stride + top) of the image [n, h, w, channels]. */
interface Grid {
  readonly address: bigint;
  readonly image: readonly [n: number, h: number, w: number, channels: number];
  readonly height: number;
  readonly width: number;
  readonly stride: number;
  readonly top: number;
  readonly left: number;
}

/** `width` pixels of 64 channels, or where the pixels lie along k, 64 pixels of a chunk of the tile's width of channels. */
const pixels =
  (g: Grid, alongChannels: boolean): Operand =>
  (width, { dtype, tiledMap, im2colMap }) => {
    const [n, h, w, c] = g.image;
    const channels = alongChannels ? STEP : boxColumns(width);
    const count = alongChannels ? width : STEP;
    const common = {
      ...mapOf(g.address, channels, dtype),
      globalDim: [c, w, h, n],
      globalStrides: [2 * c, 2 * w * c, 2 * h * w * c],
      elementStrides: [1, g.stride, g.stride, 1],
    };
    if (isBoxed(g, count)) {
      const across = Math.min(g.width, count);
      return tiledMap({ ...common, boxDim: [channels, across, count / across, 1] });
    }
    return im2colMap({
      ...common,
      ...{ pixelBoxLowerCorner: [g.left, g.top], pixelBoxUpperCorner: upperCorner(g) },
      ...{ channelsPerPixel: channels, pixelsPerColumn: count },
    });
  };

/** Whether every `count` pixels are whole rows of the grid, or a part of one, and of one image. */
const isBoxed = ({ width, height, stride }: Grid, count: number): boolean =>
  stride === 1 && (width % count === 0 || (count % width === 0 && height % (count / width) === 0));

/** Base pixels stay below the image's end plus this, so that there are width x height of them. */
const upperCorner = ({ image: [, h, w], width, height, stride, left, top }: Grid): number[] => [
  left + (width - 1) * stride + 1 - w,
  top + (height - 1) * stride + 1 - h,
];

/** Corners are signed bytes of a map, and a tap's offset an unsigned one of an instruction, 255 not among them. */
const isGrid = (g: Grid, ...filter: readonly number[]): boolean =>
  [g.left, g.top, ...upperCorner(g)].every((corner) => corner >= -128 && corner < 128) &&
  filter.every((size) => size <= 255) &&
  g.stride <= 8;

const matrix = (address: bigint, rows: number, columns: number): Slabs => ({
  ...{ address, rows, columns, stride: columns },
});

/** A slab of a weight [o, planes, kh, kw, c] for each of its taps. */
function weights(address: bigint, [, , , c, , , o, kh, kw]: readonly number[], planes = 1): Slabs {
  const slabs = planes * kh * kw;
  return { address, rows: o, columns: c, slabs, stride: slabs * c, slabStride: c };
}

/** The input's pixels under the first tap of every pixel of the output. */
function inputGrid(address: bigint, channels: number, geometry: readonly number[], planes = 1): Grid {
  const [n, h, w, , oh, ow, , , , stride, padTop, padLeft] = geometry;
  const image = [planes * n, h, w, channels] as const;
  return { address, image, height: oh, width: ow, stride, top: -padTop, left: -padLeft };
}

type Operands = Pick<HopperProduct, 'kind' | 'a' | 'b' | 'y'> &
  Partial<Pick<HopperProduct, 'bias' | 'residual'>>;

type Convolution = Omit<HopperProduct, 'partial'>;

/** The product of these sizes whose pixels are `g`'s; `parameters` makes its kernel's own of the grid's. */
function productOver(
  g: Grid,
  [m, n, steps, slabs]: readonly number[],
  [, , , , , , , kh, kw]: readonly number[],
  operands: Operands,
  context: PlanContext,
  parameters: (grid: readonly number[], tile: Tile, a: Uint8Array) => readonly KernelArgument[] = (grid) =>
    grid,
): Convolution | undefined {
  if (!(context.dtype === 'float32' || hopperTakes(m, n, context)) || !isGrid(g, kh, kw)) return undefined;
  const count = (tile: Tile) => (operands.kind === 'backward_weight' ? STEP : tile.m);
  const gridFor = (tile: Tile) => [
    ...[g.width, g.height, g.stride, g.left, g.top, Number(isBoxed(g, count(tile)))],
    ...[kh * kw, kw, divideUp(g.image[3], STEP)],
  ];
  const own = (tile: Tile, a: Uint8Array) => parameters(gridFor(tile), tile, a);
  const family = operands.kind.startsWith('backward') ? 'conv2d_backward_sm90' : 'conv2d_sm90';
  return { family, m, n, steps, slabs, bias: 0n, residual: 0n, own, ...operands };
}

type Planned = (
  pointers: readonly bigint[],
  geometry: readonly number[],
  context: PlanContext,
) => Convolution | undefined;

const forward: Planned = (pointers, geometry, context) => {
  const [n, , , c, oh, ow, o, kh, kw, , , , own = c] = geometry;
  const [y, x, weight, bias = 0n, shift = 0n, residual = 0n, skip = 0n] = pointers;
  const halved = context.dtype === 'float32';
  const planes = halved ? 2 : 1;
  const skipSteps = divideUp(c - own, STEP);
  const [m, passSteps] = [n * oh * ow, kh * kw * (divideUp(own, STEP) + skipSteps)];
  const g = inputGrid(x, own, geometry, planes);
  const beside = pixels(inputGrid(skip, c - own, geometry, planes), true);
  const operands = {
    kind: halved ? 'split_forward' : 'forward',
    ...{ a: pixels(g, true), b: along(weights(weight, geometry, planes), 2), y: matrix(y, m, o) },
    ...{ bias, residual },
  } as const;
  const sizes = [m, o, halved ? splitSteps(passSteps) : passSteps, 1];
  return productOver(g, sizes, geometry, operands, context, (grid, tile, a) => [
    ...[shift, oh * ow, ...grid, skipSteps ? beside(tile.m, context) : a, skipSteps, own],
  ]);
};

const backwardWeight: Planned = ([dw, dy, x], geometry, context) => {
  const [n, , , c, oh, ow, o, kh, kw] = geometry;
  const g = inputGrid(x, c, geometry);
  const [a, b] = [across(matrix(dy, n * oh * ow, o)), pixels(g, false)];
  const operands = { kind: 'backward_weight', a, b, y: weights(dw, geometry) } as const;
  return productOver(g, [o, c, divideUp(n * oh * ow, STEP), kh * kw], geometry, operands, context);
};

const backwardX: Planned = ([dx, dy, weight], geometry, context) => {
  const [n, h, w, c, oh, ow, o, kh, kw, stride, padTop, padLeft] = geometry;
  // Strides leave holes between the pixels that a tap of dx sees.
  if (stride !== 1) return undefined;
  const [top, left] = [padTop - kh + 1, padLeft - kw + 1];
  const g = { address: dy, image: [n, oh, ow, o], height: h, width: w, stride, top, left } as const;
  const [a, b] = [pixels(g, true), across(weights(weight, geometry))];
  const operands = { kind: 'backward_x', a, b, y: matrix(dx, n * h * w, c) } as const;
  return productOver(g, [n * h * w, c, kh * kw * divideUp(o, STEP), 1], geometry, operands, context);
};

/**
 * The product under a convolution's symbol; undefined where these kernels do not take it. Of float32 they take the forward alone,
 * whose operands are halves (plan_conv2d_float32.ts).
 */
export function hopperConvolution(
  symbol: string,
  pointers: readonly bigint[],
  geometry: readonly number[],
  context: PlanContext,
): Convolution | undefined {
  const [, , , c, , , o, , , , , , own = c] = geometry;
  if (c % 8 || o % 8 || own % 8 || pointers.some((at) => at % 16n !== 0n)) return undefined;
  if (symbol === 'conv2d_forward') return forward(pointers, geometry, context);
  if (context.dtype === 'float32') return undefined;
  const planned = symbol === 'conv2d_backward_weight' ? backwardWeight : backwardX;
  return planned(pointers, geometry, context);
}
