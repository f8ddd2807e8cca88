// ggml's tensor types (ggml-common.h of https://github.com/ggml-org/ggml): a matrix's rows are cut into blocks of 32 or 256 numbers, kept as
// integers of 2 to 8 bits with float16 scales. `_0` types are d q, `_1` types d q + m. A block of a K type has 8 or 16 parts whose own
// scales are integers too, of 4 to 8 bits. A float32 holds each number to its last bit but where d q and m are added, which rounds once.
import { allFloat16 } from './dtype.ts';
import { float64, plain } from './stored_types.ts';
import type { StoredType } from './tensor_file.ts';

/** Writes the numbers of the block at b[at] to y[to] and on. */
type DecodeBlock = (b: Uint8Array, at: number, y: Float32Array, to: number) => void;

const half = (b: Uint8Array, at: number): number => allFloat16()[b[at] | (b[at + 1] << 8)];

function blocks(elements: number, bytes: number, decodeBlock: DecodeBlock): StoredType {
  const decode = (from: Uint8Array, into: Uint8Array): void => {
    const y = new Float32Array(into.buffer, into.byteOffset, into.byteLength / 4);
    for (let at = 0, to = 0; to < y.length; at += bytes, to += elements) decodeBlock(from, at, y, to);
  };
  return { dtype: 'float32', elements, bytes, decode };
}

/** d, perhaps m, for 5 bits the 32 upper ones, and 16 bytes with the numbers i and i + 16 in their halves. */
function nibbles(bits: 4 | 5, hasMinimum: boolean): StoredType {
  const high = hasMinimum ? 4 : 2;
  const low = bits === 5 ? high + 4 : high;
  const middle = hasMinimum ? 0 : 2 ** (bits - 1);
  return blocks(32, low + 16, (b, at, y, to) => {
    const d = half(b, at);
    const m = hasMinimum ? half(b, at + 2) : -0; // which leaves every number as it is, -0 too
    for (let i = 0; i < 32; i++) {
      const q = (b[at + low + (i & 15)] >> (i < 16 ? 0 : 4)) & 15;
      const upper = bits === 5 ? ((b[at + high + (i >> 3)] >> (i & 7)) & 1) << 4 : 0;
      y[to + i] = d * ((q | upper) - middle) + m;
    }
  });
}

const q8_0 = blocks(32, 34, (b, at, y, to) => {
  const d = half(b, at);
  for (let i = 0; i < 32; i++) y[to + i] = d * ((b[at + 2 + i] << 24) >> 24);
});

/** 16 bytes of scales and minima (4 bits each), 64 of 2-bit numbers, d, dmin. */
const q2K = blocks(256, 84, (b, at, y, to) => {
  const [d, dmin] = [half(b, at + 80), half(b, at + 82)];
  for (let part = 0; part < 16; part++) {
    const scale = b[at + part];
    const [dl, ml] = [d * (scale & 15), dmin * (scale >> 4)];
    const { from, shift } = twoBits(part);
    for (let i = 0; i < 16; i++) y[to + 16 * part + i] = dl * ((b[at + 16 + from + i] >> shift) & 3) - ml;
  }
});

/** 32 bytes with the third bits (clear for 4 less), 64 of the lower two, 12 of 6-bit scales less 32, d. */
const q3K = blocks(256, 110, (b, at, y, to) => {
  const d = half(b, at + 108);
  const scales = at + 96;
  for (let part = 0; part < 16; part++) {
    const low = (b[scales + (part & 7)] >> (part < 8 ? 0 : 4)) & 15;
    const high = (b[scales + 8 + (part & 3)] >> (2 * (part >> 2))) & 3;
    const dl = d * ((low | (high << 4)) - 32);
    const { from, shift } = twoBits(part);
    for (let i = 0; i < 16; i++) {
      const upper = (b[at + ((16 * part + i) & 31)] >> (part >> 1)) & 1;
      y[to + 16 * part + i] = dl * (((b[at + 32 + from + i] >> shift) & 3) - (upper ? 0 : 4));
    }
  }
});

/** Where the 16 numbers of a part lie among 64 bytes, of which each has one of four parts in two bits. */
const twoBits = (part: number) => ({ from: 32 * (part >> 3) + 16 * (part & 1), shift: part & 6 });

/** The scale and the minimum of the j-th of 8 parts: 6 bits each in 12 bytes, the upper two of the last four above those of the first. */
function scaleAndMinimum(b: Uint8Array, at: number, j: number): [number, number] {
  if (j < 4) return [b[at + j] & 63, b[at + 4 + j] & 63];
  const last = b[at + 4 + j];
  return [(last & 15) | ((b[at + j - 4] >> 2) & 48), (last >> 4) | ((b[at + j] >> 2) & 48)];
}

/** d, dmin, 12 bytes of scales and minima, for 5 bits 32 bytes with the upper ones, 128 bytes with two parts in the halves of each 32. */
function q4Or5K(bits: 4 | 5): StoredType {
  const low = bits === 5 ? 48 : 16;
  return blocks(256, low + 128, (b, at, y, to) => {
    const [d, dmin] = [half(b, at), half(b, at + 2)];
    for (let part = 0; part < 8; part++) {
      const [scale, minimum] = scaleAndMinimum(b, at + 4, part);
      const [dl, ml] = [d * scale, dmin * minimum];
      const [from, shift] = [at + low + 32 * (part >> 1), 4 * (part & 1)];
      for (let i = 0; i < 32; i++) {
        const upper = bits === 5 ? ((b[at + 16 + i] >> part) & 1) << 4 : 0;
        y[to + 32 * part + i] = dl * (((b[from + i] >> shift) & 15) | upper) - ml;
      }
    }
  });
}

/** 128 bytes of the lower four bits, 64 of the upper two, 16 signed scales, d; numbers are less 32. */
const q6K = blocks(256, 210, (b, at, y, to) => {
  const d = half(b, at + 208);
  for (let part = 0; part < 16; part++) {
    const dl = d * ((b[at + 192 + part] << 24) >> 24);
    const [i0, n] = [16 * (part & 7), part >> 3];
    for (let i = i0; i < i0 + 16; i++) {
      const low = (b[at + 64 * n + (i & 63)] >> (i < 64 ? 0 : 4)) & 15;
      const high = (b[at + 128 + 32 * n + (i & 31)] >> (2 * (i >> 5))) & 3;
      y[to + 128 * n + i] = dl * ((low | (high << 4)) - 32);
    }
  }
});

/** By the number that a file has for it: the name, and how it is kept where it is read. */
export const ggmlTypes: ReadonlyMap<number, readonly [name: string, type?: StoredType]> = new Map([
  [0, ['F32', plain('float32')]],
  [1, ['F16', plain('float16')]],
  [2, ['Q4_0', nibbles(4, false)]],
  [3, ['Q4_1', nibbles(4, true)]],
  [6, ['Q5_0', nibbles(5, false)]],
  [7, ['Q5_1', nibbles(5, true)]],
  [8, ['Q8_0', q8_0]],
  [9, ['Q8_1']],
  [10, ['Q2_K', q2K]],
  [11, ['Q3_K', q3K]],
  [12, ['Q4_K', q4Or5K(4)]],
  [13, ['Q5_K', q4Or5K(5)]],
  [14, ['Q6_K', q6K]],
  [15, ['Q8_K']],
  [16, ['IQ2_XXS']],
  [17, ['IQ2_XS']],
  [18, ['IQ3_XXS']],
  [19, ['IQ1_S']],
  [20, ['IQ4_NL']],
  [21, ['IQ3_S']],
  [22, ['IQ2_S']],
  [23, ['IQ4_XS']],
  [24, ['I8']],
  [25, ['I16']],
  [26, ['I32', plain('int32')]],
  [27, ['I64', plain('int64')]],
  [28, ['F64', float64]],
  [29, ['IQ1_M']],
  [30, ['BF16', plain('bfloat16')]],
  [34, ['TQ1_0']],
  [35, ['TQ2_0']],
  [39, ['MXFP4']],
]);
