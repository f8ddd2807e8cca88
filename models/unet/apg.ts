// Adaptive projected guidance (Sadat et al. 2024), as diffusers' guider has it: of what the prompt changes in the prediction (text -
// unconditional) a sum over the calls is taken, its length bounded, and the part of it along the text's prediction, which oversaturates,
// weighed by eta. It goes over what the network says, noise or velocity, and on the host, as lengths are sums over an image.
import { addScaled, dotAt } from '../../engine/ops/runs.ts';
import { UserError } from '../../io/errors.ts';

export interface APG {
  /** What the sum of the calls before counts in each, -1 to 1; 0, not at all, is diffusers' None. */
  momentum: number;
  /** The length that it is cut to in an image where it is longer; 0 for any length. */
  rescale: number;
  /** What its part along the text's prediction is taken times; 1 leaves it as it is. */
  eta: number;
}

/** The part of a request that says how guidance is projected. */
export interface APGRequest {
  /** The numbers of diffusers' AdaptiveProjectedGuidance; plain guidance where absent. */
  adaptive_projected_guidance?: APG;
}

/** @throws UserError where there is no guidance to project */
export function checkAPG(
  { adaptive_projected_guidance: apg, guidance_scale: scale }: APGRequest & { guidance_scale: number },
  guided: boolean,
): void {
  if (!apg || guided) return;
  const why =
    scale > 1
      ? 'this UNet is told its guidance, of which its steps have none: leave it out'
      : `at a guidance_scale (--guidance-scale) of ${scale} there is none: give more than 1, or leave it out`;
  throw new UserError(`adaptive_projected_guidance (--apg) projects guidance, and ${why}`);
}

/**
 * Guides the calls of one run, in their order: of [what there is without the prompt's change; that change; text], each of the `shape` of
 * latents, it makes [guided; text].
 */
export function projection(
  { momentum, rescale, eta }: APG,
  guidanceScale: number,
  [images, c, h, w]: readonly number[],
): (said: Float32Array) => Float32Array {
  const size = c * h * w;
  const all = images * size;
  const sums = new Float64Array(all);
  return (said) => {
    for (let j = 0; j < all; j++) sums[j] = said[all + j] + momentum * sums[j];
    const both = new Float32Array(2 * all);
    both.set(said.subarray(0, all));
    both.set(said.subarray(2 * all), all);
    for (let at = 0; at < all; at += size) {
      const text = all + at;
      const length = Math.sqrt(dotAt(sums, at, sums, at, size));
      const along = dotAt(sums, at, both, text, size) / Math.max(dotAt(both, text, both, text, size), 1e-24);
      const scale = guidanceScale * (rescale > 0 ? Math.min(1, rescale / length) : 1);
      addScaled(both, at, scale, sums, at, size);
      addScaled(both, at, scale * (eta - 1) * along, both, text, size);
    }
    return both;
  };
}
