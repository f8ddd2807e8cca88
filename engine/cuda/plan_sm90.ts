// Plans of the matrix products on Hopper (gemm_sm90.cu, conv2d_sm90.cu): which tile, how k is cut, and the tensor maps of the
// operands. The half types only, and only where TMA can walk the tensors: rows that begin on 16-byte boundaries. A small
// model of the time picks the tile; `overrides` holds what a measurement says better. The model's numbers are reasoned
// from the hardware's rates, not measured.
import { TensorMapDataType, TensorMapSwizzle } from './api.ts';
import { divideUp, type KernelLaunch, type PlanContext } from './plan.ts';

export interface Tile {
  readonly name: string;
  /** Columns of a tile; all are 128 rows. */
  readonly n: number;
  readonly pingpong: boolean;
  readonly stages: number;
}

/** product_sm90.cuh's tiles. 160 divides SDXL's widths (multiples of 320) into whole waves of 132 multiprocessors. */
const tiles = {
  '256': { name: '256', n: 256, pingpong: false, stages: 3 },
  '160': { name: '160', n: 160, pingpong: false, stages: 5 },
  '160_pingpong': { name: '160_pingpong', n: 160, pingpong: true, stages: 4 },
  '80': { name: '80', n: 80, pingpong: false, stages: 7 },
} as const satisfies Record<string, Tile>;
export type TileName = keyof typeof tiles;

export type ProductKind = 'nt' | 'nn' | 'tn' | 'geglu';
const everyTile = Object.keys(tiles) as TileName[];
const tilesOf: Record<ProductKind, readonly TileName[]> = {
  nt: everyTile,
  nn: everyTile,
  tn: everyTile,
  geglu: ['256', '160_pingpong'],
};

const ROWS = 128;
const STEP = 64;
const THREADS = 384;
const BLOCK_ROWS = 64;

/** Elements in a row of a shared tile that is `width` elements wide: product_sm90.cuh's span_of. */
const boxColumns = (width: number): number => (width % 64 === 0 ? 64 : width % 32 === 0 ? 32 : 16);
const swizzleOf = (columns: number): number =>
  ({ 64: TensorMapSwizzle.B128, 32: TensorMapSwizzle.B64, 16: TensorMapSwizzle.B32 })[columns] as number;

export interface Choice {
  readonly tile: TileName;
  readonly splits: number;
}

/** Choices that a measurement made, by `kind m x n x k x slabs`; they go before the model's. */
export const overrides = new Map<string, Choice>();

export interface ProductSize {
  readonly kind: ProductKind;
  readonly m: number;
  readonly n: number;
  /** Steps of 64 along k. */
  readonly steps: number;
  readonly slabs: number;
}

export const keyOf = ({ kind, m, n, steps, slabs }: ProductSize): string =>
  [kind, m, n, steps, slabs].join(' ');

/** Clock cycles, roughly, from the first load to the last store. */
function cycles(
  { m, n, steps, slabs, kind }: ProductSize,
  { tile, splits }: Choice,
  multiprocessors: number,
): number {
  const { n: width, pingpong } = tiles[tile];
  const columns = kind === 'geglu' ? width / 2 : width;
  const items = divideUp(m, ROWS) * divideUp(n, columns) * slabs * splits;
  const rounds = divideUp(items, multiprocessors);
  // A step of 128 x width x 64 takes 4 x width cycles of the tensor cores. Its operands come from L2 at some 40 bytes a cycle:
  // the fastest published kernels with tiles of 128 x 256 and no multicast imply 34.
  const step = Math.max(4 * width, (2 * STEP * (ROWS + width)) / 40);
  const products = divideUp(steps, splits) * step;
  // An epilogue of 128 rows by one warpgroup hides behind the other's products, all but the last.
  const epilogue = 8 * columns;
  const busy = pingpong ? rounds * products + epilogue : rounds * (products + epilogue / 2);
  // Split sums are written, read and joined by a second launch, at about 16 bytes a cycle.
  const joined = splits > 1 ? 3000 + (m * n * slabs * (8 * splits + 2)) / (16 * multiprocessors) : 0;
  return 1500 + busy + joined;
}

/** The parts that `wanted` splits come to: none is empty. */
const partsOf = (steps: number, wanted: number): number =>
  divideUp(steps, divideUp(steps, Math.min(steps, wanted)));

/** The fastest by the model; k is only split where that leaves whole runs of steps. */
export function choose(size: ProductSize, canSplit: boolean, multiprocessors: number): Choice {
  const known = overrides.get(keyOf(size));
  if (known) return { ...known, splits: canSplit ? partsOf(size.steps, known.splits) : 1 };
  const most = canSplit ? Math.max(1, Math.min(16, Math.floor(size.steps / 8))) : 1;
  let best: Choice = { tile: '160_pingpong', splits: 1 };
  let least = Number.POSITIVE_INFINITY;
  for (const tile of tilesOf[size.kind]) {
    for (let wanted = 1; wanted <= most; wanted++) {
      const splits = partsOf(size.steps, wanted);
      const time = cycles(size, { tile, splits }, multiprocessors);
      if (time < least) [best, least] = [{ tile, splits }, time];
    }
  }
  return best;
}

/** A tensor [slabs][rows][columns]; strides in elements. */
export interface Slabs {
  readonly address: bigint;
  readonly rows: number;
  readonly columns: number;
  readonly slabs?: number;
  readonly stride: number;
  readonly slabStride?: number;
}

/** Whether TMA can walk it. */
export const isWalkable = ({ address, stride, slabs = 1, slabStride = 0 }: Slabs): boolean =>
  address % 16n === 0n && stride % 8 === 0 && (slabs === 1 || (slabStride % 8 === 0 && slabStride > 0));

export function slabMap(
  { address, rows, columns, slabs = 1, stride, slabStride = 0 }: Slabs,
  boxRows: number,
  box: number,
  { dtype, tiledMap }: PlanContext,
): Uint8Array {
  return tiledMap({
    dataType: TensorMapDataType[dtype === 'float16' ? 'FLOAT16' : 'BFLOAT16'],
    globalAddress: address,
    globalDim: [columns, rows, slabs],
    globalStrides: [2 * stride, 2 * (slabs > 1 ? slabStride : stride * rows)],
    elementStrides: [1, 1, 1],
    swizzle: swizzleOf(box),
    boxDim: [box, boxRows, 1],
  });
}

/** An operand's map: boxes of `rows` m or n by 64 k, or of 64 k by a chunk of the tile's width. */
const operandMap = (tensor: Slabs, along: boolean, rows: number, width: number, context: PlanContext) =>
  along ? slabMap(tensor, rows, STEP, context) : slabMap(tensor, STEP, boxColumns(width), context);

export interface HopperProduct extends ProductSize {
  readonly a: Slabs;
  readonly b: Slabs;
  readonly y: Slabs;
  readonly bias: bigint;
  readonly residual: bigint;
  readonly activation: number;
}

/** Where C's float sums go instead of y. */
export interface Partial {
  readonly address: bigint;
  readonly row: number;
  readonly slab: number;
  readonly part: number;
}
const nowhere: Partial = { address: 0n, row: 0, slab: 0, part: 0 };

/** The launch of a linear layer's or matmul's product. */
export function hopperProduct(
  p: HopperProduct,
  choice: Choice,
  partial: Partial | undefined,
  context: PlanContext,
): KernelLaunch {
  const tile = tiles[choice.tile];
  const gated = p.kind === 'geglu';
  const columns = gated ? tile.n / 2 : tile.n;
  const [aAlong, bAlong] = [p.kind !== 'tn', p.kind === 'nt' || gated];
  const sums = partial ?? nowhere;
  // With sums alone there may be no y: any map stands for it.
  const a = operandMap(p.a, aAlong, ROWS, ROWS, context);
  const yMap = (address: bigint) => slabMap({ ...p.y, address }, BLOCK_ROWS, boxColumns(columns), context);
  const y = partial ? a : yMap(p.y.address);
  const [down, across] = [divideUp(p.m, ROWS), divideUp(p.n, columns)];
  const items = down * across * p.slabs * choice.splits;
  return {
    family: 'gemm_sm90',
    entry: `gemm_sm90_${p.kind}_${tile.name}`,
    grid: [Math.min(items, context.multiprocessors), 1, 1],
    block: THREADS,
    shared: sharedBytes(tile, columns),
    args: [
      ...[a, operandMap(p.b, bAlong, tile.n / 2, tile.n, context), y],
      ...[p.residual ? yMap(p.residual) : y, sums.address, p.bias],
      ...[p.m, p.n, p.activation, Number(p.residual !== 0n), sums.row, sums.slab, sums.part],
      ...[gated ? p.n : tile.n / 2, down, across, p.slabs, items, p.steps, divideUp(p.steps, choice.splits)],
    ],
  };
}

/** The stages, what leaves by TMA (rows of y that the warpgroups round), and room to begin on a multiple of 1024. */
function sharedBytes({ n, pingpong, stages }: Tile, columns: number): number {
  return stages * (ROWS + n) * STEP * 2 + (pingpong ? 2 : 1) * ROWS * columns * 2 + 1024;
}
