// A mask's edge made soft, as A1111 has OpenCV do it (GaussianBlur of 8-bit levels, first along rows, then along columns), bit for bit: a
// kernel of as many pixels as two and a half times its sigma reach, in fixed point with 8 bits behind the point, the rounding of each
// weight handed on to the next and the middle one taking what is left of 1. Outside of the mask it is mirrored, its edge not repeated.
import type { Mask } from './pixels.ts';

/** `sigma` in pixels; 0 gives the mask back. */
export function blurMask(mask: Mask, sigma: number): Mask {
  if (sigma <= 0) return mask;
  const { width, height } = mask;
  const weights = kernel(sigma);
  const data = new Uint8Array(mask.data);
  for (let y = 0; y < height; y++) blurLine(data, y * width, 1, width, weights);
  for (let x = 0; x < width; x++) blurLine(data, x, width, height, weights);
  return { ...mask, data };
}

/** The weights from the outermost to the middle one; the other half is the same. */
function kernel(sigma: number): number[] {
  const reach = Math.floor(2.5 * sigma + 0.5);
  const bell = Array.from({ length: reach + 1 }, (_, i) => Math.exp(-((reach - i) ** 2) / (2 * sigma ** 2)));
  const sum = 2 * bell.reduce((all, each) => all + each, 0) - bell[reach];
  const weights: number[] = [];
  let [left, total] = [0, 0];
  for (const each of bell.slice(0, -1)) {
    const exact = (each / sum) * 256 + left;
    weights.push(Math.round(exact));
    left = exact - Math.round(exact);
    total += Math.round(exact);
  }
  return [...weights, 256 - 2 * total];
}

function blurLine(data: Uint8Array, first: number, step: number, length: number, weights: number[]): void {
  const reach = weights.length - 1;
  const line = new Uint8Array(length + 2 * reach);
  for (let i = -reach; i < length + reach; i++) line[i + reach] = data[first + mirrored(i, length) * step];
  // Where all that is reached is alike it stays so: the weights are 1 together.
  let alike = 0;
  for (let i = 0; i < line.length; i++) {
    alike = i > 0 && line[i] === line[i - 1] ? alike + 1 : 1;
    const at = i - 2 * reach;
    if (at < 0 || alike > 2 * reach) continue;
    let sum = weights[reach] * line[at + reach];
    for (let k = 0; k < reach; k++) sum += weights[k] * (line[at + k] + line[i - k]);
    data[first + at * step] = (sum + 128) >> 8;
  }
}

function mirrored(i: number, length: number): number {
  if (i >= 0 && i < length) return i;
  if (length === 1) return 0;
  const period = 2 * (length - 1);
  const at = ((i % period) + period) % period;
  return at < length ? at : period - at;
}
