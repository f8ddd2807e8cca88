// Loops over numbers that lie side by side, in which the reference loops of products and attention spend their time: a loop that asks
// nothing else runs several times as fast.
import type { Numbers } from '../op.ts';

/** The sum of `length` products of what begins at a[ia] and at b[ib]. */
export function dotAt(a: Numbers, ia: number, b: Numbers, ib: number, length: number): number {
  let total = 0;
  for (let k = 0; k < length; k++) total += a[ia + k] * b[ib + k];
  return total;
}

/** Adds `factor` times the `length` numbers from b[ib] on to those from a[ia] on. */
export function addScaled(
  a: Numbers,
  ia: number,
  factor: number,
  b: Numbers,
  ib: number,
  length: number,
): void {
  for (let k = 0; k < length; k++) a[ia + k] += factor * b[ib + k];
}
