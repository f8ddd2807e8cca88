// Random numbers equal bit for bit to those of PyTorch's CPU generator (the AVX2 build), so that a seed gives
// the same picture here as in diffusers. Engine: the Mersenne Twister MT19937 (Matsumoto & Nishimura 1998).
// Normals: Box-Muller, in blocks of 16 with Cephes' float32 polynomials (engine/cephes_float.ts) from 16 elements
// on, one at a time in float64 below that. Only float64 normals, and calls for fewer than 16, rest on the
// platform's log, sin and cos: their last bit may differ.
import { boxMuller16 } from '../../engine/cephes_float.ts';
import { fromBfloat16, fromFloat16, toBfloat16, toFloat16 } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';

export type RandomDType = 'float32' | 'float64' | 'float16' | 'bfloat16';

const stateSize = 624;
const middle = 397;
const blockSize = 16;

/** @throws UserError for what is no integer */
export function wholeSeed(seed: number | bigint): bigint {
  if (typeof seed === 'bigint' || Number.isInteger(seed)) return BigInt(seed);
  throw new UserError(`a generator's seed is ${seed}: give a whole number`);
}

/**
 * torch.Generator on the CPU. Calls advance one stream; the same calls in the same order give the same
 * numbers.
 */
export class TorchGenerator {
  readonly #state = new Uint32Array(stateSize);
  #next = stateSize;
  /** The unused half of the last small Box-Muller pair; large calls neither take nor clear it. */
  #cachedNormal: number | undefined;

  /** @param seed any integer; as in torch only its low 32 bits count (5 and 2^32 + 5 are one stream) */
  constructor(seed: number | bigint) {
    const state = this.#state;
    state[0] = Number(BigInt.asUintN(32, wholeSeed(seed)));
    for (let i = 1; i < stateSize; i++) {
      state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
    }
  }

  /** torch.rand: `n` uniforms in [0, 1); the half types come as float32 that holds the rounded values. */
  rand(n: number, dtype: 'float64'): Float64Array;
  rand(n: number, dtype?: Exclude<RandomDType, 'float64'>): Float32Array;
  rand(n: number, dtype: RandomDType = 'float32'): Float32Array | Float64Array {
    if (dtype === 'float64') return Float64Array.from({ length: n }, () => this.#uniform64());
    const out = new Float32Array(n);
    const round = rounding[dtype];
    for (let i = 0; i < n; i++) {
      const value = round(this.#uniform32());
      out[i] = value === 1 ? 0 : value; // a half type may round up to 1, which the interval excludes
    }
    return out;
  }

  /**
   * torch.randn of a contiguous tensor with `n` elements; the half types come as float32 holding the rounded
   * values.
   */
  randn(n: number, dtype: 'float64'): Float64Array;
  randn(n: number, dtype?: Exclude<RandomDType, 'float64'>): Float32Array;
  randn(n: number, dtype: RandomDType = 'float32'): Float32Array | Float64Array {
    if (n < blockSize) return this.#smallNormals(n, dtype);
    if (dtype === 'float64') return this.#normals64(n);
    if (dtype === 'float32') return this.#normals32(n);
    return this.#halfNormals(n, rounding[dtype]);
  }

  /**
   * The words that randn(n) makes its numbers of, for a device to do that (engine/ops/random.ts); undefined where it takes them
   * otherwise, and draws nothing then.
   */
  words(n: number): Int32Array | undefined {
    if (n < blockSize || n % blockSize) return undefined;
    const out = new Int32Array(n);
    this.#words(out, 0, n);
    return out;
  }

  /**
   * torch.randint: `n` integers in [lo, hi). Float64Array, as ranges may pass 2^31.
   * @throws RangeError when the range is empty or an end is not a safe integer
   */
  randint(lo: number, hi: number, n: number): Float64Array {
    if (!Number.isSafeInteger(lo) || !Number.isSafeInteger(hi) || !(lo < hi)) {
      throw new RangeError(`randint needs safe integers with lo < hi, got ${lo} and ${hi}`);
    }
    const range = hi - lo;
    const wide = BigInt(range);
    // Ranges below 2^28 take one 32-bit draw; wider ones take two, the first as the high word.
    const draw = range < 2 ** 28 ? () => this.#draw() % range : () => Number(this.#draw64() % wide);
    return Float64Array.from({ length: n }, () => lo + draw());
  }

  /** torch.randperm: the numbers 0..n-1 shuffled. */
  randperm(n: number): Int32Array {
    const out = Int32Array.from({ length: n }, (_, i) => i);
    for (let i = 0; i < n - 1; i++) {
      const other = i + (this.#draw() % (n - i));
      [out[i], out[other]] = [out[other], out[i]];
    }
    return out;
  }

  #draw(): number {
    if (this.#next === stateSize) this.#refill();
    return tempered(this.#state[this.#next++]) >>> 0;
  }

  #refill(): void {
    const state = this.#state;
    const turn = (i: number, next: number, far: number) => {
      const y = (state[i] & 0x80000000) | (state[next] & 0x7fffffff);
      state[i] = state[far] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    };
    const rest = stateSize - middle;
    for (let i = 0; i < rest; i++) turn(i, i + 1, i + middle);
    for (let i = rest; i < stateSize - 1; i++) turn(i, i + 1, i - rest);
    turn(stateSize - 1, 0, middle - 1);
    this.#next = 0;
  }

  #draw64(): bigint {
    const high = BigInt(this.#draw());
    return (high << 32n) | BigInt(this.#draw());
  }

  #uniform32(): number {
    return (this.#draw() & 0xffffff) * 2 ** -24;
  }

  /** As many draws of #uniform32 in units of 2^-24, without a call to each. */
  #words(out: Float32Array | Int32Array, start: number, end: number): void {
    const state = this.#state;
    let next = this.#next;
    for (let i = start; i < end; i++) {
      if (next === stateSize) {
        this.#refill();
        next = 0;
      }
      out[i] = tempered(state[next++]) & 0xffffff;
    }
    this.#next = next;
  }

  // The low 53 of 64 bits; the first draw is the high word.
  #uniform64(): number {
    const high = this.#draw() & 0x1fffff;
    return (high * 2 ** 32 + this.#draw()) * 2 ** -53;
  }

  #smallNormals(n: number, dtype: RandomDType): Float32Array | Float64Array {
    const out = dtype === 'float64' ? new Float64Array(n) : new Float32Array(n);
    const round = dtype === 'float64' ? (value: number) => value : rounding[dtype];
    for (let i = 0; i < n; i++) out[i] = round(this.#smallNormal());
    return out;
  }

  #smallNormal(): number {
    const cached = this.#cachedNormal;
    this.#cachedNormal = undefined;
    if (cached !== undefined) return cached;
    const theta = 2 * Math.PI * this.#uniform64();
    const radius = Math.sqrt(-2 * Math.log1p(-this.#uniform64()));
    this.#cachedNormal = radius * Math.sin(theta);
    return radius * Math.cos(theta);
  }

  // All uniforms are drawn first; the ragged end is covered by one more block over the last 16 places.
  #normals32(n: number): Float32Array {
    const out = new Float32Array(n);
    this.#words(out, 0, n);
    for (let i = 0; i + blockSize <= n; i += blockSize) boxMuller16(out, i);
    if (n % blockSize) this.#normalBlock32(out, n - blockSize);
    return out;
  }

  #normalBlock32(out: Float32Array, start: number): void {
    this.#words(out, start, start + blockSize);
    boxMuller16(out, start);
  }

  #normals64(n: number): Float64Array {
    const out = new Float64Array(n);
    for (let i = 0; i < n; i++) out[i] = this.#uniform64();
    for (let i = 0; i + blockSize <= n; i += blockSize) boxMuller16Float64(out, i);
    if (n % blockSize) {
      for (let i = n - blockSize; i < n; i++) out[i] = this.#uniform64();
      boxMuller16Float64(out, n - blockSize);
    }
    return out;
  }

  // Unlike float32, half types draw block by block, so the ragged end costs only its own 16 draws.
  #halfNormals(n: number, round: (value: number) => number): Float32Array {
    const out = new Float32Array(n);
    for (let i = 0; i + blockSize <= n; i += blockSize) this.#normalBlock32(out, i);
    if (n % blockSize) this.#normalBlock32(out, n - blockSize);
    return out.map(round);
  }
}

/** A word of the state as it is given out. */
function tempered(y: number): number {
  y ^= y >>> 11;
  y ^= (y << 7) & 0x9d2c5680;
  y ^= (y << 15) & 0xefc60000;
  return y ^ (y >>> 18);
}

// Every type but float64 passes through float32.
const rounding = {
  float32: Math.fround,
  float16: (value: number) => fromFloat16(toFloat16(value)),
  bfloat16: (value: number) => fromBfloat16(toBfloat16(value)),
};

function boxMuller16Float64(d: Float64Array, start: number): void {
  for (let j = start; j < start + 8; j++) {
    const radius = Math.sqrt(-2 * Math.log(1 - d[j]));
    const theta = 2 * Math.PI * d[j + 8];
    d[j] = radius * Math.cos(theta);
    d[j + 8] = radius * Math.sin(theta);
  }
}
