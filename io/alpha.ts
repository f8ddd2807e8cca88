// Pillow's arithmetic of transparent 8-bit pixels, its roundings included: what lies over something else.

/** A product of two levels divided by 255, rounded. */
export const by255 = (x: number): number => (((x + 128) >> 8) + x + 128) >> 8;

/** A level that was multiplied by its alpha, no longer: rounded down. */
export const straight = (level: number, alpha: number): number =>
  alpha === 255 ? level : Math.min(255, Math.floor((255 * level) / alpha));

/** A pixel of `a` over 0 laid over the one whose red, green, blue and alpha begin at `i` (alpha_composite). */
export function laidOver(pixels: Uint8Array, i: number, r: number, g: number, b: number, a: number): void {
  const alpha = a * 255 + pixels[i + 3] * (255 - a);
  const share = Math.floor((a * 255 * 255 * 128) / alpha); // with seven bits behind the point
  pixels[i] = mixed(r, pixels[i], share);
  pixels[i + 1] = mixed(g, pixels[i + 1], share);
  pixels[i + 2] = mixed(b, pixels[i + 2], share);
  pixels[i + 3] = by255(alpha);
}

function mixed(above: number, below: number, share: number): number {
  const sum = above * share + below * (255 * 128 - share) + 0x4000;
  return ((sum >> 8) + sum) >> 15;
}
