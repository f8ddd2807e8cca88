// Latents in another size, as torch.nn.functional.interpolate gives them (align_corners=False): each side of each plane by weights of its
// own, rows first. With `antialias` the filters are Pillow's, which reach no further than the picture's edge and have a = -0.5; without
// it bicubic has a = -0.75 and repeats the edge.
import { mixOf } from '../../io/resize.ts';
import type { Latents } from './latents.ts';

export type InterpolationMode = 'nearest' | 'nearest-exact' | 'bilinear' | 'bicubic';

/** How latents are made larger or smaller, in torch's words. */
export interface Interpolation {
  /** 'bilinear' where absent. */
  mode?: InterpolationMode;
  /** Of bilinear and bicubic. */
  antialias?: boolean;
}

const f32 = Math.fround;

/** What an output takes: weights of inputs. */
type Mixture = readonly (readonly [at: number, weight: number])[];

/** [n, c, h, w] as [n, c, height, width]. @param height, width in latents, not pixels */
export function interpolate(
  { shape, data }: Latents,
  [height, width]: readonly [height: number, width: number],
  how: Interpolation = {},
): Latents {
  const [n, c, h, w] = shape;
  const down = Array.from({ length: height }, (_, i) => mixtureOf(i, h, height, how));
  const across = Array.from({ length: width }, (_, i) => mixtureOf(i, w, width, how));
  const out = new Float32Array(n * c * height * width);
  for (let plane = 0; plane < n * c; plane++) {
    const from = data.subarray(plane * h * w, (plane + 1) * h * w);
    const wide = new Float64Array(h * width); // its rows at their new width
    for (let y = 0; y < h; y++)
      for (let x = 0; x < width; x++) wide[y * width + x] = summed(across[x], (at) => from[y * w + at]);
    const to = out.subarray(plane * height * width, (plane + 1) * height * width);
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++) to[y * width + x] = summed(down[y], (at) => wide[at * width + x]);
  }
  return { shape: [n, c, height, width], data: out };
}

function summed(mixture: Mixture, value: (at: number) => number): number {
  let sum = 0;
  for (const [at, weight] of mixture) sum += weight * value(at);
  return sum;
}

/** The i-th of `output` places over `input` ones. */
function mixtureOf(
  i: number,
  input: number,
  output: number,
  { mode = 'bilinear', antialias = false }: Interpolation,
): Mixture {
  const scale = input / output;
  const inside = (at: number) => Math.min(input - 1, Math.max(0, at));
  // In float32, as torch has them: where a place falls on a border the rounding decides.
  const rough = f32(scale);
  if (mode === 'nearest') return [[inside(Math.floor(f32(i * rough))), 1]];
  if (mode === 'nearest-exact') {
    const place = f32((i + 0.5) * rough - 0.5);
    return [[inside(Math.floor(f32(Math.max(0, place) + 0.5))), 1]];
  }
  if (antialias) {
    const { first, weights } = mixOf(i, input, output, mode);
    return weights.map((weight, k) => [first + k, weight]);
  }
  const place = scale * (i + 0.5) - 0.5;
  if (mode === 'bicubic') {
    const first = Math.floor(place);
    return cubic(place - first).map((weight, k) => [inside(first - 1 + k), weight]);
  }
  const first = Math.floor(Math.max(0, place));
  const part = Math.max(0, place) - first;
  return [
    [first, 1 - part],
    [inside(first + 1), part],
  ];
}

/** Weights of the four places around one that lies `t` behind the second (Keys 1981). */
function cubic(t: number): number[] {
  const a = -0.75;
  const near = (x: number) => ((a + 2) * x - (a + 3)) * x * x + 1;
  const far = (x: number) => ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
  return [far(t + 1), near(t), near(1 - t), far(2 - t)];
}
