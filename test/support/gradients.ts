// Gives a weight a gradient that no backward has made.
import { addGrad, clearGrad } from '../../engine/grad.ts';
import type { Tensor } from '../../engine/tensor.ts';

/** `gradient` is the leaf's from now on, in place of what it had. */
export function giveGradient(leaf: Tensor, gradient: Tensor): void {
  clearGrad(leaf);
  addGrad(leaf, gradient);
  gradient.release();
}
