// Writing GGUF, version 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): what gguf.ts reads. The header follows from names,
// types and shapes alone, so that tensors are made one at a time; shapes stand the other way round, and each tensor begins at a multiple
// of 32 bytes.
import { replaceInTurns, writeFully } from './files.ts';
import { ggmlTypes } from './ggml_types.ts';
import type { StoredType } from './tensor_file.ts';

export interface GgufEntry {
  name: string;
  /** ggml's name, such as Q8_0. */
  type: string;
  /** As torch has it. */
  shape: readonly number[];
  /** Blocks of the type, made when their turn to be written comes. */
  bytes(): Uint8Array;
}

/** A text, a number (uint32) or a shape (a list of int32). */
export type GgufValue = string | number | readonly number[];

const alignment = 32;
const [UINT32, INT32, TEXT, LIST] = [4, 5, 8, 9];

const types = new Map([...ggmlTypes].map(([number, [name, type]]) => [name, { number, type }]));

function storedType(name: string): { number: number; type: StoredType } {
  const found = types.get(name);
  if (!found?.type) throw new Error(`${name} is no type of ggml's that is written`);
  return { number: found.number, type: found.type };
}

/** Writes a GGUF file, a tensor at a time, all or nothing. @throws UserError when the file cannot be written */
export function* writeGgufInTurns(
  path: string,
  entries: readonly GgufEntry[],
  metadata: ReadonlyMap<string, GgufValue>,
): Generator<void, void> {
  const header = encodeHeader(entries, metadata);
  yield* replaceInTurns(path, function* (_temporary, fd) {
    writeFully(fd, header);
    for (const entry of entries) {
      const bytes = entry.bytes();
      const wanted = byteLength(entry);
      if (bytes.byteLength !== wanted)
        throw new Error(`tensor "${entry.name}" has ${bytes.byteLength} bytes, its shape needs ${wanted}`);
      writeFully(fd, bytes);
      writeFully(fd, new Uint8Array(aligned(wanted) - wanted));
      yield;
    }
  });
}

const aligned = (bytes: number): number => Math.ceil(bytes / alignment) * alignment;

function byteLength({ name, type: of, shape }: GgufEntry): number {
  const { type } = storedType(of);
  if ((shape.at(-1) ?? 1) % type.elements !== 0)
    throw new Error(`rows of "${name}" are ${shape.at(-1)} long, which are no whole blocks of ${of}`);
  return (shape.reduce((product, length) => product * length, 1) / type.elements) * type.bytes;
}

function encodeHeader(entries: readonly GgufEntry[], metadata: ReadonlyMap<string, GgufValue>): Uint8Array {
  const parts = [Buffer.from('GGUF'), uint32(3), uint64(entries.length), uint64(metadata.size)];
  for (const [key, value] of metadata) parts.push(text(key), encodeValue(value));
  let offset = 0;
  for (const entry of entries) {
    const sizes = entry.shape.toReversed();
    parts.push(text(entry.name), uint32(sizes.length), ...sizes.map(uint64));
    parts.push(uint32(storedType(entry.type).number), uint64(offset));
    offset += aligned(byteLength(entry));
  }
  const length = parts.reduce((sum, part) => sum + part.byteLength, 0);
  return Buffer.concat(parts, aligned(length));
}

function encodeValue(value: GgufValue): Buffer {
  if (typeof value === 'string') return Buffer.concat([uint32(TEXT), text(value)]);
  if (typeof value === 'number') return Buffer.concat([uint32(UINT32), uint32(value)]);
  const items = Buffer.alloc(4 * value.length);
  value.forEach((item, i) => void items.writeInt32LE(item, 4 * i));
  return Buffer.concat([uint32(LIST), uint32(INT32), uint64(value.length), items]);
}

function uint32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

function uint64(value: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return bytes;
}

const text = (value: string): Buffer => {
  const bytes = Buffer.from(value);
  return Buffer.concat([uint64(bytes.byteLength), bytes]);
};
