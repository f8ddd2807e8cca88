// Box-Muller in float32 as PyTorch's AVX2 code computes it: the single-precision log, sin and cos of the
// Cephes library (Moshier 1989; vectorised as "avx_mathfun"), with fused multiply-adds. JavaScript has
// neither float32 arithmetic nor fma, so each step is done in double and rounded once. Every constant is a
// float32.

const f64 = new Float64Array(1);
const words = new Int32Array(f64.buffer); // low word first: little-endian, as every platform of Node
const f32 = new Float32Array(1);
const f32Bits = new Int32Array(f32.buffer);

/**
 * a * b + c of float32 numbers, rounded once to float32. The product is exact in double; only where the sum then lies
 * midway between two float32 can rounding twice differ from rounding once.
 */
export function fma32(a: number, b: number, c: number): number {
  const product = a * b;
  const sum = product + c;
  const nearest = Math.fround(sum);
  const rest = sum - nearest;
  const other = nearest + rest + rest;
  return rest === 0 || Math.fround(other) !== other ? nearest : addTie(product, c);
}

/** The sum rounded to odd (Boldo & Melquiond 2008), so that the second rounding cannot see a false tie. */
function addTie(product: number, c: number): number {
  const sum = product + c;
  const back = sum - product;
  const error = product - (sum - back) + (c - back);
  if (error === 0) return Math.fround(sum);
  f64[0] = sum;
  const low = words[0];
  if (low & 1) return Math.fround(sum);
  if (error > 0 === sum > 0) words[0] = low + 1;
  else {
    words[0] = low - 1;
    if (low === 0) words[1] -= 1;
  }
  return Math.fround(f64[0]);
}

const { fround } = Math;
const logCoefficients = [
  -1.151461031e-1, 1.167699874e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
  -2.4999993993e-1, 3.3333331174e-1,
].map(fround);
const logLeading = fround(7.0376836292e-2);
const sqrtHalf = fround(Math.SQRT1_2);
const ln2Low = fround(-2.1219444e-4); // ln 2 in two parts, for exact products with the exponent
const ln2High = 0.693359375;

/** The float32 natural logarithm of a positive normal float32. */
function log32(value: number): number {
  f32[0] = value;
  const bits = f32Bits[0];
  let exponent = ((bits >>> 23) & 0xff) - 126;
  f32Bits[0] = (bits & 0x007fffff) | 0x3f000000;
  const mantissa = f32[0]; // in [0.5, 1)
  let x = mantissa - 1;
  if (mantissa < sqrtHalf) {
    exponent -= 1;
    x += mantissa;
  }
  const z = fround(x * x);
  let y = logLeading;
  for (let i = 0; i < logCoefficients.length; i++) y = fma32(y, x, logCoefficients[i]);
  y = fma32(fround(y * x), z, fround(exponent * ln2Low));
  y = fma32(-z, 0.5, y);
  return fma32(exponent, ln2High, fround(x + y));
}

const fourOverPi = fround(4 / Math.PI);
const pi4High = -0.78515625; // -pi / 4 in three parts (Cody & Waite)
const pi4Middle = fround(-2.4187564849853516e-4);
const pi4Low = fround(-3.774894977445941e-8);
const [cos2, cos1, cos0] = [2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2].map(fround);
const [sin2, sin1, sin0] = [-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1].map(fround);

/** The float32 sine and cosine of `theta` >= 0, written to `out[0]` and `out[1]`. */
function sinCos32(theta: number, out: Float32Array): void {
  const octant = (Math.trunc(fround(theta * fourOverPi)) + 1) & ~1;
  const x = fma32(octant, pi4Low, fma32(octant, pi4Middle, fma32(octant, pi4High, theta)));
  const z = fround(x * x);
  const even = fround(fma32(fma32(cos2, z, cos1), z, cos0) * z);
  const cos = fround(fma32(even, z, -fround(z * 0.5)) + 1);
  const odd = fround(fma32(fma32(sin2, z, sin1), z, sin0) * z);
  const sin = fma32(odd, x, x);
  const swap = (octant & 2) !== 0;
  const sine = swap ? cos : sin;
  const cosine = swap ? sin : cos;
  out[0] = octant & 4 ? -sine : sine;
  out[1] = (octant - 2) & 4 ? cosine : -cosine;
}

const twoPi = fround(2 * Math.PI);
const sinCos = new Float32Array(2);

/** Turns the 16 words of 24 bits at `d[start..]` into normals: places j and j + 8 hold one pair. */
export function boxMuller16(d: Float32Array, start: number): void {
  for (let j = start; j < start + 8; j++) {
    const radius = fround(Math.sqrt(fround(-2 * log32(1 - d[j] * 2 ** -24))));
    sinCos32(fround(twoPi * (d[j + 8] * 2 ** -24)), sinCos);
    d[j] = radius * sinCos[1];
    d[j + 8] = radius * sinCos[0];
  }
}
