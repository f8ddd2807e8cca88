// What a mask marks painted over with the colours around it, A1111's masked content "fill" (masking.fill), as Pillow does it, bit for bit:
// the picture without what is masked, blurred ever less and laid over itself, so that each place has the colour of the nearest known
// ones. A blur is three box blurs each way with a fractional radius (Gwosdek et al. 2011), in fixed point with 24 bits.
import { by255, laidOver, straight } from './alpha.ts';
import type { Mask, Picture } from './pixels.ts';

/** Radii, and how often each is laid over the ones before it: an edge that is transparent grows opaque. */
const layers = [
  [256, 1],
  [64, 1],
  [16, 2],
  [4, 4],
  [2, 2],
  [0, 1],
] as const;

/** Both of one size. */
export function fillMasked(picture: Picture, mask: Mask): Picture {
  const { width, height } = picture;
  const area = width * height;
  const planes = [0, 1, 2, 3].map(() => new Uint8Array(area));
  for (let i = 0; i < area; i++) {
    const kept = 255 - mask.data[i];
    for (let c = 0; c < 3; c++) planes[c][i] = by255(picture.data[3 * i + c] * kept);
    planes[3][i] = kept;
  }
  const out = new Uint8Array(4 * area);
  for (const [radius, times] of layers) {
    const [red, green, blue, alpha] = planes.map((plane) => gaussianBlur(plane, width, height, radius));
    for (let i = 0; i < area; i++) {
      const a = alpha[i];
      // What is wholly known lies over all else in the end.
      if (a === 0 || (radius > 0 && planes[3][i] === 255)) continue;
      const [r, g, b] = [straight(red[i], a), straight(green[i], a), straight(blue[i], a)];
      for (let n = 0; n < times; n++) laidOver(out, 4 * i, r, g, b, a);
    }
  }
  const data = new Uint8Array(3 * area);
  for (let i = 0; i < area; i++) for (let c = 0; c < 3; c++) data[3 * i + c] = out[4 * i + c];
  return { ...picture, data };
}

/** One channel under Pillow's GaussianBlur. */
function gaussianBlur(plane: Uint8Array, width: number, height: number, radius: number): Uint8Array {
  if (radius === 0) return plane;
  const box = boxRadius(radius);
  const out = new Uint8Array(plane);
  for (let y = 0; y < height; y++) blurLine(out, y * width, 1, width, box);
  for (let x = 0; x < width; x++) blurLine(out, x, width, height, box);
  return out;
}

const passes = 3;

/** Of boxes that make up a bell of this sigma together, in float32 as there. */
function boxRadius(sigma: number): number {
  const variance = Math.fround((sigma * sigma) / passes);
  const length = Math.fround(Math.sqrt(12 * variance + 1));
  const whole = Math.fround(Math.floor((length - 1) / 2));
  const above = Math.fround((2 * whole + 1) * Math.fround(whole * (whole + 1) - Math.fround(3 * variance)));
  const below = Math.fround(6 * Math.fround(variance - Math.fround((whole + 1) * (whole + 1))));
  return Math.fround(whole + Math.fround(above / below));
}

function blurLine(data: Uint8Array, first: number, step: number, length: number, box: number): void {
  const radius = Math.floor(box);
  const inside = Math.trunc(Math.fround(2 ** 24 / Math.fround(box * 2 + 1)));
  const outer = Math.floor((2 ** 24 - (radius * 2 + 1) * inside) / 2);
  let [line, next] = [new Uint8Array(length), new Uint8Array(length)];
  for (let i = 0; i < length; i++) line[i] = data[first + i * step];
  const last = length - 1;
  for (let pass = 0; pass < passes; pass++) {
    let sum = line[0] * (radius + 1);
    for (let x = 0; x < radius; x++) sum += line[Math.min(x, last)];
    for (let x = 0; x < length; x++) {
      sum += line[Math.min(x + radius, last)] - line[Math.max(x - radius - 1, 0)];
      const beyond = line[Math.max(x - radius - 1, 0)] + line[Math.min(x + radius + 1, last)];
      next[x] = (sum * inside + beyond * outer + 2 ** 23) / 2 ** 24;
    }
    [line, next] = [next, line];
  }
  for (let i = 0; i < length; i++) data[first + i * step] = line[i];
}
