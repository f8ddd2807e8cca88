// Checkpoints in GGUF, versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version and two counts, the
// metadata as key, type and value, the tensors' names, shapes, types and offsets, then their bytes, each from a multiple of the
// alignment on. Shapes are written the other way round: the first size is that of neighbours. The header is read in pieces, and no
// count of it is trusted: what it counts must fit into the rest of the file. ComfyUI-GGUF lays matrices out in rows of 256 for the sake
// of the K types, and says in the metadata what shape they had.
import { closeSync, openSync, readSync } from 'node:fs';
import { UserError } from './errors.ts';
import { assertFile } from './files.ts';
import { ggmlTypes } from './ggml_types.ts';
import {
  checkedProduct,
  type Header,
  openTensorFile,
  readFully,
  type TensorFile,
  type TensorInfo,
} from './tensor_file.ts';

const maxTensors = 100_000;
const maxHeaderBytes = 100_000_000;
const maxNameBytes = 65_536;
const maxDimensions = 4;

const readable = [...ggmlTypes.values()].flatMap(([name, type]) => (type ? [name] : []));
const convertTypes = `convert it to one of ${readable.join(', ')}`;

const again = 'the file is damaged, download it again';

/** Whether a file begins as one; false for what cannot be opened. */
export function isGguf(path: string): boolean {
  let fd: number | undefined;
  try {
    assertFile(path);
    fd = openSync(path, 'r');
    const start = Buffer.alloc(4);
    return readSync(fd, start, 0, 4, 0) === 4 && start.toString('latin1') === 'GGUF';
  } catch {
    return false;
  } finally {
    if (fd !== undefined) closeSync(fd);
  }
}

/** Opens `path` and checks its whole header. @throws UserError saying what is wrong with the file */
export const openGguf = (path: string): TensorFile => openTensorFile(path, '.gguf', readHeader);

function readHeader(path: string, fd: number, fileBytes: number): Header {
  const reader = new Reader(path, fd, fileBytes);
  checkStart(path, reader);
  const [tensorCount, pairCount] = [reader.count(), reader.count()];
  if (tensorCount > maxTensors)
    throw new UserError(
      `${path} claims ${tensorCount} tensors, more than the ${maxTensors} allowed: ${again}`,
    );
  const { metadata, shapes } = readMetadata(reader, pairCount);
  const tensors: TensorInfo[] = [];
  for (let i = 0; i < tensorCount; i++) tensors.push(readTensor(reader, shapes));
  const alignment = Number(metadata['general.alignment'] ?? 32);
  if (!Number.isSafeInteger(alignment) || alignment < 1 || (alignment & (alignment - 1)) !== 0)
    throw new UserError(`${path} is aligned to ${alignment} bytes, which is no power of two: ${again}`);
  const dataStart = Math.ceil(reader.at / alignment) * alignment;
  return { metadata, tensors: placed(path, tensors, dataStart, alignment, fileBytes) };
}

function checkStart(path: string, reader: Reader): void {
  if (reader.left < 4) throw new UserError(`${path} is too short for a GGUF file: download it again`);
  const magic = Buffer.from(reader.bytes(4)).toString('latin1');
  if (magic !== 'GGUF')
    throw new UserError(
      `${path} is not a GGUF file, as it does not begin with "GGUF": download it again, or name it by what it is`,
    );
  const version = reader.uint32();
  if (version > 0xffff)
    throw new UserError(`${path} is a GGUF file for big-endian machines: use the one for little-endian ones`);
  if (version !== 2 && version !== 3)
    throw new UserError(
      `${path} is GGUF version ${version}, and 2 and 3 are read: convert the model again with a program of today`,
    );
}

/** Values of the metadata by the number of their type: their bytes, and how they are read. Texts (8) and lists (9) tell their length. */
const scalars: Readonly<
  Record<number, readonly [bytes: number, read: (b: Buffer) => number | bigint | boolean]>
> = {
  0: [1, (b) => b.readUInt8()],
  1: [1, (b) => b.readInt8()],
  2: [2, (b) => b.readUInt16LE()],
  3: [2, (b) => b.readInt16LE()],
  4: [4, (b) => b.readUInt32LE()],
  5: [4, (b) => b.readInt32LE()],
  6: [4, (b) => b.readFloatLE()],
  7: [1, (b) => b.readUInt8() !== 0],
  10: [8, (b) => b.readBigUInt64LE()],
  11: [8, (b) => b.readBigInt64LE()],
  12: [8, (b) => b.readDoubleLE()],
};
const [INT32, TEXT, LIST] = [5, 8, 9];
const shapeKey = 'comfy.gguf.orig_shape.';

/** Texts and numbers as text, and the shapes that tensors had; of other lists, as a tokenizer's, nothing is kept. */
function readMetadata(reader: Reader, pairs: number) {
  const metadata = new Map<string, string>();
  const shapes = new Map<string, number[]>();
  const keys = new Set<string>();
  for (let i = 0; i < pairs; i++) {
    const key = reader.text('a key of the metadata');
    if (keys.has(key)) throw new UserError(`${reader.path} has the metadata "${key}" twice: ${again}`);
    keys.add(key);
    const type = reader.uint32();
    if (type !== LIST) metadata.set(key, reader.value(type, key));
    else if (key.startsWith(shapeKey)) shapes.set(key.slice(shapeKey.length), reader.sizes(key));
    else reader.skipList(key);
  }
  return { metadata: Object.fromEntries(metadata), shapes };
}

/** A tensor with its offset in the data yet. */
function readTensor(reader: Reader, shapes: ReadonlyMap<string, readonly number[]>): TensorInfo {
  const name = reader.text("a tensor's name");
  const bad = (what: string) => new UserError(`tensor "${name}" of ${reader.path} ${what}: ${again}`);
  const dimensions = reader.uint32();
  if (dimensions > maxDimensions) throw bad(`has ${dimensions} dimensions`);
  const reversed = Array.from({ length: dimensions }, () => reader.uint64());
  const number = reader.uint32();
  const offset = reader.uint64();
  const [storedAs, type] = ggmlTypes.get(number) ?? [`number ${number}`];
  const written = reversed.toReversed();
  const shape = shapes.get(name) ?? written;
  const count = checkedProduct(written);
  if (count === undefined || checkedProduct([count, 8]) === undefined)
    throw bad(`has an impossible shape [${written}]`);
  if (checkedProduct(shape) !== count)
    throw bad(`has ${count} numbers, and by the metadata a shape [${shape}] of others`);
  const info = { name, storedAs, shape, offset };
  if (!type) return { ...info, dtype: 'uint8', bytes: 0, mend: convertTypes };
  if ((reversed[0] ?? 1) % type.elements !== 0)
    throw bad(`has rows of ${reversed[0] ?? 1}, and ${storedAs} has blocks of ${type.elements}`);
  return { ...info, type, dtype: type.dtype, bytes: (count / type.elements) * type.bytes };
}

/** The tensors by place, each within the file and clear of the others. Of a type that is not read, the size is what lies before the next. */
function placed(
  path: string,
  tensors: readonly TensorInfo[],
  dataStart: number,
  alignment: number,
  fileBytes: number,
): Map<string, TensorInfo> {
  const sorted = tensors.map((info) => ({ ...info, offset: dataStart + info.offset }));
  sorted.sort((a, b) => a.offset - b.offset || a.bytes - b.bytes);
  const found = new Map<string, TensorInfo>();
  sorted.forEach((info, i) => {
    const { name, offset, mend } = info;
    const bad = (what: string, mended = again) =>
      new UserError(`tensor "${name}" of ${path} ${what}: ${mended}`);
    if (found.has(name)) throw new UserError(`${path} has the tensor "${name}" twice: ${again}`);
    if ((offset - dataStart) % alignment !== 0)
      throw bad(`does not begin at a multiple of ${alignment} bytes`);
    const next = sorted.at(i + 1)?.offset ?? fileBytes;
    const bytes = mend ? Math.max(0, Math.min(next, fileBytes) - offset) : info.bytes;
    if (offset + bytes > fileBytes)
      throw bad('lies past the end of the file', 'it is truncated, download it again');
    if (i + 1 < sorted.length && offset + bytes > next) throw bad('overlaps the tensor after it');
    found.set(name, { ...info, bytes });
  });
  return found;
}

/** Reads a header from its beginning on, through a window on the file. */
class Reader {
  readonly path: string;
  /** From the beginning of the file. */
  at = 0;
  readonly #fd: number;
  readonly #fileBytes: number;
  #window = Buffer.alloc(0);
  #windowAt = 0;

  constructor(path: string, fd: number, fileBytes: number) {
    this.path = path;
    this.#fd = fd;
    this.#fileBytes = fileBytes;
  }

  /** Bytes of the file from here on. */
  get left(): number {
    return this.#fileBytes - this.at;
  }

  /** @throws UserError where the file ends before, or the header is longer than any model's */
  #pass(bytes: number): void {
    if (bytes > this.left)
      throw new UserError(`${this.path} ends inside its header: it is truncated, download it again`);
    this.at += bytes;
    if (this.at > maxHeaderBytes)
      throw new UserError(`${this.path} has a header of more than ${maxHeaderBytes} bytes: ${again}`);
  }

  /** The next few bytes; they last until more are asked for. */
  bytes(length: number): Buffer {
    const from = this.at;
    this.#pass(length);
    if (from < this.#windowAt || this.at > this.#windowAt + this.#window.byteLength) {
      this.#window = Buffer.alloc(Math.min(Math.max(length, 2 ** 16), this.#fileBytes - from));
      this.#windowAt = from;
      readFully(this.path, this.#fd, this.#window, from);
    }
    return this.#window.subarray(from - this.#windowAt, this.at - this.#windowAt);
  }

  uint32(): number {
    return this.bytes(4).readUInt32LE();
  }

  /** As a number where that is exact; a larger one is no size of anything here. */
  uint64(): number {
    return Number(this.bytes(8).readBigUInt64LE());
  }

  /** How many things follow, each of which takes `bytes` or more. @throws UserError where the file has no room for them */
  count(bytes = 8): number {
    const count = this.uint64();
    if (count * bytes > this.left)
      throw new UserError(
        `${this.path} counts ${count} things where it has room for ${Math.floor(this.left / bytes)}: ${again}`,
      );
    return count;
  }

  text(what: string, most = maxNameBytes): string {
    const length = this.count(1);
    if (length > most) throw new UserError(`${this.path} has ${what} of ${length} bytes: ${again}`);
    return this.bytes(length).toString('utf8');
  }

  value(type: number, key: string): string {
    if (type === TEXT) return this.text(`the metadata "${key}"`, maxHeaderBytes);
    const [bytes, read] = this.#scalar(type, key);
    return String(read(this.bytes(bytes)));
  }

  #scalar(type: number, key: string) {
    if (Object.hasOwn(scalars, type)) return scalars[type];
    throw new UserError(
      `the metadata "${key}" of ${this.path} has a value of type ${type}, which is none: ${again}`,
    );
  }

  /** A list of whole numbers that are sizes. */
  sizes(key: string): number[] {
    const type = this.uint32();
    const count = this.count(4);
    const sizes =
      type === INT32 && count <= 8 ? Array.from({ length: count }, () => this.bytes(4).readInt32LE()) : [-1];
    if (sizes.some((size) => size < 0))
      throw new UserError(`the metadata "${key}" of ${this.path} is not a shape: ${again}`);
    return sizes;
  }

  skipList(key: string): void {
    const type = this.uint32();
    if (type === TEXT) {
      const count = this.count();
      for (let i = 0; i < count; i++) this.#pass(this.count(1));
    } else {
      const [bytes] = this.#scalar(type, key);
      this.#pass(this.count(bytes) * bytes);
    }
  }
}
