// How each kernel symbol runs on a GPU. Most symbols are one entry of the same name and parameters, and a plan only says
// how large its grid is; sums, norms and the matrix families are several launches with workspace between them. How a sum is cut
// depends on the shape, and for split products and some norms on the number of multiprocessors: a run repeats on its device.
import type { FloatDType } from '../../io/dtype.ts';
import type { Dim3, Im2colMap, TiledMap } from './api.ts';
import type { KernelArgument } from './manifest.ts';

/** What the engine passes: tensors' addresses and numbers, 0n for an absent tensor. */
export type LaunchArgument = bigint | number;
export type LaunchArguments = readonly LaunchArgument[];
/** Those of them that are addresses. */
export type Pointers = readonly bigint[];

export interface KernelLaunch {
  /** The PTX file, and the entry in it without its storage type. */
  readonly family: string;
  readonly entry: string;
  readonly grid: Dim3;
  readonly block: number;
  /** Blocks of a cluster, neighbours along x; 1 unless told. */
  readonly cluster?: number;
  /** Dynamic shared memory, in bytes. */
  readonly shared: number;
  readonly args: readonly KernelArgument[];
}

export interface PlanContext {
  readonly dtype: FloatDType;
  readonly elementBytes: 2 | 4;
  readonly multiprocessors: number;
  /** The most shared memory that a block may have: 99 KiB at least. */
  readonly sharedBytes: number;
  /** Compute capability 9.0, which alone runs the families that end in _sm90. */
  readonly hopper: boolean;
  /** Device memory for the launches of this plan alone. */
  workspace(bytes: number): bigint;
  /** The same, with these bytes in it. */
  upload(bytes: Uint8Array): bigint;
  /** Tensor maps over device memory, to be passed to a kernel by value. */
  tiledMap(map: TiledMap): Uint8Array;
  im2colMap(map: Im2colMap): Uint8Array;
}

export interface Plan {
  /** The parameters (p pointer, i int, f float, d double) where no entry has the symbol's own name. */
  readonly signature?: string;
  launches(args: LaunchArguments, context: PlanContext): KernelLaunch[];
  /** The launches of several calls that are independent of each other, where they are fewer than one by one. */
  together?(calls: readonly LaunchArguments[], context: PlanContext): KernelLaunch[];
}

export const THREADS = 256;
/** Bytes of a float32: of sums, moments and statistics whatever the storage. */
export const FLOAT = 4;
/** Elements that a thread takes at once; common.cuh's PACK. */
export const PACK = 4;
const BLOCKS_PER_MULTIPROCESSOR = 32;

export const divideUp = (a: number, b: number): number => Math.ceil(a / b);

/** Each call begins a turn, whose context hands out the workspaces of earlier turns before it takes new ones. */
export function inTurns(context: PlanContext): () => PlanContext {
  const blocks: { readonly bytes: number; readonly address: bigint }[] = [];
  return () => {
    const left = [...blocks].sort((a, b) => a.bytes - b.bytes);
    const workspace = (bytes: number): bigint => {
      const at = left.findIndex((block) => block.bytes >= bytes);
      if (at >= 0) return left.splice(at, 1)[0].address;
      const address = context.workspace(bytes);
      blocks.push({ bytes, address });
      return address;
    };
    return { ...context, workspace };
  };
}

/** A launch of `jobs` jobs, so many to a block; where the grid has fewer blocks than that takes, they walk on by its size. */
export function walking(
  family: string,
  entry: string,
  jobs: number,
  perBlock: number,
  args: LaunchArguments,
  { multiprocessors }: PlanContext,
): KernelLaunch {
  const blocks = Math.min(divideUp(jobs, perBlock), multiprocessors * BLOCKS_PER_MULTIPROCESSOR);
  return { family, entry, grid: [Math.max(blocks, 1), 1, 1], block: THREADS, shared: 0, args };
}

/** A plan of one launch of the symbol itself; `jobs` counts what blocks share out, `perBlock` of them to a block. */
export function single(
  family: string,
  symbol: string,
  jobs: (args: readonly number[]) => number,
  perBlock: number,
): [string, Plan] {
  const launches = (args: LaunchArguments, context: PlanContext) => [
    walking(family, symbol, jobs(args.map(Number)), perBlock, args, context),
  ];
  return [symbol, { launches }];
}

/** Packs of `inner` elements in `rows` rows. */
const packs = (rows: number, inner: number): number => rows * divideUp(inner, PACK);
const perElement = (family: string, symbol: string, countAt: number) =>
  single(family, symbol, (args) => divideUp(args[countAt], PACK), THREADS);
const pieces = (args: readonly number[]): number => args[2] * divideUp(args[5] * args[6], 4096);

const unary = ['silu', 'gelu', 'quick_gelu', 'relu', 'leaky_relu', 'exp', 'square', 'tanh', 'sigmoid'];
const casts = ['float32', 'bfloat16', 'float16'].map((to) => `cast_to_${to}_forward`);

/** Numbers that share a scale (q8.cu). */
const Q8_BLOCK = 32;

/** Elementwise kernels, kernels that move elements, and random numbers. */
export const simplePlans: readonly (readonly [string, Plan])[] = [
  ...unary.flatMap((name) => [
    perElement('elementwise', `${name}_forward`, 2),
    perElement('elementwise', `${name}_backward`, 3),
  ]),
  ...['add', 'sub', 'mul', 'div'].map((name) => perElement('elementwise', `${name}_forward`, 3)),
  ...['mul', 'div'].map((name) => perElement('elementwise', `${name}_backward`, 5)),
  ...['scale_forward', ...casts].map((name) => perElement('elementwise', name, 2)),
  perElement('elementwise', 'fill_forward', 1),
  perElement('elementwise', 'combine_forward', 13),
  perElement('elementwise', 'to_pixels_forward', 2),
  single('elementwise', 'geglu_forward', ([, , rows]) => rows, 1),
  single('elementwise', 'geglu_backward', ([, , , rows]) => rows, 1),
  single('move', 'embedding_forward', ([, , , rows]) => rows, 1),
  single('move', 'embedding_backward', (args) => args[5], 1),
  single('move', 'slice_forward', pieces, 1),
  single('move', 'place_forward', pieces, 1),
  single(
    'move',
    'permute_forward',
    ([, , d0, d1, d2, d3]) => d0 * d1 * divideUp(d2, 32) * divideUp(d3, 32),
    1,
  ),
  single('move', 'upsample_nearest_forward', ([, , n, , , c, oh, ow]) => packs(n * oh * ow, c), THREADS),
  single('move', 'join_quarters_forward', ([, , , , , rows, w, c]) => packs(4 * rows * w, c), THREADS),
  single('move', 'upsample_nearest_backward', ([, , n, h, w, c]) => packs(n * h * w, c), THREADS),
  single('move', 'timestep_embedding_forward', ([, , n, dim]) => n * (Math.floor(dim / 2) + 1), THREADS),
  single('q8', 'q8_scale_forward', ([, , n]) => n / Q8_BLOCK, THREADS),
  perElement('q8', 'to_q8_forward', 3),
  perElement('q8', 'from_q8_forward', 3),
  single('random', 'torch_normal_forward', ([, , n]) => n / 2, THREADS),
];
