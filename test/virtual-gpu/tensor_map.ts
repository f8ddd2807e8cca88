// Tensor maps: the 128 opaque bytes that stand for a map, and the walk over a map's box
// that TMA copies make. A map's bytes are a mark and an index into the machine's list, for nothing but the driver and the
// GPU may know what a real one holds.
import type { Im2colMap, TiledMap } from '../../engine/cuda/api.ts';
import { checkIm2col, checkTiled, elementBytesOf } from '../../engine/cuda/tensor_map.ts';

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

const mark = 0x544d4150;

export function encodeTiled(maps: TensorMap[], map: TiledMap): Uint8Array {
  checkTiled(map);
  // The first stride is not looked at; the others leave out what lies between in the box.
  const strides = [1, ...map.elementStrides.slice(1)];
  const box = map.boxDim.map((n, d) => Math.ceil(n / strides[d]));
  return append(maps, { ...common(map), kind: 'tiled', elementStrides: strides, box, lower: [], upper: [] });
}

export function encodeIm2col(maps: TensorMap[], map: Im2colMap): Uint8Array {
  checkIm2col(map);
  const [lower, upper] = [map.pixelBoxLowerCorner, map.pixelBoxUpperCorner];
  const box = [map.channelsPerPixel, map.pixelsPerColumn];
  return append(maps, { ...common(map), kind: 'im2col', box, lower, upper });
}

function common(map: TiledMap | Im2colMap) {
  const size = elementBytesOf[map.dataType];
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
  const { elementBytes: size, dims } = map;
  const piece = 16 / size;
  const at = (c: number) => (offset >= 0 && c >= 0 && c < dims[0] ? offset + c * size : -1);
  for (let n = 0; n < count; n += piece) {
    const c = from + n;
    const whole =
      n + piece <= count && at(c) < 0 === at(c + piece - 1) < 0 && (offset < 0 || c >= 0 || c + piece <= 0);
    if (whole) visit(at(c), shared + n * size, piece * size);
    else for (let e = n; e < Math.min(count, n + piece); e++) visit(at(from + e), shared + e * size, size);
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
