// Images that go on at their other side, as those on a pattern do: where it is asked for, convolutions are padded with what lies there
// in place of zeros (torch's padding_mode "circular"). Padding that is not the same on both sides is part of a stride, and stays zeros.
// Asked for around a pass and not of a layer, so that a loaded model draws either picture.
import type { Padding } from './ops/conv2d.ts';
import { concat, slice } from './ops/move.ts';
import type { Tensor } from './tensor.ts';

/** Which axes go on: x to the sides, y up and down. */
export const seamlessAxes = ['x', 'y', 'xy'] as const;
export type Seamless = (typeof seamlessAxes)[number];

let current: Seamless | undefined;

/** Runs `fn`, in which images are without seams along `axes`. */
export function withoutSeams<R>(axes: Seamless | undefined, fn: () => R): R {
  const before = current;
  current = axes;
  try {
    return fn();
  } finally {
    current = before;
  }
}

/** x with its last rows (axis 1) or columns (axis 2) before it, and its first behind. */
function around(x: Tensor, axis: 1 | 2, before: number, behind: number): Tensor {
  const last = before > 0 ? [slice(x, axis, x.shape[axis] - before, before)] : [];
  const first = behind > 0 ? [slice(x, axis, 0, behind)] : [];
  return concat([...last, x, ...first], axis);
}

/** x [n, h, w, c] with what a convolution sees around it, where axes go on; and the padding that is left for it. */
export function wrapped(x: Tensor, padding: Padding): { x: Tensor; padding: Padding } {
  const [top, left, bottom, right] = padding;
  if (!current || top + left + bottom + right === 0) return { x, padding };
  const [down, across] = ['y', 'x'].map((axis) => current?.includes(axis) ?? false);
  const tall = down ? around(x, 1, top, bottom) : x;
  return {
    x: across ? around(tall, 2, left, right) : tall,
    padding: [down ? 0 : top, across ? 0 : left, down ? 0 : bottom, across ? 0 : right],
  };
}
