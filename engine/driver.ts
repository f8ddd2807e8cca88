// The seam that every backend stands behind: what a device must give the engine. The CPU's native library, NVIDIA GPUs and the
// reference device's JavaScript buffers each have a driver.

/** A block of device memory. `host` is set where the bytes are directly readable (the reference device). */
export interface Block {
  readonly bytes: number;
  readonly address: bigint;
  readonly host?: Uint8Array;
  /** What it was taken for, while it is taken. */
  owner?: string;
}

/** Memory, copies, and kernels by symbol. */
export interface Driver {
  /** The device's name, where there are others of its kind that it could be taken for. */
  readonly label?: string;
  /** Returns undefined when the memory is exhausted. */
  allocate(bytes: number): Block | undefined;
  free(block: Block): void;
  /** Hands what was freed back to the system, where the driver keeps it. */
  trim?(): void;
  /** Bytes of the device's memory. */
  room?(): { free: number; total: number };
  upload(block: Block, offset: number, source: Uint8Array): void;
  /** Fills the first bytes of a block from an open file, from `position` on; false where they could not be read. */
  read?(block: Block, bytes: number, fd: number, position: number): boolean;
  download(block: Block, offset: number, target: Uint8Array): void;
  /** Its queue as others of its kind see it, where tensors can go from one to another. */
  readonly exchange?: Exchange;
  /** Fills the first bytes with zeros. */
  clear(block: Block, bytes: number): void;
  /** Runs the kernel `symbol`; numbers are ints, floats or doubles as its signature says, bigints are addresses, 0n is null. */
  launch(symbol: string, args: readonly (bigint | number)[]): void;
  /** Runs it for each of several argument lists that are independent of each other, in one launch where it can. */
  launchAll?(symbol: string, calls: readonly (readonly (bigint | number)[])[]): void;
  /** Waits for what was queued, where calls return before they are done. */
  synchronize?(): void;
  /**
   * Marks the end of what is queued now, where calls return before they are done, and gives what waits for it. That may wait for more
   * once a later mark is made.
   */
  mark?(): () => void;
  /** Records the launches that `queue` makes, to be run again as they are. Nothing may be allocated or copied in it. */
  capture?(queue: () => void): Replay;
}

/** The end of what a queue had at some time. */
export type Mark = bigint;

/** A device's queue, for copies from the memory of others (exchange.ts). */
export interface Exchange {
  /** Marks the end of what is queued now; what waits for a mark has to be told before the next one is made. */
  mark(): Mark;
  /** Has what is queued from now on wait for a mark of any device. */
  after(mark: Mark): void;
  /** Queues a copy of the first bytes of another device's block into one of this device's. */
  copy(to: Block, from: Block, source: Exchange, bytes: number): void;
  /** Waits for all that is queued. */
  finish(): void;
}

/** Recorded launches. */
export interface Replay {
  /** @throws MemoryError, with nothing launched, where the device has no memory for it */
  launch(): void;
  release(): void;
}
