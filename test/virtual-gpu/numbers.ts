// Arithmetic that JavaScript lacks, each bit for bit as PTX defines it: fused multiply-add, 16-bit floats, 64-bit integers
// as two 32-bit halves, and the bit-field instructions. Generated code calls these by name (as `num.<name>`).

const floats = new Float32Array(1);
const floatBits = new Int32Array(floats.buffer);
const doubles = new Float64Array(1);
const doubleBits = new Int32Array(doubles.buffer);
const doubleLong = new BigInt64Array(doubles.buffer);

/** The halves of the last 64-bit result: wide functions leave theirs here instead of allocating. */
export const result = new Int32Array(2);

function leave(value: bigint): void {
  doubleLong[0] = BigInt.asIntN(64, value);
  result[0] = doubleBits[0];
  result[1] = doubleBits[1];
}

const signed = (low: number, high: number): bigint => (BigInt(high | 0) << 32n) | BigInt(low >>> 0);
const unsigned = (low: number, high: number): bigint => BigInt.asUintN(64, signed(low, high));

// Bits of floats

export function bitsOfFloat(x: number): number {
  floats[0] = x;
  return floatBits[0];
}

export function floatOfBits(bits: number): number {
  floatBits[0] = bits;
  return floats[0];
}

export function lowOfDouble(x: number): number {
  doubles[0] = x;
  return doubleBits[0];
}

export function highOfDouble(x: number): number {
  doubles[0] = x;
  return doubleBits[1];
}

export function doubleOfBits(low: number, high: number): number {
  doubleBits[0] = low;
  doubleBits[1] = high;
  return doubles[0];
}

// Fused multiply-add

/** p + z rounded to odd in float64: an inexact sum gets an odd last bit, so that a second rounding cannot go wrong. */
function addToOdd(p: number, z: number): number {
  const sum = p + z;
  const virtual = sum - p;
  const error = p - (sum - virtual) + (z - virtual);
  if (error === 0 || !Number.isFinite(sum)) return sum;
  doubles[0] = sum;
  if ((doubleBits[0] & 1) === 0) doubleLong[0] += error > 0 === sum > 0 ? 1n : -1n;
  return doubles[0];
}

/** The float32 nearest to p + z, whose float64 sum lies on a float32 tie. */
export const addTie = (p: number, z: number): number => Math.fround(addToOdd(p, z));

/**
 * fma.rn.f32. The product of two floats is exact in float64; only where the sum then lies on a float32 tie can rounding
 * twice differ from rounding once, and there the sum is taken again, rounded to odd.
 */
export function fma(x: number, y: number, z: number): number {
  const p = x * y;
  const sum = p + z;
  const rounded = Math.fround(sum);
  const rest = sum - rounded;
  const tie = rest !== 0 && Math.fround(rounded + rest + rest) === rounded + rest + rest;
  return tie ? addTie(p, z) : rounded;
}

/** Rounds a float64 to float32 towards zero (rz), -infinity (rm) or +infinity (rp). */
export function roundFloat(x: number, mode: 'rn' | 'rz' | 'rm' | 'rp'): number {
  const nearest = Math.fround(x);
  if (mode === 'rn' || nearest === x || Number.isNaN(nearest)) return nearest;
  const up = mode === 'rp' || (mode === 'rz' && x < 0);
  if (up ? nearest > x : nearest < x) return nearest;
  return neighbour(nearest, up);
}

/** The next float32 above (or below) x. */
function neighbour(x: number, up: boolean): number {
  if (x === 0) return up ? 2 ** -149 : -(2 ** -149);
  floats[0] = x;
  floatBits[0] += up === x > 0 ? 1 : -1;
  return floats[0];
}

/** p + z rounded once in a direction; an exact zero of unlike addends is -0 when that is down. */
export function addRounded(p: number, z: number, mode: 'rz' | 'rm' | 'rp'): number {
  const sum = addToOdd(p, z);
  if (sum === 0 && mode === 'rm') return Object.is(p, 0) && Object.is(z, 0) ? 0 : -0;
  return roundFloat(sum, mode);
}

/** A finite number as mantissa * 2^exponent. */
function parts(x: number): [mantissa: bigint, exponent: number] {
  doubles[0] = x;
  const biased = Number((doubleLong[0] >> 52n) & 0x7ffn);
  const fraction = doubleLong[0] & ((1n << 52n) - 1n);
  const mantissa = biased > 0 ? fraction | (1n << 52n) : fraction;
  return [x < 0 ? -mantissa : mantissa, Math.max(biased, 1) - 1075];
}

/** fma.rn.f64 of finite numbers in whole numbers: right where the exponent's range ends. */
function exactFma64(x: number, y: number, z: number): number {
  const [[mx, ex], [my, ey], [mz, ez]] = [parts(x), parts(y), parts(z)];
  const exponent = Math.min(ex + ey, ez);
  const sum = ((mx * my) << BigInt(ex + ey - exponent)) + (mz << BigInt(ez - exponent));
  if (sum === 0n) return x * y + z;
  const size = sum < 0n ? -sum : sum;
  // The last bit of 53, or that of a subnormal.
  const drop = Math.max(size.toString(2).length - 53, -1074 - exponent);
  const [kept, rest, half] =
    drop > 0
      ? [size >> BigInt(drop), size & ((1n << BigInt(drop)) - 1n), 1n << BigInt(drop - 1)]
      : [size, 0n, 1n];
  const up = rest > half || (rest === half && (kept & 1n) === 1n);
  const value = Number(kept + (up ? 1n : 0n)) * 2 ** (exponent + Math.max(drop, 0));
  return sum < 0n ? -value : value;
}

/** fma.rn.f64 by a split product, and near the ends of the exponent's range exactly. */
export function fma64(x: number, y: number, z: number): number {
  const p = x * y;
  if (!(Number.isFinite(x) && Number.isFinite(y) && Number.isFinite(z))) return p + z;
  if (x === 0 || y === 0) return p + z;
  const isMiddling = (v: number) => Math.abs(v) > 2 ** -900 && Math.abs(v) < 2 ** 900;
  if (![x, y, p].every(isMiddling) || ![z, p + z].every((v) => v === 0 || isMiddling(v)))
    return exactFma64(x, y, z);
  const split = (v: number): [number, number] => {
    const c = v * 134217729;
    const high = c - (c - v);
    return [high, v - high];
  };
  const [xh, xl] = split(x);
  const [yh, yl] = split(y);
  const productError = xl * yl - (p - xh * yh - xl * yh - xh * yl);
  const sum = p + z;
  const virtual = sum - p;
  const sumError = p - (sum - virtual) + (z - virtual);
  return sum + (sumError + productError);
}

// Float helpers

/** rcp.approx.ftz.f64, which sees the high word of its operand and leaves that of the result; subnormals are zeros of their sign. */
export function grossReciprocal(x: number): number {
  const high = (v: number) => (Math.abs(v) < 2 ** -1022 ? v * 0 : doubleOfBits(0, highOfDouble(v)));
  return high(1 / high(x));
}
export const saturate = (x: number): number => (x > 0 ? (x < 1 ? x : 1) : 0);
/** .ftz: a subnormal becomes a zero of its sign. */
export const flush = (x: number): number => (Math.abs(x) < 2 ** -126 ? x * 0 : x);
/** PTX min and max return the number where the other operand is a NaN. */
export const floatMin = (a: number, b: number): number =>
  Number.isNaN(a) ? b : Number.isNaN(b) ? a : Math.min(a, b);
export const floatMax = (a: number, b: number): number =>
  Number.isNaN(a) ? b : Number.isNaN(b) ? a : Math.max(a, b);
export function copySign(sign: number, magnitude: number): number {
  return sign < 0 || Object.is(sign, -0) ? -Math.abs(magnitude) : Math.abs(magnitude);
}

/** Round to the nearest integer, ties to even; zero keeps x's sign. */
export function nearestEven(x: number): number {
  const floor = Math.floor(x);
  const rest = x - floor;
  const up = rest > 0.5 || (rest === 0.5 && floor % 2 !== 0);
  const rounded = up ? floor + 1 : floor;
  return rounded === 0 && x < 0 ? -0 : rounded;
}

// 16-bit floats

/** A float64 as a float32 rounded to odd, from which any narrower rounding is exact. */
function floatToOdd(x: number): number {
  const f = Math.fround(x);
  if (f === x || Number.isNaN(f)) return f;
  floats[0] = f;
  if (floatBits[0] & 1) return f;
  return neighbour(f, f < x);
}

export function toBf16(x: number): number {
  if (Number.isNaN(x)) return 0x7fff;
  floats[0] = floatToOdd(x);
  const b = floatBits[0];
  return ((b + 0x7fff + ((b >>> 16) & 1)) >>> 16) & 0xffff;
}

/** The number of an e4m3 byte: bias 7, no infinities, all ones NaN. */
export function fromE4m3(code: number): number {
  const exponent = (code >> 3) & 15;
  const mantissa = code & 7;
  if (exponent === 15 && mantissa === 7) return Number.NaN;
  const magnitude = exponent === 0 ? mantissa / 512 : (8 + mantissa) * 2 ** (exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

/** cvt.rz.bf16.f32 */
export const truncateBf16 = (x: number): number => (Number.isNaN(x) ? 0x7fff : bitsOfFloat(x) >>> 16);
export const fromBf16 = (bits: number): number => floatOfBits(bits << 16);

export function toF16(x: number): number {
  if (Number.isNaN(x)) return 0x7fff;
  floats[0] = floatToOdd(x);
  const b = floatBits[0];
  const sign = (b >>> 16) & 0x8000;
  const magnitude = Math.abs(floats[0]);
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude < 2 ** -14) return sign | nearestEven(magnitude * 16777216);
  const kept = ((((b >>> 23) & 255) - 112) << 10) | ((b & 0x7fffff) >>> 13);
  const rest = b & 0x1fff;
  return sign | (kept + (rest > 0x1000 || (rest === 0x1000 && kept & 1) ? 1 : 0));
}

export function fromF16(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** cvt.rna.tf32.f32: 10 fraction bits, ties away from zero. */
export const toTf32 = (x: number): number =>
  Number.isNaN(x) ? 0x7fffffff : (bitsOfFloat(x) + 0x1000) & ~0x1fff;

type Binary = (a: number, b: number) => number;
/** Applies a float function to both halves of two packed registers. */
export const pairwiseBf16 = (f: Binary, a: number, b: number): number =>
  toBf16(f(fromBf16(a & 0xffff), fromBf16(b & 0xffff))) |
  (toBf16(f(fromBf16(a >>> 16), fromBf16(b >>> 16))) << 16);
export const pairwiseF16 = (f: Binary, a: number, b: number): number =>
  toF16(f(fromF16(a & 0xffff), fromF16(b & 0xffff))) | (toF16(f(fromF16(a >>> 16), fromF16(b >>> 16))) << 16);
export const fmaBf16 = (a: number, b: number, c: number): number =>
  toBf16(addToOdd(fromBf16(a) * fromBf16(b), fromBf16(c)));
export const fmaF16 = (a: number, b: number, c: number): number =>
  toF16(addToOdd(fromF16(a) * fromF16(b), fromF16(c)));

// Float to integer, saturating. A NaN becomes 0 in up to 32 bits from up to 32 bits, else the highest bit alone.

const clamp = (x: number, low: number, high: number): number =>
  Number.isNaN(x) ? 0 : Math.max(low, Math.min(high, x));
export const toS32 = (x: number): number => clamp(x, -2147483648, 2147483647) | 0;
export const toU32 = (x: number): number => clamp(x, 0, 4294967295) | 0;
export const toS16 = (x: number): number => clamp(x, -32768, 32767) & 0xffff;
export const toU16 = (x: number): number => clamp(x, 0, 65535);
export const toS8 = (x: number): number => clamp(x, -128, 127);
export const toU8 = (x: number): number => clamp(x, 0, 255);
export const fromF64 = (x: number, convert: (x: number) => number, highestBit: number): number =>
  Number.isNaN(x) ? highestBit : convert(x);
export function toWide(x: number, isSignedType: boolean): void {
  const [low, high] = isSignedType ? [-(2n ** 63n), 2n ** 63n - 1n] : [0n, 2n ** 64n - 1n];
  const value = Number.isFinite(x) ? BigInt(x) : x > 0 ? high : low;
  leave(Number.isNaN(x) ? 1n << 63n : value < low ? low : value > high ? high : value);
}
export const wideToNumber = (low: number, high: number, isSignedType: boolean): number =>
  Number(isSignedType ? signed(low, high) : unsigned(low, high));

// Integers

export function mulHighU(a: number, b: number): number {
  const al = a & 0xffff;
  const ah = a >>> 16;
  const bl = b & 0xffff;
  const bh = b >>> 16;
  const t = ah * bl + ((al * bl) >>> 16);
  const u = al * bh + (t & 0xffff);
  return (ah * bh + (t >>> 16) + (u >>> 16)) | 0;
}
export const mulHighS = (a: number, b: number): number =>
  (mulHighU(a, b) - (a < 0 ? b : 0) - (b < 0 ? a : 0)) | 0;
export function mulHigh64(al: number, ah: number, bl: number, bh: number, isSignedType: boolean): void {
  leave((isSignedType ? signed(al, ah) * signed(bl, bh) : unsigned(al, ah) * unsigned(bl, bh)) >> 64n);
}

/** Negative, zero or positive, as a is below, equal to or above b. */
export function compare64(al: number, ah: number, bl: number, bh: number, isSignedType: boolean): number {
  if (ah !== bh) return isSignedType ? (ah < bh ? -1 : 1) : ah >>> 0 < bh >>> 0 ? -1 : 1;
  return al === bl ? 0 : al >>> 0 < bl >>> 0 ? -1 : 1;
}

export const div32 = (a: number, b: number): number => (b === 0 ? -1 : (a / b) | 0);
export const rem32 = (a: number, b: number): number => (b === 0 ? -1 : (a % b) | 0);
export function div64(al: number, ah: number, bl: number, bh: number, isSignedType: boolean): void {
  if ((bl | bh) === 0) leave(-1n);
  else leave(isSignedType ? signed(al, ah) / signed(bl, bh) : unsigned(al, ah) / unsigned(bl, bh));
}
export function rem64(al: number, ah: number, bl: number, bh: number, isSignedType: boolean): void {
  if ((bl | bh) === 0) leave(-1n);
  else leave(isSignedType ? signed(al, ah) % signed(bl, bh) : unsigned(al, ah) % unsigned(bl, bh));
}
export function shiftLeft64(low: number, high: number, count: number): void {
  leave(count >>> 0 > 63 ? 0n : signed(low, high) << BigInt(count));
}
export function shiftRight64(low: number, high: number, count: number, isSignedType: boolean): void {
  const by = BigInt(Math.min(64, count >>> 0));
  leave(isSignedType ? signed(low, high) >> by : unsigned(low, high) >> by);
}
/** shf: the 64 bits b:a shifted, high word for left, low word for right. */
export function funnel(left: boolean, wrap: boolean, a: number, b: number, count: number): number {
  const by = BigInt(wrap ? count & 31 : Math.min(count >>> 0, 32));
  const both = unsigned(a, b);
  return Number(BigInt.asIntN(32, left ? (both << by) >> 32n : both >> by));
}

// Bit fields

export function insertBits(a: number, b: number, position: number, length: number): number {
  const p = position & 255;
  const n = length & 255;
  if (p > 31 || n === 0) return b;
  const mask = (n >= 32 ? -1 : (1 << n) - 1) << p;
  return (b & ~mask) | ((a << p) & mask);
}
export function extractU(a: number, position: number, length: number): number {
  const p = position & 255;
  const n = length & 255;
  if (n === 0 || p > 31) return 0;
  return n >= 32 ? (a >>> p) | 0 : (a >>> p) & ((1 << n) - 1);
}
export function extractS(a: number, position: number, length: number): number {
  const p = Math.min(position & 255, 31);
  const n = length & 255;
  if (n === 0) return 0;
  const end = Math.min(p + n, 32);
  return (a << (32 - end)) >> (32 - end + p);
}
export function permute(a: number, b: number, selector: number): number {
  let y = 0;
  for (let k = 0; k < 4; k++) {
    const choice = (selector >>> (k * 4)) & 15;
    const byte = ((choice & 4 ? b : a) >>> ((choice & 3) * 8)) & 255;
    y |= (choice & 8 ? (byte & 128 ? 255 : 0) : byte) << (k * 8);
  }
  return y;
}
/** lop3: bit 4a + 2b + c of the table. */
export function logic3(a: number, b: number, c: number, table: number): number {
  let y = 0;
  for (let k = 0; k < 8; k++) {
    if ((table >>> k) & 1) y |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  }
  return y;
}
export function countBits(x: number): number {
  let n = x - ((x >>> 1) & 0x55555555);
  n = (n & 0x33333333) + ((n >>> 2) & 0x33333333);
  return Math.imul((n + (n >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24;
}
export function reverseBits(x: number): number {
  let y = 0;
  for (let k = 0; k < 32; k++) y |= ((x >>> k) & 1) << (31 - k);
  return y;
}
/** bfind: position of the highest bit that differs from the sign, -1 for none. */
export const highestBit = (x: number, isSignedType: boolean): number =>
  31 - Math.clz32(isSignedType && x < 0 ? ~x : x);
