// A 3x3 convolution (padding 1) of an image that nearest neighbour has doubled, without the doubled image. Of the three rows
// that a row of y sees, two are the same row of x, so their taps are summed beforehand; likewise columns. Even and odd rows
// and columns see different pairs, which makes four convolutions of 2x2 taps over x, and 16 products where there were 36
// (Aitken et al. 2017, from the other end). Sums of taps are rounded to the weight's type.
import { add } from './ops/binary.ts';
import { conv2d } from './ops/conv2d.ts';
import { concat, slice } from './ops/move.ts';
import { cast } from './ops/unary.ts';
import { scope } from './scope.ts';
import type { Tensor } from './tensor.ts';

/** The three taps of an axis as the even and the odd half of y see them: first | second + third, first + second | third. */
function halves(weight: Tensor, axis: number): [even: Tensor, odd: Tensor] {
  const [first, second, third] = [0, 1, 2].map((i) => slice(weight, axis, i, 1));
  return [concat([first, add(second, third)], axis), concat([add(first, second), third], axis)];
}

/** weight [o, 3, 3, c] → four of [o, 2, 2, c]: even rows with even and odd columns, then odd rows. */
export const doubledTaps = (weight: Tensor): Tensor[] =>
  scope(() =>
    halves(cast(weight, 'float32'), 1)
      .flatMap((rows) => halves(rows, 2))
      .map((taps) => cast(taps, weight.dtype)),
  );

/** x [n, h, w, c], taps by doubledTaps() → [n, 2h, 2w, o]. */
export function conv2dDoubled(x: Tensor, taps: readonly Tensor[], bias?: Tensor): Tensor {
  const [n, h, w] = x.shape;
  const [o] = taps[0].shape;
  const rows = [0, 1].map((odd) =>
    scope(() => {
      const columns = [0, 1].map((right) =>
        conv2d(x, taps[2 * odd + right], bias, { padding: [1 - odd, 1 - right, odd, right] }),
      );
      return concat(
        columns.map((y) => y.reshape(n * h * w, 1, o)),
        1,
      ).reshape(n * h, 1, 2 * w * o);
    }),
  );
  return concat(rows, 1).reshape(n, 2 * h, 2 * w, o);
}
