// FreeU (Si et al. 2023), as diffusers has it: at the layers of the first two levels on the way up half of the image's channels are taken
// times b, and the lowest frequencies of the skip connection times s. Those are four, {-1, 0} x {-1, 0}, so what the filter takes away
// is a product of seven waves over the pixels with their inner products with the image: two small matrix products, and no Fourier
// transform. Forward alone: for sampling.
import { add } from '../../engine/ops/binary.ts';
import { matmul } from '../../engine/ops/linear.ts';
import { cast } from '../../engine/ops/unary.ts';
import { weightNorm } from '../../engine/ops/weight_norm.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { type ContextCache, once } from './context_cache.ts';

export const freeUNumbers = ['s1', 's2', 'b1', 'b2'] as const;

/** For the first level and the second what the skip connections' lowest frequencies (s) and half of the image's channels (b) are taken times. */
export type FreeU = Readonly<Record<(typeof freeUNumbers)[number], number>>;

/** Rows of a matrix product begin on 16-byte boundaries where it has so many columns, or a multiple. */
const ALIGNED = 8;

/** The waves of the lowest frequencies over h x w pixels, a row each: sum over rows of wave(p) wave(q) is what the filter has between p and q. */
export function lowestWaves(h: number, w: number): number[][] {
  const frequencies = (n: number) => [...new Set([0, n - 1])];
  const waves = frequencies(h).flatMap((ky) =>
    frequencies(w).flatMap((kx) =>
      [Math.cos, Math.sin].map((wave) =>
        Array.from({ length: h * w }, (_, i) =>
          wave(2 * Math.PI * ((ky * Math.floor(i / w)) / h + (kx * (i % w)) / w)),
        ),
      ),
    ),
  );
  return waves.filter((wave) => wave.some((value) => Math.abs(value) > 1e-6));
}

/** [n, rows, pixels] that ask an image for its waves, and [n, pixels, rows] that add (s - 1) of them to it. */
function filterFor({ shape: [n, h, w], device, dtype }: Tensor, s: number): Tensor[] {
  const waves = lowestWaves(h, w);
  const pixels = h * w;
  const rows = Math.ceil(waves.length / ALIGNED) * ALIGNED;
  const [down, up] = [new Float32Array(n * rows * pixels), new Float32Array(n * rows * pixels)];
  for (let image = 0; image < n; image++)
    waves.forEach((wave, row) => {
      wave.forEach((value, pixel) => {
        // Means, as sums over pixels may leave float16's range.
        down[(image * rows + row) * pixels + pixel] = value / pixels;
        up[(image * pixels + pixel) * rows + row] = (s - 1) * value;
      });
    });
  const placed = (data: Float32Array, ...shape: number[]) => cast(tensor(data, shape, { device }), dtype);
  return [placed(down, n, rows, pixels), placed(up, n, pixels, rows)];
}

/** b for the first half of x's channels and 1 for the others, and what they are lengths of as weightNorm() sees it. */
function factorsFor({ shape, device }: Tensor, b: number): Tensor[] {
  const [c] = shape.slice(-1);
  const factors = Float32Array.from({ length: c }, (_, k) => (k < Math.floor(c / 2) ? b : 1));
  return [tensor(factors, [c], { device }), tensor(new Float32Array(c).fill(1), [c], { device })];
}

/** What a layer of the `level`-th level, `block`, takes, of its image and the skip connection beside it, both [n, h, w, c]. */
export function applyFreeU(
  { s1, s2, b1, b2 }: FreeU,
  level: number,
  { x, skip }: { x: Tensor; skip: Tensor },
  { block, layer, cache }: { block: object; layer: object; cache?: ContextCache },
): { x: Tensor; skip: Tensor } {
  if (level > 1) return { x, skip };
  const [s, b] = level === 0 ? [s1, b1] : [s2, b2];
  // A level's images have one size, and different numbers of channels.
  const [down, up] = once(cache, block, () => filterFor(skip, s));
  const [factors, ones] = once(cache, layer, () => factorsFor(x, b));
  const [n, h, w, c] = skip.shape;
  const image = skip.reshape(n, h * w, c);
  return {
    x: weightNorm(x, factors, ones),
    skip: add(image, matmul(up, matmul(down, image))).reshape(n, h, w, c),
  };
}
