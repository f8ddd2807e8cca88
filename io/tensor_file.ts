// A file of named tensors, in whichever format: its header is read at once and checked whole, a tensor's bytes when they are asked for. What
// is stored in a type that nothing computes with (8-bit floats, ggml's blocks) is decoded on its way, a piece at a time, so that no more
// lies in memory than the tensor itself.
import { closeSync, fstatSync, openSync, readSync } from 'node:fs';
import { resolve } from 'node:path';
import { bytesPerElement, type DType } from './dtype.ts';
import { UserError } from './errors.ts';
import { assertFile, asUserError, largestTransfer } from './files.ts';

/** How a format keeps elements: blocks of `elements`, each of `bytes`. */
export interface StoredType {
  /** What they are read as. */
  dtype: DType;
  elements: number;
  bytes: number;
  /** Whole blocks as elements of `dtype`; absent where they are those already. */
  decode?(blocks: Uint8Array, elements: Uint8Array): void;
}

export interface TensorInfo {
  name: string;
  /** How `read` gives the elements; uint8 for a stored type that it refuses. */
  dtype: DType;
  /** The format's own word for the type, such as 'F16'. */
  storedAs: string;
  shape: readonly number[];
  /** From the beginning of the file. */
  offset: number;
  /** In the file. */
  bytes: number;
  /** Absent where `read` refuses the type. */
  type?: StoredType;
  /** What is to be done about a type that `read` refuses. */
  mend?: string;
}

/** Memory for so many bytes. */
export type Room = (bytes: number) => Uint8Array;

/** A place in an open file. */
export interface FilePlace {
  fd: number;
  offset: number;
}

export interface TensorFile {
  path: string;
  /** In the order of the file. */
  tensors: ReadonlyMap<string, TensorInfo>;
  metadata: Record<string, string>;
  /** Another as soon as another file is there, or this one is written again; empty of what lies in memory. */
  stamp: string;
  /** The tensor's elements in `dtype`, in fresh memory or in `room`. @throws UserError for an absent tensor or unsupported type */
  read(name: string, room?: Room): Uint8Array;
  /** Where what `read` gives lies as it is; undefined where it is made of what lies there. */
  inFile?(name: string): FilePlace | undefined;
  /** As `read`, into `target`, which is exactly as long as the tensor. */
  readInto(name: string, target: Uint8Array): void;
  /** The tensor's bytes as they lie in the file, in fresh memory or in `room`. */
  stored(name: string, room?: Room): Uint8Array;
  close(): void;
}

/** The file with its tensors under other names: those of `names`, each with the name that the file has for it. */
export const renamed = (file: TensorFile, names: ReadonlyMap<string, string>): TensorFile => {
  const nameOf = (key: string) => names.get(key) ?? key;
  return {
    ...file,
    tensors: new Map([...names].map(([key, name]) => [key, file.tensors.get(name) as TensorInfo])),
    read: (key, room) => file.read(nameOf(key), room),
    inFile: (key) => file.inFile?.(nameOf(key)),
    stored: (key, room) => file.stored(nameOf(key), room),
    readInto: (key, target) => file.readInto(nameOf(key), target),
  };
};

/** What a header tells. */
export type Header = Pick<TensorFile, 'tensors' | 'metadata'>;

/** Opens `path`, a `kind` file such as .safetensors, whose header `readHeader` reads and checks. @throws UserError */
export function openTensorFile(
  path: string,
  kind: string,
  readHeader: (path: string, fd: number, fileBytes: number) => Header,
): TensorFile {
  let fd: number | undefined;
  try {
    if (assertFile(path).isDirectory())
      throw new UserError(`${path} is a folder: give the path of a ${kind} file`);
    fd = openSync(path, 'r');
    const { size, ino, mtimeNs, ctimeNs } = fstatSync(fd, { bigint: true });
    const stamp = [resolve(path), size, ino, mtimeNs, ctimeNs].join(' ');
    return tensorFile(path, fd, stamp, readHeader(path, fd, Number(size)));
  } catch (error) {
    if (fd !== undefined) closeSync(fd);
    throw asUserError(error, path);
  }
}

const freshRoom: Room = (bytes) => new Uint8Array(bytes);

function tensorFile(path: string, fd: number, stamp: string, header: Header): TensorFile {
  let open = true;
  const find = (name: string): TensorInfo & { type: StoredType } => {
    if (!open) throw new Error(`${path} is closed`);
    const info = header.tensors.get(name);
    if (!info)
      throw new UserError(`${path} has no tensor "${name}": check that it is the right kind of checkpoint`);
    const { type, storedAs, mend } = info;
    if (!type) throw new UserError(`tensor "${name}" of ${path} has type ${storedAs}: ${mend}`);
    return { ...info, type };
  };
  const readInto = (name: string, target: Uint8Array): void => {
    const info = find(name);
    if (target.byteLength !== readBytes(info))
      throw new Error(`tensor "${name}" has ${readBytes(info)} bytes, the target ${target.byteLength}`);
    if (info.type.decode) decodeInto(path, fd, info, target);
    else readFully(path, fd, target, info.offset);
  };
  return {
    path,
    stamp,
    ...header,
    readInto,
    inFile(name) {
      const { type, offset } = find(name);
      return type.decode ? undefined : { fd, offset };
    },
    read: (name, room = freshRoom) => {
      const target = room(readBytes(find(name)));
      readInto(name, target);
      return target;
    },
    stored(name, room = freshRoom) {
      const { offset, bytes } = find(name);
      const target = room(bytes);
      readFully(path, fd, target, offset);
      return target;
    },
    close: () => {
      if (open) closeSync(fd);
      open = false;
    },
  };
}

/** What `read` gives of a tensor, in bytes. */
const readBytes = ({ shape, dtype }: TensorInfo): number =>
  shape.reduce((product, size) => product * size, bytesPerElement[dtype]);

/** Elements that are decoded at a time: a multiple of every block. */
const PIECE = 2 ** 18;

function decodeInto(
  path: string,
  fd: number,
  { type, offset, bytes, dtype }: TensorInfo & { type: StoredType },
  target: Uint8Array,
): void {
  const stored = new Uint8Array(Math.min(bytes, (PIECE / type.elements) * type.bytes));
  const elements = new Uint8Array(Math.min(target.byteLength, PIECE * bytesPerElement[dtype]));
  for (let done = 0, at = 0; done < bytes; done += stored.byteLength, at += elements.byteLength) {
    const blocks = stored.subarray(0, bytes - done);
    const out = elements.subarray(0, target.byteLength - at);
    readFully(path, fd, blocks, offset + done);
    type.decode?.(blocks, out);
    target.set(out, at);
  }
}

/** Fills `target` from `position` on. @throws UserError where the file ends before */
export function readFully(path: string, fd: number, target: Uint8Array, position: number): void {
  for (let done = 0; done < target.byteLength; ) {
    const wanted = Math.min(largestTransfer, target.byteLength - done);
    const got = readSync(fd, target, done, wanted, position + done);
    if (got === 0) throw new UserError(`${path} became shorter while it was read: download it again`);
    done += got;
  }
}

/** The product, or undefined where it or a product on the way leaves the exact integers. */
export function checkedProduct(factors: readonly number[]): number | undefined {
  let product = 1;
  for (const factor of factors) {
    product *= factor;
    if (!Number.isSafeInteger(product)) return undefined;
  }
  return product;
}
