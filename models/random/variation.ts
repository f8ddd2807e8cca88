// A1111's variation seeds and "Resize seed from" (its rng.py): the noise that a picture begins with lies between two seeds' on the arc that
// joins them (Shoemake 1985), column by column of the latents; or is that of another size, laid into the middle of its own. All later
// draws are the seed's.
import type { NoiseGenerator } from './generator.ts';
import { TorchGenerator } from './torch_random.ts';

/** How a first noise differs from its seed's. */
export interface Variation {
  /** Whose noise lies at the other end. */
  subseed?: number;
  /** How far to go to the subseed's noise, 0 to 1; 0 where absent. */
  subseed_strength?: number;
  /** [height, width] in pixels, eight to a latent: the noise of a picture of that size. */
  seed_resize_from?: readonly [height: number, width: number];
}

/** Channels, height and width of latents. */
type Shape = readonly [c: number, h: number, w: number];

/** A generator whose first noise is a variation. One for several pictures varies each. */
export class VariedGenerator implements NoiseGenerator {
  readonly #own: NoiseGenerator;
  readonly #seed: number;
  readonly #variation: Variation;
  /** A refiner that goes over the finished picture has the same generator. */
  #begun = false;
  readonly #kind: new (
    seed: number,
  ) => NoiseGenerator;

  /** @param Kind whose numbers both seeds' are, TorchGenerator or CudaGenerator */
  constructor(
    seed: number,
    variation: Variation,
    Kind: new (seed: number) => NoiseGenerator = TorchGenerator,
  ) {
    this.#own = new Kind(seed);
    this.#seed = seed;
    this.#variation = variation;
    this.#kind = Kind;
  }

  randn(n: number): Float32Array {
    return this.#own.randn(n);
  }

  words(n: number): Int32Array | undefined {
    return this.#own.words?.(n);
  }

  first(shape: readonly number[]): Float32Array {
    const [n, c, height, width] = shape;
    if (this.#begun) return this.#own.randn(n * c * height * width);
    this.#begun = true;
    const { subseed = 0, subseed_strength: strength = 0, seed_resize_from: pixels } = this.#variation;
    const [h, w] = pixels?.map((side) => Math.floor(side / 8)) ?? [height, width];
    const isResized = h !== height || w !== width;
    const count = c * h * w;
    const from = (isResized ? new this.#kind(this.#seed) : this.#own).randn(n * count);
    if (strength !== 0) {
      const to = new this.#kind(subseed).randn(n * count);
      for (let i = 0; i < n; i++) {
        const [a, b] = [from, to].map((noise) => noise.subarray(i * count, (i + 1) * count));
        a.set(slerp(strength, a, b, [c, h, w]));
      }
    }
    if (!isResized) return from;
    const planes = n * c;
    return laidInto(this.#own.randn(planes * height * width), [planes, height, width], from, [planes, h, w]);
  }
}

/** Where two noises are one direction, A1111 takes a plain mean of them. */
const ALIKE = 0.9995;

/** From `low` to `high`, each column of each channel by its own angle. Sums are in float64. */
function slerp(strength: number, low: Float32Array, high: Float32Array, [c, h, w]: Shape): Float32Array {
  const columns = Array.from({ length: c * w }, (_, k) => Math.floor(k / w) * h * w + (k % w));
  const inner = (a: Float32Array, b: Float32Array, at: number) => {
    let sum = 0;
    for (let i = at; i < at + h * w; i += w) sum += a[i] * b[i];
    return sum;
  };
  const cosines = columns.map((at) => {
    const lengths = Math.sqrt(inner(low, low, at) * inner(high, high, at));
    return inner(low, high, at) / lengths;
  });
  const mean = cosines.reduce((sum, cosine) => sum + cosine / cosines.length, 0);
  if (mean > ALIKE) return low.map((x, i) => x * strength + high[i] * (1 - strength));
  const out = new Float32Array(low.length);
  columns.forEach((at, k) => {
    const angle = Math.acos(cosines[k]);
    const [of, to] = [1 - strength, strength].map((part) => Math.sin(part * angle) / Math.sin(angle));
    for (let i = at; i < at + h * w; i += w) out[i] = of * low[i] + to * high[i];
  });
  return out;
}

/** `x` with the planes of `y` in its middle, which are cut where they are larger. */
function laidInto(
  x: Float32Array,
  [planes, ...sides]: Shape,
  y: Float32Array,
  [, ...others]: Shape,
): Float32Array {
  const [rows, columns] = sides.map((side, i) => {
    const gap = Math.floor((side - others[i]) / 2);
    return gap < 0
      ? { to: 0, from: -gap, count: others[i] + 2 * gap }
      : { to: gap, from: 0, count: others[i] };
  });
  const [[height, width], [h, w]] = [sides, others];
  for (let plane = 0; plane < planes; plane++)
    for (let row = 0; row < rows.count; row++) {
      const begin = (plane * h + rows.from + row) * w + columns.from;
      x.set(y.subarray(begin, begin + columns.count), (plane * height + rows.to + row) * width + columns.to);
    }
  return x;
}
