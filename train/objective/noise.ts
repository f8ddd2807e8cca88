// The noise of a picture, which the network is to predict: white, with an offset of each channel and coarser levels where the run asks
// for them. Drawn by (seed, epoch, sample) on the host, so that neither batches nor GPUs change it.
import { type Draws, draws } from '../data/draws.ts';

export interface NoiseSettings {
  /** Strength of noise that is constant over each channel; 0 for none. */
  noise_offset: number;
  /** Draw that strength for each picture, from 0 to what is said. */
  noise_offset_random_strength: boolean;
  /** Discount of noise at lower resolutions, level by level; 0 for none. */
  pyramid_noise: number;
}

/** The noise of one image [h, w, c], a target that the network should predict: white, offset and pyramid noise. */
export function drawNoise(
  { noise_offset, noise_offset_random_strength, pyramid_noise }: NoiseSettings,
  shape: readonly [number, number, number],
  seed: number,
  epoch: number,
  sample: number,
): Float32Array {
  const [h, w, c] = shape;
  const noise = draws(seed, epoch, sample, 'noise').normals(h * w * c);
  if (noise_offset > 0) {
    const offset = draws(seed, epoch, sample, 'offset').normals(c);
    const share = noise_offset_random_strength ? draws(seed, epoch, sample, 'offset_strength').uniform() : 1;
    for (let i = 0; i < noise.length; i++) noise[i] += share * noise_offset * offset[i % c];
  }
  if (pyramid_noise > 0) addPyramid(noise, shape, pyramid_noise, draws(seed, epoch, sample, 'pyramid'));
  return noise;
}

const PYRAMID_LEVELS = 10;

/**
 * Multi-resolution noise (Whitaker 2023): level i has sides divided by r^i, r drawn from [2, 4), is enlarged bilinearly and
 * added times discount^i, until a side is 1; the sum is scaled back to a variance of 1, image by image. Each level divides
 * the original size, as kohya does; the first publication and diffengine shrink what the level before left. Levels begin at 1: kohya's
 * level 0 is white noise of full size and weight 1, a second time, which takes the coarser levels' shares down.
 */
function addPyramid(
  noise: Float32Array,
  [h, w, c]: readonly [number, number, number],
  discount: number,
  source: Draws,
): void {
  for (let level = 1; level <= PYRAMID_LEVELS; level++) {
    const ratio = (2 + 2 * source.uniform()) ** level;
    const [rows, columns] = [Math.max(1, Math.floor(h / ratio)), Math.max(1, Math.floor(w / ratio))];
    const values = source.normals(rows * columns * c);
    addEnlarged(noise, [h, w, c], { values, rows, columns }, discount ** level);
    if (rows === 1 || columns === 1) break;
  }
  const mean = noise.reduce((sum, x) => sum + x, 0) / noise.length;
  const spread = Math.sqrt(noise.reduce((sum, x) => sum + (x - mean) ** 2, 0) / (noise.length - 1));
  for (let i = 0; i < noise.length; i++) noise[i] /= spread;
}

/** An image [rows, columns, c]. */
interface Coarse {
  values: Float32Array;
  rows: number;
  columns: number;
}

/** y += factor * x enlarged bilinearly to y's size, pixel centres aligned at the borders (torch's align_corners false). */
function addEnlarged(
  y: Float32Array,
  [h, w, c]: readonly [number, number, number],
  { values: x, rows, columns }: Coarse,
  factor: number,
): void {
  const place = (i: number, big: number, small: number): [number, number, number] => {
    const at = Math.max(0, ((i + 0.5) * small) / big - 0.5);
    const low = Math.min(small - 1, Math.floor(at));
    return [low, Math.min(small - 1, low + 1), at - low];
  };
  for (let i = 0; i < h; i++) {
    const [top, bottom, down] = place(i, h, rows);
    for (let j = 0; j < w; j++) {
      const [left, right, across] = place(j, w, columns);
      for (let k = 0; k < c; k++) {
        const value = (row: number, column: number) => x[(row * columns + column) * c + k];
        const upper = value(top, left) * (1 - across) + value(top, right) * across;
        const lower = value(bottom, left) * (1 - across) + value(bottom, right) * across;
        y[(i * w + j) * c + k] += factor * (upper * (1 - down) + lower * down);
      }
    }
  }
}
