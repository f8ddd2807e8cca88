// The best product of a rank against torch's singular values (low_rank.jsonl): what it leaves is at most 1 % longer
// than what must be left, and its columns and rows are what kohya's extraction has: U S and V^T.
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { lowRank } from '../../models/adapters/low_rank.ts';
import { numbers } from '../support/controlnet_golden.ts';
import { goldenLines } from '../support/golden.ts';

interface Recorded {
  name: string;
  shape: [o: number, c: number];
  fall: number;
  values: number[];
  rest: Record<string, number>;
}

const matrixOf = ({ name, shape, fall }: Recorded): Float32Array =>
  numbers(name, shape).map((k, i) => k * 2 ** -Math.floor(fall * Math.floor(i / shape[1])));

const device = openDevice('cpu');
const made = (matrix: Float32Array, shape: readonly number[], rank: number) =>
  scope(() => lowRank(tensor(matrix, shape, { device }), rank));

/** The length of what a product leaves, in float64. */
function restOf(
  matrix: Float32Array,
  { up, down }: ReturnType<typeof made>,
  c: number,
  rank: number,
): number {
  const squares = matrix.map((want, at) => {
    const [i, j] = [Math.floor(at / c), at % c];
    let left = want;
    for (let r = 0; r < rank; r++) left -= up[i * rank + r] * down[r * c + j];
    return left * left;
  });
  return Math.sqrt(squares.reduce((sum, each) => sum + each, 0));
}

const product = (a: Float32Array, b: Float32Array): number => a.reduce((sum, x, i) => sum + x * b[i], 0);

test("as near as torch's decomposition", (t) => {
  const recorded = goldenLines<Recorded>('low_rank');
  t.equal(recorded.length, 5);
  for (const each of recorded) {
    const { name, shape, values, rest } = each;
    const [o, c] = shape;
    const matrix = matrixOf(each);
    const whole = Math.sqrt(product(matrix, matrix));
    for (const [text, best] of Object.entries(rest)) {
      const rank = Number(text);
      const found = made(matrix, shape, rank);
      t.same([found.up.length, found.down.length], [o * rank, rank * c]);
      const left = restOf(matrix, found, c, rank);
      t.ok(left <= 1.01 * best + 1e-6 * whole, `${name} of rank ${rank}: ${left}, at best ${best}`);
      t.ok(left >= best * (1 - 1e-5), `${name} of rank ${rank} is not better than the best`);
      const rows = Array.from({ length: rank }, (_, r) => found.down.subarray(r * c, (r + 1) * c));
      const worst = Math.max(
        ...rows.flatMap((a, i) => rows.map((b, j) => Math.abs(product(a, b) - Number(i === j)))),
      );
      t.ok(worst < 1e-4, `rows of length 1 that are at right angles, to ${worst}`);
      const lengths = Array.from({ length: rank }, (_, r) => found.up.filter((_, i) => i % rank === r)).map(
        (column) => Math.sqrt(product(column, column)),
      );
      t.same(
        lengths,
        lengths.toSorted((a, b) => b - a),
        'the largest first',
      );
      // White noise has many values that are nearly as large, which what is found mixes: of it the rest alone tells.
      for (const [r, value] of values.slice(0, each.fall > 0.5 ? rank : 0).entries())
        t.ok(
          Math.abs(lengths[r] / value - 1) < 1e-6,
          `${name}: value ${r} is ${lengths[r]}, ${value} in torch`,
        );
    }
  }
  t.end();
});

test('a matrix of a lower rank than is asked for, and one of zeros', (t) => {
  const [o, c, rank] = [40, 30, 20];
  const [left, right] = [numbers('left', [o, 3]), numbers('right', [3, c])];
  const matrix = Float32Array.from({ length: o * c }, (_, at) =>
    [0, 1, 2].reduce((sum, r) => sum + left[Math.floor(at / c) * 3 + r] * right[r * c + (at % c)], 0),
  );
  const found = made(matrix, [o, c], rank);
  const whole = Math.sqrt(product(matrix, matrix));
  t.ok(restOf(matrix, found, c, rank) < 1e-6 * whole, 'is whole');
  const again = made(matrix, [o, c], rank);
  t.same([again.up, again.down].map(String), [found.up, found.down].map(String), 'the same numbers again');
  const none = made(new Float32Array(o * c), [o, c], 2);
  t.ok(
    [...none.up, ...none.down].every((x) => x === 0),
    'zeros, and no NaN',
  );
  t.end();
});
