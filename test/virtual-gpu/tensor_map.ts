// Tensor maps: what cuTensorMapEncode checks, the 128 opaque bytes that stand for a map, and the walk over a map's box
// that TMA copies make. A map's bytes are a mark and an index into the machine's list, for nothing but the driver and the
// GPU may know what a real one holds.
import { type Im2colMap, TensorMapDataType, type TiledMap } from '../../engine/cuda/api.ts';
import { CudaError } from '../../engine/cuda/errors.ts';

export interface TensorMap {
  readonly kind: 'tiled' | 'im2col';
  readonly elementBytes: number;
  readonly base: bigint;
  readonly dims: readonly number[];
  /** In bytes, the element's size first. */
  readonly strides: readonly number[];
  readonly elementStrides: readonly number[];
  readonly swizzle: number;
  /** Elements of a copy along each dimension; for im2col channels and pixels. */
  readonly box: readonly number[];
  readonly lower: readonly number[];
  readonly upper: readonly number[];
}

const elementBytes: Record<number, number> = {
  [TensorMapDataType.UINT8]: 1,
  [TensorMapDataType.UINT16]: 2,
  [TensorMapDataType.INT32]: 4,
  [TensorMapDataType.FLOAT16]: 2,
  [TensorMapDataType.FLOAT32]: 4,
  [TensorMapDataType.BFLOAT16]: 2,
};
const swizzleSpan = [Number.POSITIVE_INFINITY, 32, 64, 128];
const mark = 0x544d4150;

export function encodeTiled(maps: TensorMap[], map: TiledMap): Uint8Array {
  const refuse = refusal('cuTensorMapEncodeTiled');
  const size = checkCommon(map, refuse);
  if (map.boxDim.length !== map.globalDim.length) refuse('boxDim has another rank than globalDim');
  if (map.boxDim.some((n) => n < 1 || n > 256)) refuse(`boxDim [${map.boxDim}] is not within 1 to 256`);
  const inner = map.boxDim[0] * size;
  if (inner > swizzleSpan[map.swizzle]) refuse(`the inner box of ${inner} bytes exceeds the swizzle span`);
  if (inner % 16) refuse(`the inner box of ${inner} bytes is no multiple of 16`);
  return append(maps, { ...common(map, size), kind: 'tiled', box: map.boxDim, lower: [], upper: [] });
}

export function encodeIm2col(maps: TensorMap[], map: Im2colMap): Uint8Array {
  const refuse = refusal('cuTensorMapEncodeIm2col');
  const size = checkCommon(map, refuse);
  const rank = map.globalDim.length;
  const box = [map.channelsPerPixel, map.pixelsPerColumn];
  if (rank < 3) refuse(`rank ${rank} is below 3`);
  if (box[0] > 256 || box[1] > 1024) refuse(`${box[0]} channels by ${box[1]} pixels exceed 256 by 1024`);
  if (box[0] * size > swizzleSpan[map.swizzle]) refuse('the channels exceed the swizzle span');
  if ((box[0] * size) % 16) refuse(`the channels of ${box[0] * size} bytes are no multiple of 16`);
  const [lower, upper] = [map.pixelBoxLowerCorner, map.pixelBoxUpperCorner];
  if (lower.length !== rank - 2 || upper.length !== rank - 2)
    refuse('corners need one number per spatial dimension');
  const limit = 2 ** (Math.floor(16 / (rank - 2)) - 1);
  if ([...lower, ...upper].some((n) => n < -limit || n >= limit))
    refuse(`corners [${lower}] and [${upper}] are not within ${-limit} to ${limit - 1}`);
  if (lower.some((n, d) => n >= map.globalDim[d + 1] + upper[d])) refuse('the box of pixels is empty');
  return append(maps, { ...common(map, size), kind: 'im2col', box, lower, upper });
}

const refusal =
  (call: string) =>
  (detail: string): never => {
    throw new CudaError('CUDA_ERROR_INVALID_VALUE', call, detail);
  };

/** Checks what both kinds share; returns the element's size. */
function checkCommon(map: TiledMap | Im2colMap, refuse: (detail: string) => never): number {
  const size = elementBytes[map.dataType] ?? refuse(`data type ${map.dataType}`);
  if (map.globalAddress & 15n) refuse('globalAddress is not a multiple of 16');
  if (map.globalDim.length > 5 || map.globalDim.some((n) => n < 1)) refuse(`globalDim [${map.globalDim}]`);
  if (map.globalStrides.length !== map.globalDim.length - 1)
    refuse('globalStrides needs one number less than globalDim');
  if (map.globalStrides.some((n) => n % 16 || n >= 2 ** 40)) {
    refuse(`globalStrides [${map.globalStrides}] are not multiples of 16`);
  }
  if (map.elementStrides.some((n) => n < 1 || n > 8)) refuse(`elementStrides [${map.elementStrides}]`);
  if (swizzleSpan[map.swizzle] === undefined) refuse(`swizzle ${map.swizzle}`);
  return size;
}

function common(map: TiledMap | Im2colMap, size: number) {
  return {
    elementBytes: size,
    base: map.globalAddress,
    dims: map.globalDim,
    strides: [size, ...map.globalStrides],
    elementStrides: map.elementStrides,
    swizzle: map.swizzle,
  };
}

function append(maps: TensorMap[], map: TensorMap): Uint8Array {
  const bytes = new Uint8Array(128);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, mark, true);
  view.setUint32(4, maps.push(map) - 1, true);
  return bytes;
}

/** The map whose bytes lie at an offset of a parameter block. */
export function mapAt(
  maps: readonly TensorMap[],
  parameters: DataView,
  offset: number,
): TensorMap | undefined {
  return parameters.getUint32(offset, true) === mark
    ? maps[parameters.getUint32(offset + 4, true)]
    : undefined;
}

/** Bytes of a whole box, which is what a copy counts even where it leaves the tensor. */
export const boxBytes = (map: TensorMap): number => map.box.reduce((a, b) => a * b, 1) * map.elementBytes;
/** Alignment of the box in shared memory: the span over which its swizzle repeats. */
export const boxAlignment = (map: TensorMap): number => [128, 256, 512, 1024][map.swizzle];

/** Where the swizzle puts a shared address: 16-byte pieces are permuted by the row they are in. */
export function swizzled(swizzle: number, ax: number): number {
  const mask = [0, 0x10, 0x30, 0x70][swizzle];
  return ax ^ ((ax >>> 3) & mask);
}

type Visit = (global: number, shared: number, bytes: number) => void;

/**
 * Calls `visit` for the pieces of the box at `coordinates`, in the order in which they lie in shared memory: byte offset from
 * the tensor's start, or -1 outside the tensor, byte offset within the box before swizzling, and bytes: 16, which swizzles
 * keep together, or an element where the tensor's edge or a stride parts them.
 */
export function walkBox(
  map: TensorMap,
  coordinates: readonly number[],
  offsets: readonly number[],
  visit: Visit,
): void {
  if (map.kind === 'tiled') walkTile(map, coordinates, visit);
  else walkPixels(map, coordinates, offsets, visit);
}

/** A row of `count` elements from coordinate `from` of the innermost dimension; -1 as its offset: all of it lies outside. */
function walkRow(
  map: TensorMap,
  from: number,
  count: number,
  offset: number,
  shared: number,
  visit: Visit,
): void {
  const { elementBytes: size, dims, elementStrides } = map;
  const piece = map.kind === 'tiled' && elementStrides[0] !== 1 ? 1 : 16 / size;
  const step = map.kind === 'tiled' ? elementStrides[0] : 1;
  const at = (c: number) => (offset >= 0 && c >= 0 && c < dims[0] ? offset + c * size : -1);
  for (let n = 0; n < count; n += piece) {
    const c = from + n * step;
    const whole =
      n + piece <= count && at(c) < 0 === at(c + piece - 1) < 0 && (offset < 0 || c >= 0 || c + piece <= 0);
    if (whole) visit(at(c), shared + n * size, piece * size);
    else
      for (let e = n; e < Math.min(count, n + piece); e++)
        visit(at(from + e * step), shared + e * size, size);
  }
}

function walkTile(map: TensorMap, coordinates: readonly number[], visit: Visit): void {
  const index = map.box.map(() => 0);
  const row = map.box[0];
  const count = map.box.reduce((a, b) => a * b, 1) / row;
  for (let n = 0; n < count; n++) {
    let inside = true;
    let offset = 0;
    for (let d = 1; d < index.length; d++) {
      const c = coordinates[d] + index[d] * map.elementStrides[d];
      if (c < 0 || c >= map.dims[d]) inside = false;
      offset += c * map.strides[d];
    }
    walkRow(map, coordinates[0], row, inside ? offset : -1, n * row * map.elementBytes, visit);
    for (let d = 1; d < index.length && ++index[d] === map.box[d]; d++) index[d] = 0;
  }
}

/** im2col walks base pixels inside [lower, dim + upper) in W, H, (D,) N order and adds the filter's offsets to each. */
function walkPixels(
  map: TensorMap,
  coordinates: readonly number[],
  offsets: readonly number[],
  visit: Visit,
): void {
  const spatial = map.dims.length - 2;
  const [channels, pixels] = map.box;
  const pixel = coordinates.slice(1);
  for (let p = 0; p < pixels; p++) {
    let inside = pixel[spatial] >= 0 && pixel[spatial] < map.dims[spatial + 1];
    let offset = pixel[spatial] * map.strides[spatial + 1];
    for (let d = 0; d < spatial; d++) {
      const c = pixel[d] + offsets[d];
      if (c < 0 || c >= map.dims[d + 1]) inside = false;
      offset += c * map.strides[d + 1];
    }
    walkRow(map, coordinates[0], channels, inside ? offset : -1, p * channels * map.elementBytes, visit);
    let d = 0;
    for (; d < spatial; d++) {
      pixel[d] += map.elementStrides[d + 1];
      if (pixel[d] < map.dims[d + 1] + map.upper[d]) break;
      pixel[d] = map.lower[d];
    }
    if (d === spatial) pixel[spatial]++;
  }
}
