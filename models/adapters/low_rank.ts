// The product of two thin matrices that is nearest to a large one: its singular value decomposition cut off at a rank, by randomized
// subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4). Products with the matrix run on its device in float32; what
// remains is small and done here in float64. With these rounds and spare directions the rest that is left out was at most 1 % longer
// than the least one possible, of white noise, whose singular values hardly fall; of a tuned model's differences less.
import { matmul } from '../../engine/ops/linear.ts';
import { scope } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { TorchGenerator } from '../random/torch_random.ts';

const ROUNDS = 4;
/** Directions followed beside those asked for. */
const spare = (rank: number): number => 8 + Math.ceil(rank / 4);

/** A matrix [o, c] is nearly up times down. */
export interface LowRank {
  /** [o, rank]: left singular vectors times their values. */
  up: Float32Array;
  /** [rank, c]: right singular vectors; zeros where a value is zero. */
  down: Float32Array;
}

/** Of a float32 matrix [o, c], with a rank of at most its shorter side. The same numbers each time on a device. */
export function lowRank(matrix: Tensor, rank: number): LowRank {
  const [o, c] = matrix.shape;
  const isWide = o <= c;
  const [short, long] = isWide ? [o, c] : [c, o];
  const count = Math.min(short, rank + spare(rank));
  const { device } = matrix;
  const through = (rows: Float32Array, products: (rows: Tensor) => Tensor): Float32Array =>
    scope(() => products(tensor(rows, [count, short], { device })).floats());
  /** Rows as long as the short side to rows as long as the long one, and back. */
  const forth = (rows: Tensor) => matmul(rows, matrix, { transB: !isWide });
  const back = (rows: Tensor) => matmul(rows, matrix, { transB: isWide });
  let basis = new TorchGenerator(0).randn(count * short);
  // Where there are no more directions all of them are followed already.
  if (count === short) orthonormalise(basis, count);
  else
    for (let round = 0; round < ROUNDS; round++) {
      basis = through(basis, (rows) => back(forth(rows)));
      orthonormalise(basis, count);
    }
  const image = through(basis, forth);
  const turn = eigenvectors(gram(image, count), count).slice(0, rank);
  const [near, far] = [turned(turn, basis, short), turned(turn, image, long)];
  return isWide
    ? { up: transposed(near.map((row, j) => scaled(row, norm(far[j])))), down: joined(far.map(unit)) }
    : { up: transposed(far), down: joined(near.map((row, j) => (norm(far[j]) > 0 ? row : row.fill(0)))) };
}

function dot(a: Float64Array, b: Float64Array): number {
  // Four sums, as one would wait for each addition.
  let [s, t, u, v] = [0, 0, 0, 0];
  let i = 0;
  for (; i + 3 < a.length; i += 4) {
    s += a[i] * b[i];
    t += a[i + 1] * b[i + 1];
    u += a[i + 2] * b[i + 2];
    v += a[i + 3] * b[i + 3];
  }
  for (; i < a.length; i++) s += a[i] * b[i];
  return s + t + (u + v);
}

/** a += factor * b */
function addTo(a: Float64Array, b: Float64Array, factor: number): void {
  for (let i = 0; i < a.length; i++) a[i] += factor * b[i];
}

const norm = (a: Float64Array): number => Math.sqrt(dot(a, a));
const scaled = (a: Float64Array, factor: number): Float64Array => a.map((x) => x * factor);
const unit = (a: Float64Array): Float64Array => scaled(a, 1 / (norm(a) || 1));

function rowsOf(values: Float32Array, count: number): Float64Array[] {
  const length = values.length / count;
  return Array.from({ length: count }, (_, i) =>
    Float64Array.from(values.subarray(i * length, (i + 1) * length)),
  );
}

/** Gram-Schmidt, modified: in float64 once is enough for rows that come from float32. What depends on rows before becomes zero. */
function orthonormalise(values: Float32Array, count: number): void {
  const rows = rowsOf(values, count);
  rows.forEach((row, j) => {
    const before = norm(row);
    for (let i = 0; i < j; i++) addTo(row, rows[i], -dot(row, rows[i]));
    const after = norm(row);
    const factor = after > 1e-10 * before ? 1 / after : 0;
    for (let i = 0; i < row.length; i++) row[i] *= factor;
    values.set(row, j * row.length);
  });
}

/** Products of all rows with each other, [count, count]. */
function gram(values: Float32Array, count: number): Float64Array[] {
  const rows = rowsOf(values, count);
  const made = rows.map(() => new Float64Array(count));
  for (let i = 0; i < count; i++)
    for (let j = 0; j <= i; j++) made[i][j] = made[j][i] = dot(rows[i], rows[j]);
  return made;
}

/** Of a symmetric matrix, those of the largest values first: Jacobi's rotations, until nothing is beside the diagonal. */
function eigenvectors(matrix: Float64Array[], count: number): Float64Array[] {
  const vectors = matrix.map((_, i) => new Float64Array(count).fill(1, i, i + 1));
  const whole = matrix.reduce((total, row) => total + dot(row, row), 0);
  const isDone = (p: number, q: number) => matrix[p][q] ** 2 <= 1e-24 * whole;
  for (let turns = 1; turns > 0; ) {
    turns = 0;
    for (let p = 0; p < count; p++)
      for (let q = p + 1; q < count; q++) {
        if (isDone(p, q)) continue;
        turns++;
        const half = (matrix[q][q] - matrix[p][p]) / (2 * matrix[p][q]);
        const tan = (half < 0 ? -1 : 1) / (Math.abs(half) + Math.sqrt(half * half + 1));
        const cos = 1 / Math.sqrt(tan * tan + 1);
        rotate(matrix[p], matrix[q], cos, tan * cos);
        for (const row of matrix) {
          const [x, y] = [row[p], row[q]];
          row[p] = cos * x - tan * cos * y;
          row[q] = tan * cos * x + cos * y;
        }
        rotate(vectors[p], vectors[q], cos, tan * cos);
      }
  }
  return vectors
    .map((vector, i) => ({ vector, value: matrix[i][i] }))
    .sort((a, b) => b.value - a.value)
    .map(({ vector }) => vector);
}

function rotate(a: Float64Array, b: Float64Array, cos: number, sin: number): void {
  for (let i = 0; i < a.length; i++) {
    const x = a[i];
    a[i] = cos * x - sin * b[i];
    b[i] = sin * x + cos * b[i];
  }
}

/** Each weighs the rows of `values`, and makes one of them. */
function turned(weights: readonly Float64Array[], values: Float32Array, length: number): Float64Array[] {
  const rows = rowsOf(values, values.length / length);
  return weights.map((weight) => {
    const made = new Float64Array(length);
    rows.forEach((row, i) => {
      addTo(made, row, weight[i]);
    });
    return made;
  });
}

function joined(rows: readonly Float64Array[]): Float32Array {
  const out = new Float32Array(rows.length * rows[0].length);
  rows.forEach((row, i) => {
    out.set(row, i * row.length);
  });
  return out;
}

function transposed(rows: readonly Float64Array[]): Float32Array {
  const out = new Float32Array(rows.length * rows[0].length);
  rows.forEach((row, j) => {
    for (let i = 0; i < row.length; i++) out[i * rows.length + j] = row[i];
  });
  return out;
}
