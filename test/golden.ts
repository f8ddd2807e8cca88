// Reading the golden data (cases made with diffusers, test/golden/README.md) and comparing arrays without tap's deep
// equality, which is quadratic on large arrays: every comparison is one boolean with the worst element in its message.
import { closeSync, openSync, readFileSync, readSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type DType, decodeFloats } from '../io/dtype.ts';
import { openSafetensors, type SafetensorsFile } from '../io/safetensors.ts';

/** The package's folder: the nearest ancestor of this file with a package.json. */
export const packageRoot = (() => {
  const here = dirname(fileURLToPath(import.meta.url));
  return here.endsWith(join('dist', 'test')) ? join(here, '..', '..') : join(here, '..');
})();

export const goldenFolder = join(packageRoot, 'test', 'golden');

export interface Expectation {
  tensor: string;
  atol: number;
  rtol: number;
  noise?: number;
  max_abs?: number;
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
  /** A stored tensor's elements as numbers (row-major), rounded to float32 where they were recorded in float64. */
  floats(tensor: string): Float32Array;
  /** As floats, but not rounded. */
  doubles(tensor: string): Float64Array;
  bytes(tensor: string): Uint8Array;
}

let document: { areas: Record<string, { about: string; cases: GoldenCase[] }> } | undefined;

export function goldenArea(name: string): GoldenArea {
  document ??= JSON.parse(readFileSync(join(goldenFolder, 'cases.json'), 'utf8')) as NonNullable<
    typeof document
  >;
  const file: SafetensorsFile = openSafetensors(join(goldenFolder, 'cases', `${name}.safetensors`));
  const area = document.areas[name];
  const info = (tensor: string) => {
    const found = file.tensors.get(tensor);
    if (!found) throw new Error(`golden area ${name} has no tensor ${tensor}`);
    return found;
  };
  return {
    about: area.about,
    cases: area.cases,
    shape: (tensor) => [...info(tensor).shape],
    dtype: (tensor) => info(tensor).dtype,
    floats: (tensor) =>
      info(tensor).storedAs === 'F64'
        ? Float32Array.from(doubles(file.path, info(tensor)))
        : decodeFloats(file.read(tensor), info(tensor).dtype),
    doubles: (tensor) =>
      info(tensor).storedAs === 'F64'
        ? doubles(file.path, info(tensor))
        : Float64Array.from(decodeFloats(file.read(tensor), info(tensor).dtype)),
    bytes: (tensor) => file.read(tensor),
  };
}

/** Values of a tensor of this shape with its axes in another order: axis i of the result is axis order[i]. */
export function permuted(
  values: ArrayLike<number>,
  shape: readonly number[],
  order: readonly number[],
): Float32Array {
  const strides = shape.map((_, axis) => shape.slice(axis + 1).reduce((a, b) => a * b, 1));
  let from = [0];
  for (const axis of order)
    from = from.flatMap((start) => Array.from({ length: shape[axis] }, (_, i) => start + i * strides[axis]));
  return Float32Array.from(from, (at) => values[at]);
}

/** What the helpers need of tap. */
export interface Assert {
  ok(value: unknown, message: string): unknown;
}

/** Passes when |got - want| <= atol + rtol |want| everywhere; NaN never passes. */
export function allClose(
  t: Assert,
  label: string,
  got: ArrayLike<number>,
  want: ArrayLike<number>,
  { atol, rtol }: { atol: number; rtol: number },
): void {
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

/** Largest |got - want|, for messages and for comparisons relative to a maximum. */
export function maxDifference(got: ArrayLike<number>, want: ArrayLike<number>): number {
  let worst = got.length === want.length ? 0 : Number.POSITIVE_INFINITY;
  for (let i = 0; i < want.length; i++) {
    const difference = Math.abs(got[i] - want[i]);
    if (!(difference <= worst)) worst = Number.isNaN(difference) ? Number.POSITIVE_INFINITY : difference;
  }
  return worst;
}

/** Some sums were recorded in float64, which is no storage type of ours: read here, past the reader that refuses it. */
function doubles(path: string, { offset, bytes }: { offset: number; bytes: number }): Float64Array {
  const out = new Float64Array(bytes / 8);
  const fd = openSync(path, 'r');
  readSync(fd, out, 0, bytes, offset);
  closeSync(fd);
  return out;
}
