// Plans of the matrix products on Hopper (gemm_sm90.cu, conv2d_sm90.cu, conv2d_backward_sm90.cu): which tile, how k is cut, whether
// blocks work in pairs, and the tensor maps of the operands. The half types, float32 as pairs of them, and only where TMA can walk the
// tensors: rows that begin on 16-byte boundaries. A small model of the time picks the tile; `overrides` holds what a measurement says
// better. The model's rate of products is the hardware's; most of its other numbers are fitted to what one H200 found the fastest.
import { TensorMapDataType, TensorMapSwizzle } from './api.ts';
import type { KernelArgument } from './manifest.ts';
import { MEASURED_MULTIPROCESSORS, measured } from './measured_sm90.ts';
import { divideUp, type KernelLaunch, type PlanContext } from './plan.ts';

export interface Tile {
  readonly name: string;
  /** Rows and columns. */
  readonly m: number;
  readonly n: number;
  readonly pingpong: boolean;
}

/**
 * product_sm90.cuh's tiles. 160 divides SDXL's widths (multiples of 320) into whole waves of 132 multiprocessors; a tall one reads
 * the least for what it multiplies.
 */
export const tiles = {
  '256': { name: '256', m: 128, n: 256, pingpong: false },
  '160': { name: '160', m: 128, n: 160, pingpong: false },
  '160_pingpong': { name: '160_pingpong', m: 128, n: 160, pingpong: true },
  '160_tall': { name: '160_tall', m: 256, n: 160, pingpong: false },
  '128_pingpong': { name: '128_pingpong', m: 128, n: 128, pingpong: true },
  '80': { name: '80', m: 128, n: 80, pingpong: false },
} as const satisfies Record<string, Tile>;
export type TileName = keyof typeof tiles;
/** Rows of the lowest. */
const LEAST_ROWS = Math.min(...Object.values(tiles).map(({ m }) => m));

/** The entries' names after their family's: gemm_sm90_nt_160. */
export type ProductKind =
  | ('nt' | 'nn' | 'tn' | 'activated' | 'geglu' | 'projections')
  | ('e4m3' | 'e4m3_geglu')
  | ('forward' | 'backward_x' | 'backward_weight')
  | ('split_nt' | 'split_nn' | 'split_forward');
const gemmTiles: readonly TileName[] = ['256', '160', '160_pingpong', '80'];
const splitTiles: readonly TileName[] = ['256', '128_pingpong'];
export const tilesOf: Record<ProductKind, readonly TileName[]> = {
  nt: [...gemmTiles, '160_tall'],
  nn: [...gemmTiles, '160_tall'],
  tn: gemmTiles,
  activated: ['160', '80'],
  geglu: ['256', '160_pingpong'],
  projections: ['256', '160', '160_pingpong'],
  e4m3: ['256', '160_pingpong'],
  e4m3_geglu: ['256', '160_pingpong'],
  forward: ['256', '160', '160_pingpong', '160_tall', '128_pingpong'],
  backward_x: ['256', '160', '160_tall', '128_pingpong'],
  backward_weight: ['256', '160', '128_pingpong'],
  split_nt: splitTiles,
  split_nn: ['256'],
  split_forward: splitTiles,
};

export const STEP = 64;
const THREADS = 384;
const BLOCK_ROWS = 64;
/** Bytes of shared memory that a block may have, and of them for a tile's start and, rounded up by ptxas, for barriers. */
const MOST_SHARED = 227 * 1024;
const ALIGNMENT = 1024;
const BARRIERS = 1024;

/** Elements in a row of a shared tile that is `width` elements wide: product_sm90.cuh's span_of. */
export const boxColumns = (width: number): number => (width % 64 === 0 ? 64 : width % 32 === 0 ? 32 : 16);
/** Columns of C in a tile: GEGLU's tile is half gates. */
const columnsOf = (kind: ProductKind, { n }: Tile): number => (kind.endsWith('geglu') ? n / 2 : n);

export interface Choice {
  readonly tile: TileName;
  readonly splits: number;
  /** Two blocks, one tile below the other, share B's (product_sm90.cuh). */
  readonly paired?: boolean;
}

class Overrides extends Map<string, Choice> {
  /** Another one after each change: plans that were made before it are out of date. */
  version = 0;
  override set(key: string, choice: Choice): this {
    this.version++;
    return super.set(key, choice);
  }
  override delete(key: string): boolean {
    this.version++;
    return super.delete(key);
  }
  override clear(): void {
    this.version++;
    super.clear();
  }
}

/** Choices that a run of the benchmark makes, by `kind m x n x k x slabs`; they go before measured_sm90.ts's and the model's. */
export const overrides = new Overrides();

export interface ProductSize {
  readonly kind: ProductKind;
  readonly m: number;
  readonly n: number;
  /** Steps of 64 along k, 128 where elements are bytes. */
  readonly steps: number;
  readonly slabs: number;
}

export const keyOf = ({ kind, m, n, steps, slabs }: ProductSize): string =>
  [kind, m, n, steps, slabs].join(' ');

// The numbers of the model, fitted to 1500 times that an H200 took for 145 products by their likeliest choices (measured_sm90.ts): what
// the model chooses takes 4 % longer than the fastest, the median 2 %.

/** Bytes a cycle that a multiprocessor gets from L2 when all of them read. */
const L2_BYTES = 100;
/**
 * Bytes a cycle that shared memory takes from TMA and gives to wgmma, which reads its 64 rows of A and all of B for each product. By
 * the books it is 128, by which tiles of 160 columns would lose to those of 256 where the H200 had them win.
 */
const SHARED_BYTES = 148;
/** Cycles that the one thread which brings boxes takes to each. */
const BOX = 100;
/** Cycles in which the tensor cores rest while both warpgroups end a tile and begin the next, beside what they do to its sums. */
const ENDING = 390;
/** Cycles that a pair waits: for its blocks to begin and end together, and for the slower of them now and then. */
const PAIRING = 650;
/** Cycles of the launch that joins split sums, beside its bytes. */
const JOIN = 1000;

/** Tiles down, an even number of them for pairs. */
const tilesDown = (m: number, tile: Tile, paired = false): number =>
  (paired ? 2 : 1) * divideUp(m, paired ? 2 * tile.m : tile.m);
/** Multiprocessors that blocks are shared out to: pairs need two at a time. */
const blocksOf = (multiprocessors: number, paired = false): number =>
  paired ? Math.max(2, multiprocessors - (multiprocessors % 2)) : multiprocessors;

/** Kinds whose operands have a row for each k, and so come in a box for each span of their width. */
const acrossA: readonly ProductKind[] = ['tn', 'backward_weight'];
const acrossB: readonly ProductKind[] = ['nn', 'tn', 'split_nn', 'backward_x', 'backward_weight'];
/** Boxes that a block brings for a step: of a pair's B half; what lies along k has one for A and two for B. */
function boxesOf(kind: ProductKind, { m, n }: Tile, paired = false): number {
  const ofA = acrossA.includes(kind) ? m / boxColumns(m) : 1;
  const ofB = acrossB.includes(kind) ? n / boxColumns(n) : 2;
  return ofA + ofB / (paired ? 2 : 1);
}

/** Clock cycles, roughly, from the first load to the last store. */
export function cycles(
  { m, n, steps, slabs, kind }: ProductSize,
  { tile, splits, paired }: Choice,
  multiprocessors: number,
): number {
  const { m: height, n: width, pingpong } = tiles[tile];
  const columns = columnsOf(kind, tiles[tile]);
  const items = tilesDown(m, tiles[tile], paired) * divideUp(n, columns) * slabs * splits;
  const rounds = divideUp(items, blocksOf(multiprocessors, paired));
  // A step of 128 x width x 64 (of bytes: 128) takes 4 x width cycles of the tensor cores. Of a pair each reads half of B.
  const blocks = height / BLOCK_ROWS;
  const read = 2 * STEP * (height + (paired ? width / 2 : width));
  const passed = 2 * STEP * (height + width) + 2 * STEP * blocks * (BLOCK_ROWS + width);
  const brought = BOX * boxesOf(kind, tiles[tile], paired);
  const step = Math.max(2 * blocks * width, read / L2_BYTES, passed / SHARED_BYTES, brought);
  const products = divideUp(steps, splits) * step;
  // By one warpgroup an epilogue of 128 rows takes twice these; with pingpong all but the last hide behind the other's products.
  const epilogue = 2 * blocks * columns;
  const busy = rounds * products + (pingpong ? 2 * epilogue : rounds * (epilogue + ENDING));
  // Split sums are written, read and joined by a second launch, at about 16 bytes a cycle.
  const joined = splits > 1 ? JOIN + (m * n * slabs * (8 * splits + 2)) / (16 * multiprocessors) : 0;
  return 1500 + busy + joined + (paired ? PAIRING : 0);
}

/** The parts that `wanted` splits come to: none is empty. */
const partsOf = (steps: number, wanted: number): number =>
  divideUp(steps, divideUp(steps, Math.min(steps, wanted)));

/**
 * Every tile and split that a product may have, alone and in pairs; k is only split where that leaves whole runs of steps, and
 * pairs need two tiles down.
 */
export function candidates({ kind, m, steps }: ProductSize, canSplit: boolean): Choice[] {
  const most = canSplit ? Math.max(1, Math.min(16, Math.floor(steps / 8))) : 1;
  const splits = new Set(Array.from({ length: most }, (_, i) => partsOf(steps, i + 1)));
  const alone = tilesOf[kind].flatMap((tile) =>
    [...splits].map((parts): Choice => ({ tile, splits: parts })),
  );
  return m > LEAST_ROWS ? alone.flatMap((choice) => [choice, { ...choice, paired: true }]) : alone;
}

/** A product whose tile a plan has asked for, and whether k may be split there. */
export interface Lookup {
  readonly size: ProductSize;
  readonly canSplit: boolean;
}

let note: ((lookup: Lookup) => void) | undefined;

/** What plans look up while `launch` runs. */
export function lookupsOf(launch: () => void): Lookup[] {
  const found: Lookup[] = [];
  overrides.version++; // a plan that is remembered looks up nothing
  note = (lookup) => void found.push(lookup);
  try {
    launch();
  } finally {
    note = undefined;
  }
  return found;
}

/** The one that was measured to be the fastest, or else the fastest by the model. */
export function chooseHopper(size: ProductSize, canSplit: boolean, multiprocessors: number): Choice {
  note?.({ size, canSplit });
  const key = keyOf(size);
  const known =
    overrides.get(key) ?? (multiprocessors === MEASURED_MULTIPROCESSORS ? measured[key] : undefined);
  if (known) return { ...known, splits: canSplit ? partsOf(size.steps, known.splits) : 1 };
  const name = `${key} ${canSplit} ${multiprocessors}`;
  const chosen = byModel.get(name) ?? fastest(size, canSplit, multiprocessors);
  byModel.set(name, chosen);
  return chosen;
}

/** What the model chose: a training step asks for the same few hundred products again and again, and weighing costs 50 us. */
const byModel = new Map<string, Choice>();

function fastest(size: ProductSize, canSplit: boolean, multiprocessors: number): Choice {
  let best: Choice = { tile: '160_pingpong', splits: 1 };
  let least = Number.POSITIVE_INFINITY;
  for (const choice of candidates(size, canSplit)) {
    const time = cycles(size, choice, multiprocessors);
    if (time < least) [best, least] = [choice, time];
  }
  return best;
}

/** Whether a product is worth a tile, and y's rows begin where TMA can store them. */
export const hopperTakes = (
  m: number,
  n: number,
  { hopper, elementBytes }: Pick<PlanContext, 'hopper' | 'elementBytes'>,
): boolean => hopper && elementBytes === 2 && m >= 64 && n >= 16 && n % 8 === 0;

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

/** A map of a matrix of bytes with boxes of `boxRows` rows of 128; a row is `columns` long. */
const byteMap = ({ address, rows, columns }: Slabs, boxRows: number, { tiledMap }: PlanContext): Uint8Array =>
  tiledMap({
    ...{ dataType: TensorMapDataType.UINT8, globalAddress: address, swizzle: TensorMapSwizzle.B128 },
    globalDim: [columns, rows, 1],
    globalStrides: [columns, columns * rows],
    elementStrides: [1, 1, 1],
    boxDim: [2 * STEP, boxRows, 1],
  });

/** A map of it with boxes of `boxRows` rows of `box` elements. */
function slabMap(tensor: Slabs, boxRows: number, box: number, { dtype, tiledMap }: PlanContext): Uint8Array {
  const { address, rows, columns, slabs = 1, stride, slabStride = 0 } = tensor;
  return tiledMap({
    ...mapOf(address, box, dtype),
    globalDim: [columns, rows, slabs],
    globalStrides: [2 * stride, 2 * (slabs > 1 ? slabStride : stride * rows)],
    elementStrides: [1, 1, 1],
    boxDim: [box, boxRows, 1],
  });
}

/** What all maps say alike of rows of `box` elements in shared memory. */
export const mapOf = (address: bigint, box: number, dtype: PlanContext['dtype']) => ({
  dataType: TensorMapDataType[dtype === 'float16' ? 'FLOAT16' : 'BFLOAT16'],
  globalAddress: address,
  swizzle: { 64: TensorMapSwizzle.B128, 32: TensorMapSwizzle.B64, 16: TensorMapSwizzle.B32 }[box] as number,
});

/** An operand's map for a tile that is `width` m or n wide. */
export type Operand = (width: number, context: PlanContext) => Uint8Array;
/** Of a tensor whose rows lie along k: boxes of 64 k and a `share` of the width. */
export const along =
  (tensor: Slabs, share = 1): Operand =>
  (width, context) =>
    slabMap(tensor, width / share, STEP, context);
/** The same of bytes. */
export const bytesAlong =
  (tensor: Slabs, share = 1): Operand =>
  (width, context) =>
    byteMap(tensor, width / share, context);
/** Of a tensor that has a row for each k: boxes of 64 of them. */
export const across =
  (tensor: Slabs): Operand =>
  (width, context) =>
    slabMap(tensor, STEP, boxColumns(width), context);

export interface HopperProduct extends ProductSize {
  readonly family: string;
  readonly a: Operand;
  readonly b: Operand;
  readonly y: Slabs;
  readonly bias: bigint;
  readonly residual: bigint;
  /** Where C's float sums go instead of y, by rows, slabs and parts; strides in floats. */
  readonly partial?: { readonly address: bigint; readonly row: number; readonly slab: number };
  /** What has to run first. */
  readonly before?: readonly KernelLaunch[];
  /** The entry's own parameters; A's map stands for what is absent. */
  own(tile: Tile, a: Uint8Array): readonly KernelArgument[];
}

/** A map of a result, in boxes that the epilogue stores. */
export const outputMap = (y: Slabs, columns: number, context: PlanContext): Uint8Array =>
  slabMap(y, BLOCK_ROWS, boxColumns(columns), context);

export function hopperLaunch(p: HopperProduct, choice: Choice, context: PlanContext): KernelLaunch {
  const tile = tiles[choice.tile];
  const columns = columnsOf(p.kind, tile);
  const a = p.a(tile.m, context);
  // Float32's y and residual are plain addresses.
  const map = (address: bigint) =>
    context.dtype === 'float32' ? address : outputMap({ ...p.y, address }, columns, context);
  // Any map stands for what is absent. Where sums are joined, the join adds the residual.
  const residual = p.partial ? 0n : p.residual;
  const y = p.partial && context.dtype !== 'float32' ? a : map(p.y.address);
  const sums = p.partial ?? { address: 0n, row: p.y.stride, slab: p.y.slabStride ?? 0 };
  const { paired } = choice;
  const [down, across] = [tilesDown(p.m, tile, paired), divideUp(p.n, columns)];
  const items = down * across * p.slabs * choice.splits;
  return {
    family: p.family,
    entry: `${p.family}_${p.kind}_${tile.name}`,
    grid: [Math.min(items, blocksOf(context.multiprocessors, paired)), 1, 1],
    ...(paired ? { cluster: 2 } : {}),
    block: THREADS,
    shared: sharedBytes(tile, columns, context),
    args: [
      ...[a, p.b(tile.n, context), y, residual ? map(residual) : y, sums.address, p.bias, p.m, p.n],
      ...[Number(residual !== 0n), sums.row, sums.slab, p.m * p.n * p.slabs, down, across, p.slabs],
      ...[items, p.steps, divideUp(p.steps, choice.splits), ...p.own(tile, a)],
    ],
  };
}

/**
 * As many stages as fit beside what leaves by TMA (rows of y that the warpgroups round, 64 each at a time or with pingpong 128, of a
 * wide tile half their columns; float32's do not), and room to begin on a multiple of 1024: epilogue_sm90.cuh's STAGES.
 */
function sharedBytes({ m, n, pingpong }: Tile, columns: number, { elementBytes }: PlanContext): number {
  const stage = (m + n) * STEP * 2;
  const side = columns > 160 ? columns / 2 : columns;
  const epilogue = elementBytes === 2 ? (pingpong ? 4 : 2) * BLOCK_ROWS * side * 2 : 0;
  const stages = Math.floor((MOST_SHARED - ALIGNMENT - BARRIERS - epilogue) / stage);
  return stages * stage + epilogue + ALIGNMENT;
}
