// GGUF files for the tests: written from the specification, with whatever is to be wrong in them.
import { toFloat16 } from '../../io/dtype.ts';

export interface GgufTensor {
  name: string;
  /** As torch has it; the file has it the other way round. */
  shape: readonly number[];
  /** ggml's number for it. */
  type: number;
  bytes: Uint8Array;
  /** Beside where it lies. */
  offset?: bigint;
}

/** A text, a number (uint32), or a list of int32. */
export type GgufValue = string | number | readonly number[];

export const u32 = (value: number): Buffer => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
};

export const u64 = (value: number | bigint): Buffer => {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return bytes;
};

export const text = (value: string): Buffer => {
  const bytes = Buffer.from(value);
  return Buffer.concat([u64(bytes.byteLength), bytes]);
};

function valueBytes(value: GgufValue): Buffer {
  if (typeof value === 'string') return Buffer.concat([u32(8), text(value)]);
  if (typeof value === 'number') return Buffer.concat([u32(4), u32(value)]);
  return Buffer.concat([u32(9), u32(5), u64(value.length), Buffer.from(Int32Array.from(value).buffer)]);
}

/** A whole file. `general.alignment` in the metadata counts. */
export function ggufBytes(
  tensors: readonly GgufTensor[],
  metadata: Readonly<Record<string, GgufValue>> = {},
  version = 3,
): Buffer {
  const alignment = Number(metadata['general.alignment'] ?? 32);
  const padded = (bytes: Uint8Array): Buffer =>
    Buffer.concat([bytes, Buffer.alloc((alignment - (bytes.byteLength % alignment)) % alignment)]);
  let next = 0;
  const infos = tensors.map(({ name, shape, type, bytes, offset }) => {
    const info = [
      text(name),
      u32(shape.length),
      ...shape.toReversed().map(u64),
      u32(type),
      u64(offset ?? next),
    ];
    next += padded(bytes).byteLength;
    return Buffer.concat(info);
  });
  const pairs = Object.entries(metadata).map(([key, value]) => Buffer.concat([text(key), valueBytes(value)]));
  const counts = [u32(version), u64(tensors.length), u64(pairs.length)];
  const header = Buffer.concat([Buffer.from('GGUF'), ...counts, ...pairs, ...infos]);
  return Buffer.concat([padded(header), ...tensors.map(({ bytes }) => padded(bytes))]);
}

/** Numbers as ggml's Q8_0: of each 32 a float16 scale, the largest over 127, and bytes. */
export function q8_0(values: Float32Array): Uint8Array {
  const bytes = new Uint8Array((values.length / 32) * 34);
  const out = new DataView(bytes.buffer);
  for (let block = 0; block < values.length / 32; block++) {
    const mine = values.subarray(32 * block, 32 * block + 32);
    const d = mine.reduce((most, value) => Math.max(most, Math.abs(value)), 0) / 127;
    out.setUint16(34 * block, toFloat16(d), true);
    mine.forEach((value, i) => void out.setInt8(34 * block + 2 + i, d && Math.round(value / d)));
  }
  return bytes;
}
