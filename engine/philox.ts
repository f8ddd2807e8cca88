// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four random words from a counter
// and a key, the same words as kernels/cpu/philox.h. A stream's counter is (place as 64 bits, stream, 0).

/** A stream of the native kernels, as their arguments: signed 32-bit integers. */
export interface Stream {
  seedLow: number;
  seedHigh: number;
  stream: number;
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
