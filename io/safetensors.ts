// Checkpoints in safetensors: 8 bytes of little-endian header length, a JSON header, then the tensors' raw
// bytes end to end (https://huggingface.co/docs/safetensors). Only the header is held in memory; a tensor is
// read when asked for, so a file larger than memory is fine. The header comes from strangers, so all of it is
// checked before any of it is used.
import { bytesPerElement, type DType } from './dtype.ts';
import { UserError } from './errors.ts';
import { replaceInTurns, writeFully } from './files.ts';
import { isRecord } from './json.ts';
import { float8E4M3, float8E5M2, float64, plain } from './stored_types.ts';
import {
  checkedProduct,
  type Header,
  openTensorFile,
  readFully,
  type StoredType,
  type TensorFile,
  type TensorInfo,
} from './tensor_file.ts';
import { atOnce } from './turns.ts';

export interface TensorEntry {
  name: string;
  dtype: DType;
  shape: readonly number[];
  /** Raw little-endian bytes, or how to make them when their turn to be written comes: they are good until the next tensor's are made. */
  bytes: Uint8Array | (() => Uint8Array);
}

/** An entry's bytes, made where they are yet to be. */
export const bytesOf = ({ bytes }: Pick<TensorEntry, 'bytes'>): Uint8Array =>
  typeof bytes === 'function' ? bytes() : bytes;

const maxHeaderBytes = 100_000_000;
const maxTensors = 100_000;

const readable: Record<string, StoredType> = {
  F32: plain('float32'),
  F16: plain('float16'),
  BF16: plain('bfloat16'),
  F8_E4M3: float8E4M3,
  F8_E5M2: float8E5M2,
  F64: float64,
  I32: plain('int32'),
  I64: plain('int64'),
  U8: plain('uint8'),
  BOOL: plain('uint8'),
};

/** What is to be done about other types. */
const convertTypes = `convert it to one of ${Object.keys(readable).join(', ')}`;

const bitsPerElement: Record<string, number> = {
  ...Object.fromEntries(['F64', 'I64', 'U64', 'C64'].map((word) => [word, 64])),
  ...Object.fromEntries(['F32', 'I32', 'U32'].map((word) => [word, 32])),
  ...Object.fromEntries(['F16', 'BF16', 'I16', 'U16'].map((word) => [word, 16])),
  ...Object.fromEntries(['U8', 'I8', 'BOOL', 'F8_E4M3', 'F8_E5M2', 'F8_E8M0'].map((word) => [word, 8])),
  ...Object.fromEntries(['F6_E2M3', 'F6_E3M2'].map((word) => [word, 6])),
  F4: 4,
};

/** Opens `path` and checks its whole header. @throws UserError saying what is wrong with the file */
export const openSafetensors = (path: string): TensorFile => openTensorFile(path, '.safetensors', readHeader);

function readHeader(path: string, fd: number, fileBytes: number): Header {
  if (fileBytes < 8) throw new UserError(`${path} is too short for a safetensors file: download it again`);
  const start = new Uint8Array(Math.min(32, fileBytes));
  readFully(path, fd, start, 0);
  refuseOtherFormats(path, start);
  const length = new DataView(start.buffer).getBigUint64(0, true);
  if (length > maxHeaderBytes) {
    throw new UserError(
      `${path} claims a header of ${length} bytes, so it is damaged or not safetensors: download it again`,
    );
  }
  const dataStart = 8 + Number(length);
  if (dataStart > fileBytes) {
    throw new UserError(`${path} ends inside its header: it is truncated, download it again`);
  }
  const header = new Uint8Array(Number(length));
  readFully(path, fd, header, 8);
  const { tensors, metadata } = parseHeader(path, header, dataStart);
  checkLayout(path, tensors, dataStart, fileBytes);
  return { metadata, tensors: new Map(tensors.map((info) => [info.name, info])) };
}

function refuseOtherFormats(path: string, start: Uint8Array): void {
  // By chance a header's length may look like another format's magic; the '{' after it settles the matter.
  const isSafetensors = start[8] === 0x7b;
  const isZip = start[0] === 0x50 && start[1] === 0x4b && start[2] === 3 && start[3] === 4;
  const isPickle = start[0] === 0x80 && start[1] >= 2 && start[1] <= 5;
  if (!isSafetensors && (isZip || isPickle)) {
    throw new UserError(
      `${path} is a PyTorch pickle, which can run any program when opened: use a .safetensors version of it`,
    );
  }
  const text = new TextDecoder('latin1').decode(start);
  if (!isSafetensors && text.startsWith('GGUF')) {
    throw new UserError(
      `${path} is a GGUF file, which this is not read from: use a .safetensors version of it`,
    );
  }
  if (text.startsWith('version https://git-lfs')) {
    throw new UserError(`${path} is a Git LFS pointer and not the file itself: run "git lfs pull"`);
  }
}

function parseHeader(path: string, bytes: Uint8Array, dataStart: number) {
  let parsed: unknown;
  let duplicate: string | undefined;
  try {
    const text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
    parsed = JSON.parse(text);
    duplicate = duplicateKey(text);
  } catch {
    throw new UserError(`the header of ${path} is not valid JSON: the file is damaged, download it again`);
  }
  if (duplicate !== undefined) {
    throw new UserError(
      `the header of ${path} names "${duplicate}" twice: save the file again, or download another`,
    );
  }
  if (!isRecord(parsed)) {
    throw new UserError(`the header of ${path} is not a JSON object: the file is damaged, download it again`);
  }
  const { __metadata__, ...entries } = parsed;
  const metadata = __metadata__ ?? {}; // some writers leave a null
  if (!isRecord(metadata) || Object.values(metadata).some((value) => typeof value !== 'string')) {
    throw new UserError(
      `"__metadata__" of ${path} is not a map of strings: save the file again with strings there`,
    );
  }
  const named = Object.entries(entries);
  if (named.length > maxTensors) {
    throw new UserError(
      `${path} has ${named.length} tensors, more than the ${maxTensors} allowed: split the file`,
    );
  }
  const tensors = named.map(([name, entry]) => parseTensor(path, name, entry, dataStart));
  return { tensors, metadata: metadata as Record<string, string> };
}

const isSizeList = (value: unknown): value is number[] =>
  Array.isArray(value) && value.every((size) => Number.isSafeInteger(size) && size >= 0);

function parseTensor(path: string, name: string, entry: unknown, dataStart: number): TensorInfo {
  const bad = (what: string) =>
    new UserError(`tensor "${name}" of ${path} ${what}: the file is damaged, download it again`);
  if (!isRecord(entry)) throw bad('is not described by a JSON object');
  const { dtype: storedAs, shape, data_offsets: offsets } = entry;
  if (typeof storedAs !== 'string') throw bad('has no "dtype"');
  if (!isSizeList(shape)) throw bad('has a "shape" that is not a list of whole numbers');
  if (!isSizeList(offsets) || offsets.length !== 2)
    throw bad('has "data_offsets" that are not two whole numbers');
  const [begin, end] = offsets;
  if (begin > end || !Number.isSafeInteger(dataStart + end))
    throw bad(`has impossible offsets ${begin} to ${end}`);
  if (Object.hasOwn(bitsPerElement, storedAs)) {
    // As the reference reader, refuses an overflow even where a later size is zero.
    const bits = checkedProduct([bitsPerElement[storedAs], ...shape]);
    if (bits === undefined) throw bad(`has an impossible shape [${shape}]`);
    if (bits !== (end - begin) * 8) {
      throw bad(`has ${end - begin} bytes, but its shape [${shape}] of ${storedAs} needs ${bits / 8}`);
    }
  }
  const place = { name, storedAs, shape, offset: dataStart + begin, bytes: end - begin };
  if (!Object.hasOwn(readable, storedAs)) return { ...place, dtype: 'uint8', mend: convertTypes };
  const type = readable[storedAs];
  return { ...place, dtype: type.dtype, type };
}

/**
 * Sorts `tensors` by place and checks that they fill the file from `dataStart` to `fileBytes` without hole or
 * overlap.
 */
function checkLayout(path: string, tensors: TensorInfo[], dataStart: number, fileBytes: number): void {
  tensors.sort((a, b) => a.offset - b.offset || a.bytes - b.bytes);
  let end = dataStart;
  for (const { name, offset, bytes } of tensors) {
    if (offset !== end) {
      const outside = tensors.find((each) => each.offset + each.bytes > fileBytes);
      if (outside)
        throw new UserError(
          `tensor "${outside.name}" of ${path} has offsets outside the file: the file is malformed, download it again`,
        );
      const what = offset < end ? 'overlaps the tensor before it' : 'leaves a hole before it';
      throw new UserError(
        `tensor "${name}" of ${path} ${what}: the file is malformed, save it again or download another`,
      );
    }
    end += bytes;
    if (end > fileBytes) {
      throw new UserError(`${path} ends inside tensor "${name}": it is truncated, download it again`);
    }
  }
  if (end !== fileBytes) {
    throw new UserError(
      `${path} has ${fileBytes - end} bytes after its last tensor: the file is malformed, download it again`,
    );
  }
}

/** The first key that one object of the valid JSON `text` holds twice; JSON.parse silently keeps the last. */
function duplicateKey(text: string): string | undefined {
  const objects: Set<string>[] = [];
  for (let i = 0; i < text.length; i++) {
    const character = text[i];
    if (character === '{') objects.push(new Set());
    else if (character === '}') objects.pop();
    else if (character === '"') {
      const begin = i;
      for (i++; text[i] !== '"'; i++) if (text[i] === '\\') i++;
      let next = i + 1;
      while (' \t\r\n'.includes(text[next])) next++;
      if (text[next] !== ':') continue;
      const key = JSON.parse(text.slice(begin, i + 1)) as string;
      const keys = objects[objects.length - 1];
      if (keys.has(key)) return key;
      keys.add(key);
    }
  }
  return undefined;
}

// The reference writer's order, widest type first and then by name, keeps every tensor aligned to its
// element.
const writeOrder: readonly DType[] = ['int64', 'float32', 'int32', 'bfloat16', 'float16', 'uint8'];
const storedNames: Record<DType, string> = {
  float32: 'F32',
  float16: 'F16',
  bfloat16: 'BF16',
  int32: 'I32',
  int64: 'I64',
  uint8: 'U8',
};

/**
 * Writes a safetensors file, all or nothing. The header follows from types and shapes alone, so tensors given
 * as functions are made one at a time.
 * @throws UserError when the file cannot be written
 */
export const writeSafetensors = (
  path: string,
  entries: Iterable<TensorEntry>,
  metadata?: Readonly<Record<string, string>>,
): void => atOnce(writeSafetensorsInTurns(path, entries, metadata));

/** `writeSafetensors`, a tensor at a time. */
export function* writeSafetensorsInTurns(
  path: string,
  entries: Iterable<TensorEntry>,
  metadata: Readonly<Record<string, string>> = {},
): Generator<void, void> {
  const order = (entry: TensorEntry) => writeOrder.indexOf(entry.dtype);
  const sorted = [...entries].sort((a, b) => order(a) - order(b) || (a.name < b.name ? -1 : 1));
  const names = new Set(sorted.map((entry) => entry.name));
  if (names.size !== sorted.length || names.has('__metadata__'))
    throw new Error(`bad tensor names for ${path}`);
  const header = encodeHeader(sorted, metadata);
  yield* replaceInTurns(path, function* (_temporary, fd) {
    writeFully(fd, header);
    for (const entry of sorted) {
      const bytes = bytesOf(entry);
      if (bytes.byteLength !== byteLength(entry)) {
        throw new Error(
          `tensor "${entry.name}" has ${bytes.byteLength} bytes, its shape needs ${byteLength(entry)}`,
        );
      }
      writeFully(fd, bytes);
      yield;
    }
  });
}

const byteLength = ({ dtype, shape }: TensorEntry): number =>
  shape.reduce((product, size) => product * size, bytesPerElement[dtype]);

/** Length and JSON, padded with spaces so that the data begins at a multiple of 8 bytes. */
function encodeHeader(
  entries: readonly TensorEntry[],
  metadata: Readonly<Record<string, string>>,
): Uint8Array {
  const fields: string[] = [];
  if (Object.keys(metadata).length > 0) fields.push(`"__metadata__":${JSON.stringify(metadata)}`);
  let offset = 0;
  for (const entry of entries) {
    const end = offset + byteLength(entry);
    const description = { dtype: storedNames[entry.dtype], shape: entry.shape, data_offsets: [offset, end] };
    fields.push(`${JSON.stringify(entry.name)}:${JSON.stringify(description)}`);
    offset = end;
  }
  const json = new TextEncoder().encode(`{${fields.join(',')}}`);
  const padded = Math.ceil(json.byteLength / 8) * 8;
  const header = new Uint8Array(8 + padded).fill(0x20, 8);
  new DataView(header.buffer).setBigUint64(0, BigInt(padded), true);
  header.set(json, 8);
  return header;
}
