// TensorBoard event files (tensorflow/core/util/event.proto): TFRecords of protocol buffers, of which we need three
// messages. A record is its length, the length's masked CRC-32C, the bytes, and their masked CRC-32C; appended whole, so a
// killed run loses at most its last record, which TensorBoard passes over.
import { appendFileSync } from 'node:fs';
import { join } from 'node:path';
import { asUserError, makeFolder } from '../../io/files.ts';

export interface EventFile {
  /** Those of the values that are there. */
  scalars(step: number, values: Readonly<Record<string, number | undefined>>): void;
  /** A picture as the bytes of a PNG. */
  image(step: number, tag: string, png: Uint8Array, width: number, height: number): void;
}

/** Opens a new event file in `folder`; TensorBoard reads all files of a folder as one run, in the order of their names. */
export function openEventFile(folder: string, now: () => number = Date.now): EventFile {
  const path = join(folder, `events.out.tfevents.${Math.floor(now() / 1000)}.${process.pid}.sdxl`);
  const write = (message: Uint8Array) => {
    try {
      appendFileSync(path, record(message));
    } catch (error) {
      throw asUserError(error, path);
    }
  };
  const event = (fields: readonly Uint8Array[]) => write(Buffer.concat([double(1, now() / 1000), ...fields]));
  makeFolder(folder);
  event([text(3, 'brain.Event:2')]);
  const summary = (step: number, values: readonly Uint8Array[]) =>
    event([integer(2, step), bytes(5, Buffer.concat(values.map((value) => bytes(1, value))))]);
  return {
    scalars: (step, values) =>
      summary(
        step,
        Object.entries(values).flatMap(([tag, value]) =>
          value === undefined ? [] : [Buffer.concat([text(1, tag), float(2, value)])],
        ),
      ),
    image(step, tag, png, width, height) {
      const picture = Buffer.concat([integer(1, height), integer(2, width), integer(3, 3), bytes(4, png)]);
      summary(step, [Buffer.concat([text(1, tag), bytes(4, picture)])]);
    },
  };
}

/** One TFRecord. */
function record(message: Uint8Array): Uint8Array {
  const out = Buffer.alloc(16 + message.byteLength);
  out.writeBigUInt64LE(BigInt(message.byteLength), 0);
  out.writeUInt32LE(masked(out.subarray(0, 8)), 8);
  out.set(message, 12);
  out.writeUInt32LE(masked(message), 12 + message.byteLength);
  return out;
}

const crcTable = Uint32Array.from({ length: 256 }, (_, i) => {
  let c = i;
  for (let bit = 0; bit < 8; bit++) c = c & 1 ? (c >>> 1) ^ 0x82f63b78 : c >>> 1;
  return c;
});

/** CRC-32C (Castagnoli). */
export function crc32c(data: Uint8Array): number {
  let c = 0xffffffff;
  for (const byte of data) c = crcTable[(c ^ byte) & 255] ^ (c >>> 8);
  return (c ^ 0xffffffff) >>> 0;
}

function masked(data: Uint8Array): number {
  const c = crc32c(data);
  return (((c >>> 15) | (c << 17)) + 0xa282ead8) >>> 0;
}

// Protocol buffer fields: the key is the field's number and its wire type.
function varint(value: number): number[] {
  const out: number[] = [];
  let rest = value;
  for (; rest >= 128; rest = Math.floor(rest / 128)) out.push((rest % 128) | 128);
  return [...out, rest];
}
const integer = (field: number, value: number): Uint8Array => Uint8Array.from([field << 3, ...varint(value)]);
const bytes = (field: number, value: Uint8Array): Uint8Array =>
  Buffer.concat([Uint8Array.from([(field << 3) | 2, ...varint(value.byteLength)]), value]);
const text = (field: number, value: string): Uint8Array => bytes(field, new TextEncoder().encode(value));

function double(field: number, value: number): Uint8Array {
  const out = Buffer.alloc(9);
  out[0] = (field << 3) | 1;
  out.writeDoubleLE(value, 1);
  return out;
}

function float(field: number, value: number): Uint8Array {
  const out = Buffer.alloc(5);
  out[0] = (field << 3) | 5;
  out.writeFloatLE(value, 1);
  return out;
}
