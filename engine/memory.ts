// Device memory as the engine sees it: blocks behind a Driver, handed out from size-bucketed free lists. A freed block
// goes back to its bucket, so a loop of equal steps allocates nothing after its first turn. Buckets are an eighth of a
// power of two apart: at most 12.5 % of a block is slack. When the driver has no more, the lists are emptied once.
import { UserError } from '../io/errors.ts';

/** A block of device memory. `host` is set where the bytes are directly readable (the reference device). */
export interface Block {
  readonly bytes: number;
  readonly address: bigint;
  readonly host?: Uint8Array;
}

/** What a device must give the engine: memory, copies, and kernels by symbol. The seam that every backend stands behind. */
export interface Driver {
  /** Returns undefined when the memory is exhausted. */
  allocate(bytes: number): Block | undefined;
  free(block: Block): void;
  upload(block: Block, offset: number, source: Uint8Array): void;
  download(block: Block, offset: number, target: Uint8Array): void;
  /** Runs the kernel `symbol`; numbers are ints or floats as its signature says, bigints are addresses, 0n is null. */
  launch(symbol: string, args: readonly (bigint | number)[]): void;
  /** Runs a kernel over several lists of arguments that are independent of each other, in fewer launches than lists. */
  launchAll?(symbol: string, calls: readonly (readonly (bigint | number)[])[]): void;
}

export class MemoryPool {
  #free = new Map<number, Block[]>();
  readonly #driver: Driver;
  /** Bytes in live tensors, their maximum so far, live storages, and bytes held from the driver (live or cached). */
  live = 0;
  peak = 0;
  storages = 0;
  held = 0;

  constructor(driver: Driver) {
    this.#driver = driver;
  }

  take(bytes: number): Block {
    const size = bucket(bytes);
    const block = this.#free.get(size)?.pop() ?? this.#allocate(size);
    this.live += size;
    this.storages++;
    this.peak = Math.max(this.peak, this.live);
    return block;
  }

  give(block: Block): void {
    this.live -= block.bytes;
    this.storages--;
    const list = this.#free.get(block.bytes);
    if (list) list.push(block);
    else this.#free.set(block.bytes, [block]);
  }

  /** Returns every cached block to the driver. */
  trim(): void {
    for (const list of this.#free.values()) {
      for (const block of list) {
        this.held -= block.bytes;
        this.#driver.free(block);
      }
    }
    this.#free.clear();
  }

  #allocate(size: number): Block {
    let block = this.#driver.allocate(size);
    if (!block) {
      this.trim();
      block = this.#driver.allocate(size);
    }
    if (!block) {
      const gib = (n: number) => `${(n / 2 ** 30).toFixed(2)} GiB`;
      throw new UserError(
        `out of memory: ${gib(size)} wanted while tensors hold ${gib(this.live)}; use a smaller size, fewer images or a half-precision --dtype`,
      );
    }
    this.held += size;
    return block;
  }
}

function bucket(bytes: number): number {
  if (bytes <= 256) return 256;
  const step = 2 ** Math.max(8, Math.floor(Math.log2(bytes)) - 3);
  return Math.ceil(bytes / step) * step;
}
