// Exact arithmetic on floats by BigInt, written apart from the virtual GPU's own so that it can judge it: a float is
// mantissa * 2^exponent, sums and products are exact, and one rounding ends the operation.

export interface Format {
  /** Bits of the significand, with the hidden one. */
  readonly precision: number;
  /** Exponent of the smallest subnormal. */
  readonly least: number;
  /** Largest finite value. */
  readonly most: number;
}

export const float32: Format = { precision: 24, least: -149, most: (2 - 2 ** -23) * 2 ** 127 };
export const bfloat16: Format = { precision: 8, least: -133, most: (2 - 2 ** -7) * 2 ** 127 };
export const float64: Format = { precision: 53, least: -1074, most: Number.MAX_VALUE };
export const float16: Format = { precision: 11, least: -24, most: 65504 };

export type RoundingMode = 'rn' | 'rz' | 'rm' | 'rp';

interface Exact {
  readonly mantissa: bigint;
  readonly exponent: number;
}

/** A finite number as an integer times a power of two. */
function exactly(x: number): Exact {
  const [bits] = new BigInt64Array(Float64Array.of(x).buffer);
  const field = Number((bits >> 52n) & 0x7ffn);
  const fraction = bits & 0xfffffffffffffn;
  const mantissa = field ? fraction | 0x10000000000000n : fraction;
  return { mantissa: bits < 0n ? -mantissa : mantissa, exponent: (field || 1) - 1075 };
}

/** The value in `format` that the exact number rounds to. */
function round({ mantissa, exponent }: Exact, format: Format, mode: RoundingMode): number {
  if (mantissa === 0n) return 0;
  const negative = mantissa < 0n;
  let m = negative ? -mantissa : mantissa;
  let e = exponent;
  const drop = Math.max(m.toString(2).length - format.precision, format.least - e);
  if (drop > 0) {
    const rest = m & ((1n << BigInt(drop)) - 1n);
    const half = 1n << BigInt(drop - 1);
    m >>= BigInt(drop);
    e += drop;
    const up =
      mode === 'rn'
        ? rest > half || (rest === half && (m & 1n) === 1n)
        : mode === 'rp'
          ? !negative && rest > 0n
          : mode === 'rm' && negative && rest > 0n;
    if (up) m++;
  }
  const size = Number(m) * 2 ** e;
  const towardsZero = mode === 'rz' || mode === (negative ? 'rp' : 'rm');
  const value = size <= format.most ? size : towardsZero ? format.most : Number.POSITIVE_INFINITY;
  return negative ? -value : value;
}

const shifted = (x: Exact, exponent: number) => x.mantissa << BigInt(x.exponent - exponent);

function plus(x: Exact, y: Exact): Exact {
  const exponent = Math.min(x.exponent, y.exponent);
  return { mantissa: shifted(x, exponent) + shifted(y, exponent), exponent };
}

const times = (x: Exact, y: Exact): Exact => ({
  mantissa: x.mantissa * y.mantissa,
  exponent: x.exponent + y.exponent,
});

const allFinite = (...values: number[]) => values.every(Number.isFinite);

/** x y + z rounded once; without the finite numbers JavaScript's own rules serve. */
export function exactFma(
  x: number,
  y: number,
  z: number,
  format = float32,
  mode: RoundingMode = 'rn',
): number {
  if (!allFinite(x, y, z)) return x * y + z;
  const sum = plus(times(exactly(x), exactly(y)), exactly(z));
  return sum.mantissa === 0n ? x * y + z : round(sum, format, mode);
}

export function exactSum(x: number, y: number, format = float32, mode: RoundingMode = 'rn'): number {
  const sum = allFinite(x, y) ? plus(exactly(x), exactly(y)) : undefined;
  return !sum || sum.mantissa === 0n ? x + y : round(sum, format, mode);
}

export function exactProduct(x: number, y: number, format = float32, mode: RoundingMode = 'rn'): number {
  if (!allFinite(x, y) || x * y === 0) {
    if (!allFinite(x, y) || x === 0 || y === 0) return x * y;
  }
  return round(times(exactly(x), exactly(y)), format, mode);
}

export const exactRounding = (x: number, format: Format, mode: RoundingMode = 'rn'): number =>
  Number.isFinite(x) && x !== 0 ? round(exactly(x), format, mode) : x;
