// Reading the golden data (cases made with diffusers, test/golden/README.md) and comparing arrays without tap's deep
// equality, which is quadratic on large arrays: every comparison is one boolean with the worst element in its message.
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { brotliDecompressSync } from 'node:zlib';
import { type DType, decodeFloats, encodeNumbers, typedView } from '../../io/dtype.ts';
import { writeFileAtomic } from '../../io/files.ts';
import { packageRoot } from '../../io/package_root.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import type { TensorFile, TensorInfo } from '../../io/tensor_file.ts';

export { packageRoot };
export const goldenFolder = join(packageRoot, 'test', 'golden');

export interface Expectation {
  tensor: string;
  atol: number;
  rtol: number;
  noise?: number;
  max_abs?: number;
  /** The shape of what is compared, where `tensor` holds sums of its elements (see `folded`). */
  of?: number[];
}

/** One case of cases.json; what else it holds depends on its area (see `about` there). */
export interface GoldenCase {
  id: string;
  call?: string;
  note?: string;
  seed?: number;
  settings?: Record<string, unknown>;
  params?: Record<string, unknown>;
  config?: Record<string, unknown>;
  inputs?: Record<string, string>;
  expect: Record<string, Expectation>;
  [key: string]: unknown;
}

export interface GoldenArea {
  about: string;
  cases: GoldenCase[];
  shape(tensor: string): number[];
  dtype(tensor: string): DType;
  /** A stored tensor's elements as numbers (row-major), or its sums; rounded to float32 where they were recorded in float64. */
  floats(tensor: string): Float32Array;
  /** Exactly as recorded, in every type. */
  doubles(tensor: string): Float64Array;
  bytes(tensor: string): Uint8Array;
}

let document: { areas: Record<string, { about: string; cases: GoldenCase[] }> } | undefined;

const unpacked = (path: string): Buffer => brotliDecompressSync(readFileSync(join(goldenFolder, path)));
const unpackedJson = (path: string): unknown => JSON.parse(unpacked(path).toString());

/** The lines of NAME.jsonl, which its script's NAME.py writes and golden_pack.ts packs. */
export const goldenLines = <T>(name: string): T[] =>
  unpacked(`${name}.jsonl.br`)
    .toString()
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as T);

export function goldenArea(name: string): GoldenArea {
  document ??= unpackedJson('cases.json.br') as NonNullable<typeof document>;
  const area = document.areas[name];
  const tensors = packedTensors(`cases/${name}.safetensors.br`);
  const shapes = new Map(area.cases.flatMap((c) => Object.values(c.expect).map((e) => [e.tensor, e.of])));
  const dtype = (tensor: string) => storedTypes[tensors(tensor).storedAs];
  const floats = (tensor: string) => decodeFloats(tensors(tensor).bytes(), dtype(tensor));
  return {
    about: area.about,
    cases: area.cases,
    dtype,
    shape: (tensor) => [...(shapes.get(tensor) ?? tensors(tensor).shape)],
    bytes: (tensor) => tensors(tensor).bytes(),
    floats: (tensor) =>
      tensors(tensor).storedAs === 'F64'
        ? Float32Array.from(float64s(tensors(tensor).bytes()))
        : floats(tensor),
    doubles(tensor) {
      const { storedAs, bytes } = tensors(tensor);
      if (storedAs === 'F64') return float64s(bytes());
      if (storedAs === 'I64') return Float64Array.from(typedView(bytes(), 'int64'), Number);
      if (storedAs === 'I32') return Float64Array.from(typedView(bytes(), 'int32'), Number);
      return Float64Array.from(floats(tensor));
    },
  };
}

/** float64, which some sums were recorded in, is no storage type of ours. */
const storedTypes: Record<string, DType> = {
  F32: 'float32',
  F16: 'float16',
  BF16: 'bfloat16',
  I32: 'int32',
  I64: 'int64',
  U8: 'uint8',
};
const float64s = (bytes: Uint8Array) =>
  new Float64Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 8);

interface PackedTensor {
  storedAs: string;
  shape: readonly number[];
  bytes(): Uint8Array;
}

type Header = Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>;

/**
 * A safetensors file as golden_pack.ts leaves it: brotli over a file in which the bytes of each tensor lie plane by plane
 * (all first bytes of its elements, then all second ones), because floats compress better so.
 */
function packedTensors(path: string): (name: string) => PackedTensor {
  const file = unpacked(path);
  const start = 8 + Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString('utf8', 8, start)) as Header;
  return (name) => {
    if (!header[name]) throw new Error(`${path} has no tensor ${name}`);
    const { dtype, shape, data_offsets } = header[name];
    const [from, to] = data_offsets.map((offset) => start + offset);
    const count = shape.reduce((a, b) => a * b, 1);
    return { storedAs: dtype, shape, bytes: () => transposed(file.subarray(from, to), count) };
  };
}

/** Rows of `length` bytes as columns. From planes back to elements, `length` is the number of elements. */
export function transposed(bytes: Uint8Array, length: number): Uint8Array {
  const rows = bytes.length / length;
  const out = new Uint8Array(bytes.length);
  for (let row = 0; row < rows; row++)
    for (let i = 0; i < length; i++) out[i * rows + row] = bytes[row * length + i];
  return out;
}

/** How an original single file is put together from its diffusers folder's tensors, all as float16. */
export interface SingleFileRecipe {
  sha256: string;
  /** The file's own, as text. */
  header: string;
  /** In the order of the data: component/tensor, several joined end to end; `T ` before it transposes a matrix. */
  parts: string[][];
}

/**
 * The single file of a golden folder, byte for byte as it was made with diffusers' and the original's keys. It is not kept,
 * because its numbers are the folder's: it is put together in the temporary folder, and its hash checked.
 */
export function goldenSingleFile(folder: string): string {
  const { sha256, header, parts } = unpackedJson(`${folder}-singlefile.json.br`) as SingleFileRecipe;
  const path = join(tmpdir(), `sdxl-golden-${sha256.slice(0, 16)}`, `${folder}-singlefile.safetensors`);
  if (existsSync(path)) return path;
  const components = new Map<string, TensorFile>();
  const halves = (part: string): Uint8Array => {
    const [, turned, component, name] = /^(T )?([^/]+)\/(.*)$/.exec(part) as RegExpExecArray;
    const file = components.get(component) ?? openComponent(join(goldenFolder, folder, component));
    components.set(component, file);
    const { dtype, shape } = file.tensors.get(name) as TensorInfo;
    const values = decodeFloats(file.read(name), dtype);
    return encodeNumbers(turned ? permuted(values, shape, [1, 0]) : values, 'float16');
  };
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(Buffer.byteLength(header)));
  const bytes = Buffer.concat([size, Buffer.from(header), ...parts.flat().map(halves)]);
  for (const file of components.values()) file.close();
  if (createHash('sha256').update(bytes).digest('hex') !== sha256)
    throw new Error(`${path} put together from test/golden/${folder} is not what diffusers made`);
  mkdirSync(dirname(path), { recursive: true });
  writeFileAtomic(path, bytes);
  return path;
}

/** A LoRA file, lora/NAME.safetensors as cases name it; kept packed, and unpacked in the temporary folder. */
export function goldenLora(file: string): string {
  const bytes = unpacked(`${file}.br`);
  const hash = createHash('sha256').update(bytes).digest('hex');
  const path = join(tmpdir(), `sdxl-golden-${hash.slice(0, 16)}`, basename(file));
  if (existsSync(path)) return path;
  mkdirSync(dirname(path), { recursive: true });
  writeFileAtomic(path, bytes);
  return path;
}

const openComponent = (folder: string): TensorFile =>
  openSafetensors(join(folder, readdirSync(folder).find((name) => name.endsWith('.safetensors')) as string));

/** Values of a tensor of this shape with its axes in another order: axis i of the result is axis order[i]. */
export function permuted(
  values: ArrayLike<number>,
  shape: readonly number[],
  order: readonly number[],
): Float32Array {
  const strides = shape.map((_, axis) => shape.slice(axis + 1).reduce((a, b) => a * b, 1));
  const made = new Float32Array(values.length);
  let count = 0;
  const fill = (depth: number, start: number): void => {
    const [size, stride] = [shape[order[depth]], strides[order[depth]]];
    const innermost = depth === order.length - 1;
    for (let i = 0; i < size; i++)
      if (innermost) made[count++] = values[start + i * stride];
      else fill(depth + 1, start + i * stride);
  };
  fill(0, 0);
  return made;
}

/** What the helpers need of tap. */
export interface Assert {
  ok(value: unknown, message: string): unknown;
}

/** As many elements as a sum of `folded` takes in. */
const fold = 4;

/**
 * Large expected tensors are kept as sums of 4 elements that lie far apart, each times a number of its own of size 1 to 1.25,
 * and a sum is held to the atol of one element: every element counts, one that is off by more shows as it would by itself,
 * and errors that are alike do not cancel. (atol is ten times float32's noise, which in such sums is some twice as much.)
 */
export function folded(values: ArrayLike<number>): Float64Array {
  const sums = new Float64Array(Math.ceil(values.length / fold));
  for (let i = 0; i < values.length; i++) {
    const hash = Math.imul(i + 1, 0x9e3779b1) >>> 16;
    sums[i % sums.length] += values[i] * (1 + (hash & 63) / 256) * (hash & 64 ? 1 : -1);
  }
  return sums;
}

/** Passes when |got - want| <= atol + rtol |want| everywhere; NaN never passes. Where sums are recorded (`of`), `got` is folded. */
export function allClose(
  t: Assert,
  label: string,
  got: ArrayLike<number>,
  want: ArrayLike<number>,
  { atol, rtol, of }: Pick<Expectation, 'atol' | 'rtol' | 'of'>,
): void {
  if (of) {
    const whole = got.length === of.reduce((a, b) => a * b, 1);
    allClose(t, label, whole ? folded(got) : [], want, { atol, rtol: 0 });
    return;
  }
  if (got.length !== want.length) {
    t.ok(false, `${label}: ${got.length} elements, want ${want.length}`);
    return;
  }
  let worst = -1;
  let worstExcess = Number.NEGATIVE_INFINITY;
  for (let i = 0; i < want.length; i++) {
    const excess = Math.abs(got[i] - want[i]) - (atol + rtol * Math.abs(want[i]));
    if (!(excess <= worstExcess))
      [worst, worstExcess] = [i, Number.isNaN(excess) ? Number.POSITIVE_INFINITY : excess];
  }
  const detail =
    worst < 0 ? '' : ` (worst at ${worst}: got ${got[worst]}, want ${want[worst]}, atol ${atol})`;
  t.ok(worst < 0 || worstExcess <= 0, `${label}${worstExcess <= 0 ? '' : detail}`);
}

/** Largest |got - want|, for messages and for comparisons. What cannot be compared throws: it would pass for different. */
export function maxDifference(got: ArrayLike<number>, want: ArrayLike<number>): number {
  if (got.length !== want.length) throw new Error(`${got.length} elements beside ${want.length}`);
  let worst = 0;
  for (let i = 0; i < want.length; i++) {
    const difference = Math.abs(got[i] - want[i]);
    if (Number.isNaN(difference)) throw new Error(`element ${i}: ${got[i]} beside ${want[i]}`);
    if (difference > worst) worst = difference;
  }
  return worst;
}
