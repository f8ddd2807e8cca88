// conv2d's products on Hopper (conv2d_sm90.cu): what their operands, sizes and grids of pixels are. The pixels of a tile are a box
// of the image where they are whole rows of the grid, as at SDXL's own sizes. Else TMA's im2col walks a grid of base pixels over the
// image, row by row and image by image, which it takes from the corners of a bounding box.
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
  ROWS,
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

/**
 * The product under a convolution's symbol; undefined where these kernels do not take it. Of float32 the operands are halves
 * (plan_conv2d_float32.ts).
 */
export function hopperConvolution(
  symbol: string,
  pointers: readonly bigint[],
  geometry: readonly number[],
  context: PlanContext,
): Omit<HopperProduct, 'partial'> | undefined {
  const [n, h, w, c, oh, ow, o, kh, kw, stride, padTop, padLeft, own = c] = geometry;
  if (c % 8 || o % 8 || own % 8 || pointers.some((at) => at % 16n !== 0n)) return undefined;
  const [taps, forward] = [kh * kw, symbol === 'conv2d_forward'];
  const halved = context.dtype === 'float32';
  if (halved && !forward) return undefined;
  const [address, first, second, bias = 0n, shift = 0n, residual = 0n, skip = 0n] = pointers;
  const planes = halved ? 2 : 1;
  const image = (at: bigint, channels: number): Grid => ({
    ...{ address: at, image: [planes * n, h, w, channels], height: oh, width: ow },
    ...{ stride, top: -padTop, left: -padLeft },
  });
  const weight = (at: bigint): Slabs => ({
    ...{ address: at, rows: o, columns: c, slabs: planes * taps, stride: planes * taps * c, slabStride: c },
  });
  const product = (
    [rows, columns, steps, slabs]: readonly number[],
    g: Grid,
    rest: Pick<HopperProduct, 'kind' | 'a' | 'b' | 'y'>,
    parameters: (grid: readonly number[], a: Uint8Array) => readonly KernelArgument[] = (grid) => grid,
  ) => {
    if (!(halved || hopperTakes(rows, columns, context)) || !isGrid(g, kh, kw)) return undefined;
    const [operand, count] =
      rest.kind === 'backward_weight' ? (['b', STEP] as const) : (['a', ROWS] as const);
    const boxed = isBoxed(g, count);
    const grid = [
      ...[g.width, g.height, g.stride, g.left, g.top, Number(boxed)],
      ...[taps, kw, divideUp(g.image[3], STEP)],
    ];
    const walked = boxed ? undefined : operand;
    const entry = { walked, own: (_: Tile, a: Uint8Array) => parameters(grid, a) };
    return { family: 'conv2d_sm90', m: rows, n: columns, steps, slabs, bias, residual, ...entry, ...rest };
  };
  const matrix = (at: bigint, rows: number, columns: number): Slabs => ({
    address: at,
    rows,
    columns,
    stride: columns,
  });
  if (forward) {
    const skipSteps = divideUp(c - own, STEP);
    const [m, passSteps] = [n * oh * ow, taps * (divideUp(own, STEP) + skipSteps)];
    const steps = halved ? splitSteps(passSteps) : passSteps;
    const kind = halved ? 'split_forward' : 'forward';
    const [g, beside] = [image(first, own), image(skip, c - own)];
    const b = along(weight(second), 2);
    const operands = { kind, a: pixels(g, true), b, y: matrix(address, m, o) } as const;
    return product([m, o, steps, 1], g, operands, (grid, a) => [
      ...[shift, oh * ow, ...grid, skipSteps ? pixels(beside, true)(ROWS, context) : a, skipSteps, own],
    ]);
  }
  if (symbol === 'conv2d_backward_weight') {
    const g = image(second, c);
    const sizes = [o, c, divideUp(n * oh * ow, STEP), taps];
    const operands = { a: across(matrix(first, n * oh * ow, o)), b: pixels(g, false), y: weight(address) };
    return product(sizes, g, { kind: 'backward_weight', ...operands });
  }
  // Strides leave holes between the pixels that a tap of dx sees.
  if (stride !== 1) return undefined;
  const [top, left] = [padTop - kh + 1, padLeft - kw + 1];
  const g = { address: first, image: [n, oh, ow, o], height: h, width: w, stride, top, left } as const;
  const sizes = [n * h * w, c, taps * divideUp(o, STEP), 1];
  const operands = { a: pixels(g, true), b: across(weight(second)), y: matrix(address, n * h * w, c) };
  return product(sizes, g, { kind: 'backward_x', ...operands });
}
