// A tensor: a contiguous, row-major, channels-last view of reference-counted device storage, with the tape node that
// made it. Views (reshape) share storage and node, because gradients are kept by element order, not by shape.
// Models never free: scopes do (scope.ts).
import { bytesPerElement, type DType, decodeFloats, encodeNumbers } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import type { Device } from './device.ts';
import type { Block } from './driver.ts';
import type { Node } from './grad.ts';
import { track } from './scope.ts';

/** An error that a module adds its path to on the way out. */
export class LocatedError extends UserError {}

/** A shape or type that an op cannot take; the message names the op, both shapes and the numbers that disagree. */
export class ShapeError extends LocatedError {
  override readonly name = 'ShapeError';
}

interface Storage {
  readonly device: Device;
  readonly block: Block;
  references: number;
}

export const sizeOf = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);

export class Tensor {
  readonly shape: readonly number[];
  readonly dtype: DType;
  readonly size: number;
  /** The op that made it, or the leaf that collects its gradient; undefined when nothing upstream wants one. */
  node: Node | undefined;
  #storage: Storage;
  #released = false;

  constructor(storage: Storage, shape: readonly number[], dtype: DType, node?: Node) {
    this.#storage = storage;
    this.shape = shape;
    this.dtype = dtype;
    this.size = sizeOf(shape);
    this.node = node;
    storage.references++;
    track(this);
  }

  get device(): Device {
    return this.#storage.device;
  }

  get block(): Block {
    if (this.#released)
      throw new Error(`a tensor of shape [${this.shape}] was used after its scope freed it`);
    return this.#storage.block;
  }

  get byteLength(): number {
    return this.size * bytesPerElement[this.dtype];
  }

  /** Whether another handle is on the same storage. */
  get isShared(): boolean {
    return this.#storage.references > 1;
  }

  get requiresGrad(): boolean {
    return this.node !== undefined;
  }

  /** The same elements under another shape; one entry may be -1. Shares storage and gradient. */
  reshape(...shape: number[]): Tensor {
    const known = sizeOf(shape.filter((d) => d !== -1));
    const full = shape.map((d) => (d === -1 ? this.size / known : d));
    if (sizeOf(full) !== this.size || full.some((d) => !Number.isInteger(d))) {
      throw new ShapeError(
        `reshape: [${this.shape}] has ${this.size} elements, [${shape}] takes another number`,
      );
    }
    return this.handle(full, this.node);
  }

  /** Another handle on the same storage, freed on its own. */
  handle(shape: readonly number[] = this.shape, node: Node | undefined = undefined): Tensor {
    void this.block;
    return new Tensor(this.#storage, shape, this.dtype, node);
  }

  /** Downloads the elements as float32 numbers. A synchronisation point on asynchronous devices. */
  floats(): Float32Array {
    const bytes = this.bytes();
    return this.dtype === 'float32' ? new Float32Array(bytes.buffer) : decodeFloats(bytes, this.dtype);
  }

  /** Downloads the raw little-endian bytes. */
  bytes(): Uint8Array {
    // Every byte is written: clearing a picture's would take as long as bringing them.
    const out = new Uint8Array(Buffer.allocUnsafeSlow(this.byteLength).buffer);
    this.device.driver.download(this.block, 0, out);
    return out;
  }

  /** Uploads numbers, rounded to its type. */
  set(values: ArrayLike<number>): this {
    checkCount(values.length, this.shape);
    return this.upload(encodeNumbers(values, this.dtype));
  }

  /** Uploads raw little-endian bytes, from byte `offset` on. */
  upload(bytes: Uint8Array, offset = 0): this {
    if (offset + bytes.byteLength > this.byteLength)
      throw new ShapeError(
        `tensor: ${bytes.byteLength} bytes from ${offset} on do not fit ${this.dtype} [${this.shape}]`,
      );
    this.device.driver.upload(this.block, offset, bytes);
    return this;
  }

  /** Fills it with raw bytes of an open file, without a copy on the way; false where its device cannot, or the file could not be read. */
  uploadFile(fd: number, position: number): boolean {
    return this.device.driver.read?.(this.block, this.byteLength, fd, position) ?? false;
  }

  /** Sets all elements to zero. */
  clear(): this {
    this.device.driver.clear(this.block, this.byteLength);
    return this;
  }

  /** Gives the storage back once no handle holds it. Called by scopes; calling twice is harmless. */
  release(): void {
    if (this.#released) return;
    this.#released = true;
    if (--this.#storage.references === 0) this.device.memory.give(this.#storage.block);
  }
}

/** The elements of the largest tensor: kernels count them in 32 bits. */
export const MOST_ELEMENTS = 2 ** 31 - 1;

/** A tensor whose elements are whatever the memory held. */
export function empty(shape: readonly number[], options: { device: Device; dtype?: DType }): Tensor {
  const dtype = options.dtype ?? 'float32';
  const size = sizeOf(shape);
  if (!shape.every((d) => Number.isInteger(d) && d >= 0))
    throw new ShapeError(`a tensor cannot have the shape [${shape}]`);
  if (size > MOST_ELEMENTS)
    throw new ShapeError(
      `a tensor of shape [${shape}] has more than 2^31 - 1 elements; use a smaller size or fewer images at a time`,
    );
  const block = options.device.memory.take(size * bytesPerElement[dtype]);
  return new Tensor({ device: options.device, block, references: 0 }, shape, dtype);
}

/** A tensor of the given numbers, rounded to `dtype` (float32 unless named). */
export function tensor(
  values: ArrayLike<number>,
  shape: readonly number[],
  options: { device: Device; dtype?: DType },
): Tensor {
  checkCount(values.length, shape);
  return empty(shape, options).set(values);
}

function checkCount(count: number, shape: readonly number[]): void {
  if (count !== sizeOf(shape)) throw new ShapeError(`tensor: ${count} values do not fill [${shape}]`);
}

export const zeros = (shape: readonly number[], options: { device: Device; dtype?: DType }): Tensor =>
  empty(shape, options).clear();
