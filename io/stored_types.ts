// Types that files keep numbers in: ours, as they are, and those that nothing computes with, which are read as one that holds them.
// An 8-bit float is a float16 exactly: e5m2 is its upper byte, and e4m3 (the "fn" kind, without infinities: S.1111.111 is NaN) has
// fewer bits of everything (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433). A float64 is rounded to float32.
import { bytesPerElement, type DType, toFloat16, typedView } from './dtype.ts';
import type { StoredType } from './tensor_file.ts';

/** Elements that are stored as we compute with them. */
export const plain = (dtype: DType): StoredType => ({ dtype, elements: 1, bytes: bytesPerElement[dtype] });

export const float64: StoredType = {
  dtype: 'float32',
  elements: 1,
  bytes: 8,
  decode(blocks, elements) {
    const from = new DataView(blocks.buffer, blocks.byteOffset, blocks.byteLength);
    const to = typedView(elements, 'float32') as Float32Array;
    for (let i = 0; i < to.length; i++) to[i] = from.getFloat64(8 * i, true);
  },
};

function e4m3(bits: number): number {
  const sign = bits & 0x80 ? -1 : 1;
  const [exponent, significand] = [(bits >> 3) & 15, bits & 7];
  if (exponent === 15 && significand === 7) return Number.NaN;
  return exponent === 0 ? sign * significand * 2 ** -9 : sign * (1 + significand / 8) * 2 ** (exponent - 7);
}

/** Bytes that are looked up as float16. */
function float8(toHalf: (bits: number) => number): StoredType {
  const halves = Uint16Array.from({ length: 256 }, (_, bits) => toHalf(bits));
  const decode = (blocks: Uint8Array, elements: Uint8Array): void => {
    const to = typedView(elements, 'float16') as Uint16Array;
    for (let i = 0; i < to.length; i++) to[i] = halves[blocks[i]];
  };
  return { dtype: 'float16', elements: 1, bytes: 1, decode };
}

export const float8E4M3 = float8((bits) => toFloat16(e4m3(bits)));
export const float8E5M2 = float8((bits) => bits << 8);
