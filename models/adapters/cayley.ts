// Rotations R out of skew matrices Q, many at once [blocks, b, b] in float32, as orthogonal finetuning (OFT, Qiu et al. 2023) makes them:
//
//   Cayley     R = (I + Q) (I - Q)^-1
//   Neumann    R = I + 2 Q + 2 Q^2 + ... + Q^n, its series cut off (peft's use_cayley_neumann)
//
// What is computed is R - I = 2 (X - I) with X = (I - Q)^-1, without an identity on the way, so that small rotations keep their digits. X
// comes by Newton's iteration (Schulz 1933), which is matrix products alone: no elimination, and nothing that a GPU would have to tell the
// host.
import { noGrad } from '../../engine/grad.ts';
import { add } from '../../engine/ops/binary.ts';
import { combine } from '../../engine/ops/combine.ts';
import { matmul } from '../../engine/ops/linear.ts';
import { scale } from '../../engine/ops/unary.ts';
import type { Tensor } from '../../engine/tensor.ts';

/**
 * Up to which spectral norm of Q the inverse is found where nothing better is known: a rotation by 178 degrees. From 1.4 times that on
 * the iteration ends in NaN.
 */
const LONGEST = 64;

/**
 * R - I. The gradient of an inverse X is X dQ X, whatever way it was found: so that is noted of this product alone.
 * @param longest the most that a Q's spectral norm may be; the less it is, the fewer products are taken
 */
export function cayley(q: Tensor, longest = LONGEST): Tensor {
  const z = noGrad(() => inverse(q, longest));
  const p = add(q, matmul(q, z));
  const product = add(p, matmul(z, p));
  // Without a gradient, so that in sum there is 2 z.
  const rest = noGrad(() => combine([2, z], [-2, product]));
  return add(scale(product, 2), rest);
}

/**
 * (I - Q)^-1 - I, which is Q (I - Q)^-1. X = I + Q is the beginning: (I - Q) X has no eigenvalues but those between 1 and 1 + |Q|^2. Each
 * step, X (2 I - (I - Q) X), takes an eigenvalue y to 1 - (1 - y)^2, and X is scaled before it so that the least and the greatest lie as
 * far from 1. No identity is added to a tensor: X is s I + z, and s ends at 1 as eigenvalues do.
 */
function inverse(q: Tensor, longest: number): Tensor {
  let [s, z] = [1, q];
  let [least, most] = [1, 1 + longest * longest];
  do {
    const t = 2 / (least + most);
    // (I - Q) X = s I + w
    const w = combine([1, z], [-s, q], [-1, matmul(q, z)]);
    z = combine([2 * t - t * t * s, z], [-t * t * s, w], [-t * t, matmul(z, w)]);
    s = 2 * t * s - t * t * s * s;
    [least, most] = [1 - (1 - t * least) ** 2, 1];
  } while (most - least > 1e-9);
  return z;
}

/** R - I of peft's series, by its num_cayley_neumann_terms; 4 are as many as 3 there. */
export function neumann(q: Tensor, terms: number): Tensor {
  const twice = scale(q, Math.min(2, 2 * (terms - 1)));
  let sum = q;
  for (let power = Math.max(3, terms - 1); power > 1; power--) sum = add(twice, matmul(q, sum));
  return terms > 2 ? sum : twice;
}
