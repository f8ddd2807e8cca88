// Numbers to blocks of ggml's simpler types, the other direction of ggml_types.ts, to the byte as gguf's quants.py has them
// (https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/quants.py): every step in float32, each rounded by itself. ggml's C gives
// the same Q8_0; of the others it may differ in a number's last step where its compiler fuses a product and a sum. The scale is rounded
// to float16 after the numbers are divided by it.
import { toFloat16 } from './dtype.ts';

/** Rows of 32 and their multiples, end to end, as blocks. */
export type Quantise = (values: Float32Array) => Uint8Array;

const size = 32;
const f = Math.fround;

/** Writes x[from] and the 31 after it as the block at b[at]. */
type EncodeBlock = (x: Float32Array, from: number, b: Uint8Array, at: number) => void;

const inBlocks =
  (bytes: number, encodeBlock: EncodeBlock): Quantise =>
  (values) => {
    const out = new Uint8Array((values.length / size) * bytes);
    for (let from = 0, at = 0; from < values.length; from += size, at += bytes)
      encodeBlock(values, from, out, at);
    return out;
  };

function putHalf(b: Uint8Array, at: number, value: number): void {
  const bits = toFloat16(value);
  b[at] = bits & 255;
  b[at + 1] = bits >> 8;
}

/** What a number is multiplied by, so that a step becomes 1. */
const inverse = (d: number): number => (d === 0 ? 0 : f(1 / d));

/** d is the largest over 127; halves are rounded away from zero. */
const q8_0 = inBlocks(34, (x, from, b, at) => {
  let most = 0;
  for (let i = from; i < from + size; i++) most = Math.max(most, Math.abs(x[i]));
  const d = f(most / 127);
  const id = inverse(d);
  putHalf(b, at, d);
  for (let i = 0; i < size; i++) {
    const scaled = f(x[from + i] * id);
    b[at + 2 + i] = scaled < 0 ? -Math.floor(0.5 - scaled) : Math.floor(scaled + 0.5);
  }
});

/** `_0`: the number furthest from 0 becomes -middle. `_1`: the least becomes 0, the largest the most that the bits hold. */
function nibbles(bits: 4 | 5, hasMinimum: boolean): Quantise {
  const high = hasMinimum ? 4 : 2;
  const low = bits === 5 ? high + 4 : high;
  const most = 2 ** bits - 1;
  const middle = 2 ** (bits - 1);
  return inBlocks(low + 16, (x, from, b, at) => {
    let [least, largest, furthest] = [x[from], x[from], x[from]];
    for (let i = from + 1; i < from + size; i++) {
      least = Math.min(least, x[i]);
      largest = Math.max(largest, x[i]);
      if (Math.abs(x[i]) > Math.abs(furthest)) furthest = x[i];
    }
    const d = hasMinimum ? f(f(largest - least) / most) : f(furthest / -middle);
    const id = inverse(d);
    putHalf(b, at, d);
    if (hasMinimum) putHalf(b, at + 2, least);
    const [origin, offset] = hasMinimum ? [least, 0.5] : [0, middle + 0.5];
    for (let i = 0; i < size; i++) {
      const scaled = f(f(f(x[from + i] - origin) * id) + offset);
      const q = Math.min(most, Math.trunc(scaled));
      b[at + low + (i & 15)] |= (q & 15) << (i < 16 ? 0 : 4);
      if (bits === 5) b[at + high + (i >> 3)] |= (q >> 4) << (i & 7);
    }
  });
}

/** By ggml's name. */
export const quantisers: Readonly<Record<string, Quantise>> = {
  Q4_0: nibbles(4, false),
  Q4_1: nibbles(4, true),
  Q5_0: nibbles(5, false),
  Q5_1: nibbles(5, true),
  Q8_0: q8_0,
};
