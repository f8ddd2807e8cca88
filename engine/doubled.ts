// A 3x3 convolution (padding 1) of an image that nearest neighbour has doubled, without the doubled image. Of the three rows
// that a row of y sees, two are the same row of x, so their taps are summed beforehand; likewise columns. Even and odd rows
// and columns see different pairs, which makes four convolutions of 2x2 taps over x, and 16 products where there were 36
// (Aitken et al. 2017, from the other end). Sums of taps are rounded to the weight's type.
// Forward alone: for sampling.
import { wrapped } from './circular.ts';
import { add } from './ops/binary.ts';
import { conv2d } from './ops/conv2d.ts';
import { concat, joinQuarters, slice } from './ops/move.ts';
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
export const conv2dDoubled = (x: Tensor, taps: readonly Tensor[], bias?: Tensor): Tensor =>
  scope(() =>
    joinQuarters(
      taps.map((each, i) => {
        const [odd, right] = [i >> 1, i & 1];
        const { x: seen, padding } = wrapped(x, [1 - odd, 1 - right, odd, right]);
        return conv2d(seen, each, bias, { padding });
      }),
    ),
  );
