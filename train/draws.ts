// Every random choice of training, drawn from a counter (Philox4x32-10, Salmon et al. 2011) and not from a running state:
// the key is (seed, epoch, sample, purpose), so splitting a batch, accumulating, adding workers or resuming changes no
// draw. The key becomes a stream of kernels/cpu/random.cc by one Philox call, and the numbers are that kernel's own.

/** What a draw is for. The place in this list is part of the key: append only. */
const purposes = [
  'order',
  'caption',
  'dropout',
  'tags',
  'crop',
  'flip',
  'moments',
  'noise',
  'offset',
  'pyramid',
  'perturbation',
  'timestep',
  'rounding',
  'weights',
] as const;
export type Purpose = (typeof purposes)[number];

export interface Draws {
  /** In [0, 1), a multiple of 2^-24. */
  uniform(): number;
  /** A whole number in [0, bound). */
  integer(bound: number): number;
  /** `count` standard normals. Each call starts at an even word of the stream. */
  normals(count: number): Float32Array;
}

/** A stream of the kernels in kernels/cpu/random.cc, as their arguments: signed 32-bit integers. */
export interface Stream {
  seedLow: number;
  seedHigh: number;
  stream: number;
}

/** The stream of a key. `sample` and `epoch` are whole numbers below 2^32; where a purpose has none, 0. */
export function streamOf(seed: number, epoch: number, sample: number, purpose: Purpose): Stream {
  const words = new Uint32Array(4);
  philox(words, epoch, sample, purposes.indexOf(purpose), 0, seed, Math.floor(seed / 2 ** 32));
  return { seedLow: words[0] | 0, seedHigh: words[1] | 0, stream: words[2] | 0 };
}

/** The numbers of a key, from the first. Asking again for the same key gives the same numbers. */
export function draws(seed: number, epoch: number, sample: number, purpose: Purpose): Draws {
  const { seedLow, seedHigh, stream } = streamOf(seed, epoch, sample, purpose);
  const words = new Uint32Array(4);
  let next = 0;
  const word = (): number => {
    if (next % 4 === 0) philox(words, next / 4, 0, stream, 0, seedLow, seedHigh);
    return words[next++ % 4];
  };
  return {
    uniform: () => (word() >>> 8) / 2 ** 24,
    integer: (bound) => Math.floor((word() / 2 ** 32) * bound),
    normals(count) {
      if (next % 2 === 1) next++;
      const out = new Float32Array(count);
      for (let i = 0; i < count; i += 2) {
        // Box-Muller; the first uniform lies in (0, 1], so its logarithm is finite.
        const radius = Math.sqrt(-2 * Math.log((word() + 1) * 2 ** -32));
        const angle = 2 * Math.PI * 2 ** -32 * word();
        out[i] = radius * Math.cos(angle);
        if (i + 1 < count) out[i + 1] = radius * Math.sin(angle);
      }
      return out;
    },
  };
}

/** Ten rounds of Philox4x32 on counter (c0, c1, c2, c3) under key (k0, k1), into `out`. */
export function philox(
  out: Uint32Array,
  c0: number,
  c1: number,
  c2: number,
  c3: number,
  k0: number,
  k1: number,
): void {
  let [a, b, c, d, key0, key1] = [c0 >>> 0, c1 >>> 0, c2 >>> 0, c3 >>> 0, k0 >>> 0, k1 >>> 0];
  for (let round = 0; round < 10; round++) {
    const [highA, lowA] = [multiplyHigh(a, 0xd251, 0x1f53), Math.imul(a, 0xd2511f53)];
    const [highC, lowC] = [multiplyHigh(c, 0xcd9e, 0x8d57), Math.imul(c, 0xcd9e8d57)];
    [a, b, c, d] = [(highC ^ b ^ key0) >>> 0, lowC >>> 0, (highA ^ d ^ key1) >>> 0, lowA >>> 0];
    key0 = (key0 + 0x9e3779b9) >>> 0;
    key1 = (key1 + 0xbb67ae85) >>> 0;
  }
  out[0] = a;
  out[1] = b;
  out[2] = c;
  out[3] = d;
}

/** The upper 32 bits of x times (high 2^16 + low), exact as every product stays below 2^49. */
const multiplyHigh = (x: number, high: number, low: number): number =>
  Math.floor((x * high + Math.floor((x * low) / 65536)) / 65536);
