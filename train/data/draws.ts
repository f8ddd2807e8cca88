// Every random choice of training, drawn from a counter (Philox4x32-10, Salmon et al. 2011) and not from a running state:
// the key is (seed, epoch, sample, purpose), so splitting a batch, accumulating, adding workers or resuming changes no
// draw. The key becomes a stream of kernels/cpu/random.cc by one Philox call, and the numbers are that kernel's own.
import { createHash } from 'node:crypto';
import { philox, type Stream } from '../../engine/philox.ts';
import type { Numbers } from '../../models/adapters/adapters.ts';

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
  'class',
  'network_dropout',
  'rank_dropout',
  'module_dropout',
  'mask',
  'masked_moments',
  'image_dropout',
  'guidance',
  'conditioning',
  'wildcard',
  'offset_strength',
  'perturbation_strength',
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

/**
 * The number under which is drawn what has this name: a sample's id, a weight's key. It hangs on the name alone, so another picture added
 * or taken away changes no draw of this one.
 */
export const keyOf = (name: string): number => createHash('sha256').update(name).digest().readUInt32LE(0);

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

/** What new weights are drawn from, each by its name. */
export const numbersOf =
  (seed: number): Numbers =>
  (name, count, kind) => {
    const source = draws(seed, 0, keyOf(name), 'weights');
    return kind === 'normal'
      ? source.normals(count)
      : Float32Array.from({ length: count }, () => source.uniform());
  };
