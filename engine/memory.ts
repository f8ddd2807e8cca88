// Device memory as the engine sees it: blocks behind a Driver, handed out from size-bucketed free lists. A freed block
// goes back to its bucket, so a loop of equal steps allocates nothing after its first turn; and the lowest address is handed out
// first, so that each turn finds its tensors where they were, and the launches that were made for them (cuda/plan_memo.ts).
// Buckets are an eighth of a power of two apart: at most 12.5 % of a block is slack. When the driver has no more, the lists are
// emptied once; when that does not help, the error says what holds how much. A captured step keeps its blocks out of the lists
// (reserve).
import { UserError } from '../io/errors.ts';

/** A block of device memory. `host` is set where the bytes are directly readable (the reference device). */
export interface Block {
  readonly bytes: number;
  readonly address: bigint;
  readonly host?: Uint8Array;
  /** What it was taken for, while it is taken. */
  owner?: string;
}

/** What a device must give the engine: memory, copies, and kernels by symbol. The seam that every backend stands behind. */
export interface Driver {
  /** Returns undefined when the memory is exhausted. */
  allocate(bytes: number): Block | undefined;
  free(block: Block): void;
  /** Hands what was freed back to the system, where the driver keeps it. */
  trim?(): void;
  /** Bytes that the device has, and that nobody holds. */
  room?(): { free: number; total: number };
  upload(block: Block, offset: number, source: Uint8Array): void;
  download(block: Block, offset: number, target: Uint8Array): void;
  /** Fills the first bytes with zeros, where that is quicker than an upload of them. */
  clear?(block: Block, bytes: number): void;
  /** Runs the kernel `symbol`; numbers are ints or floats as its signature says, bigints are addresses, 0n is null. */
  launch(symbol: string, args: readonly (bigint | number)[]): void;
  /** Runs it for each of several argument lists that are independent of each other, in one launch where it can. */
  launchAll?(symbol: string, calls: readonly (readonly (bigint | number)[])[]): void;
  /** Waits for what was queued, where calls return before they are done. */
  synchronize?(): void;
  /** Records the launches that `queue` makes, to be run again as they are. Nothing may be allocated or copied in it. */
  capture?(queue: () => void): Replay;
}

/** Recorded launches. */
export interface Replay {
  launch(): void;
  release(): void;
}

/** No memory is left: what was wanted, what holds how much, and the mend. */
export class MemoryError extends UserError {
  override readonly name = 'MemoryError';
}

const AT_WORK = 'tensors at work';
let owner = AT_WORK;

/** Runs `fn` so that the memory it takes is told under this name where there is no more. */
export function holding<R>(what: string, fn: () => R): R {
  const outer = owner;
  owner = what;
  try {
    return fn();
  } finally {
    owner = outer;
  }
}

/** How many blocks of each size something takes at once. */
export type Demand = ReadonlyMap<number, number>;

/** Blocks that are out of circulation until release(). */
export interface Reserve<R> {
  readonly result: R;
  release(): void;
}

class Lists {
  /** Each from the highest address to the lowest. */
  readonly #lists = new Map<number, Block[]>();

  pop = (size: number): Block | undefined => this.#lists.get(size)?.pop();

  push(block: Block): void {
    const list = this.#lists.get(block.bytes);
    if (!list) {
      this.#lists.set(block.bytes, [block]);
      return;
    }
    let [from, to] = [0, list.length];
    while (from < to) {
      const middle = (from + to) >> 1;
      if (list[middle].address > block.address) from = middle + 1;
      else to = middle;
    }
    list.splice(from, 0, block);
  }

  /** Takes every block out. */
  *drain(): Iterable<Block> {
    for (const list of this.#lists.values()) while (list.length) yield list.pop() as Block;
  }
}

export class MemoryPool {
  readonly #driver: Driver;
  readonly #free = new Lists();
  readonly #owned = new Map<string, number>();
  /** The lists that a reserved block goes back to. */
  readonly #reserved = new Map<Block, Lists>();
  /** The reserve that blocks are taken from now. */
  #reserve: Lists | undefined;
  #meter: { blocks: Set<Block>; now: Map<number, number>; most: Map<number, number> } | undefined;
  /** Bytes in live tensors and reserves, their maximum so far, live storages, and bytes held from the driver. */
  live = 0;
  peak = 0;
  storages = 0;
  held = 0;

  constructor(driver: Driver) {
    this.#driver = driver;
  }

  take(bytes: number): Block {
    const size = bucket(bytes);
    const block = this.#reserve ? this.#takeReserved(size) : this.#takeFree(size);
    this.storages++;
    if (this.#meter) {
      const { blocks, now, most } = this.#meter;
      blocks.add(block);
      const count = (now.get(size) ?? 0) + 1;
      now.set(size, count);
      most.set(size, Math.max(count, most.get(size) ?? 0));
    }
    return block;
  }

  give(block: Block): void {
    this.storages--;
    if (this.#meter?.blocks.delete(block))
      this.#meter.now.set(block.bytes, (this.#meter.now.get(block.bytes) as number) - 1);
    const reserve = this.#reserved.get(block);
    if (reserve) reserve.push(block);
    else this.#giveFree(block);
  }

  /** Returns every cached block to the driver. */
  trim(): void {
    for (const block of this.#free.drain()) {
      this.held -= block.bytes;
      this.#driver.free(block);
    }
    this.#driver.trim?.();
  }

  /** Whether the block was taken from a reserve. */
  isReserved = (block: Block): boolean => this.#reserved.has(block);

  /** Runs `fn` and tells how many blocks of each size it took at once. */
  metered<R>(fn: () => R): { result: R; demand: Demand } {
    const most = new Map<number, number>();
    this.#meter = { blocks: new Set(), now: new Map(), most };
    try {
      return { result: fn(), demand: most };
    } finally {
      this.#meter = undefined;
    }
  }

  /** Runs `fn` on blocks set aside for it, as many as `demand` says: it allocates nothing, and nobody else gets them. */
  reserve<R>(demand: Demand, fn: () => R): Reserve<R> {
    const lists = new Lists();
    const mine: Block[] = [];
    const release = () => {
      for (const block of mine) {
        this.#reserved.delete(block);
        this.#giveFree(block);
      }
    };
    try {
      for (const [size, count] of demand) for (let i = 0; i < count; i++) mine.push(this.#takeFree(size));
      for (const block of mine) {
        this.#reserved.set(block, lists);
        lists.push(block);
      }
      this.#reserve = lists;
      return { result: fn(), release };
    } catch (error) {
      release();
      throw error;
    } finally {
      this.#reserve = undefined;
    }
  }

  #takeReserved(size: number): Block {
    const block = this.#reserve?.pop(size);
    if (!block) throw new Error(`a captured step takes ${size} bytes that its run before did not take`);
    return block;
  }

  #takeFree(size: number): Block {
    const block = this.#free.pop(size) ?? this.#allocate(size);
    block.owner = owner;
    this.#owned.set(owner, (this.#owned.get(owner) ?? 0) + size);
    this.live += size;
    this.peak = Math.max(this.peak, this.live);
    return block;
  }

  #giveFree(block: Block): void {
    const { bytes, owner: holder = AT_WORK } = block;
    this.live -= bytes;
    this.#owned.set(holder, (this.#owned.get(holder) as number) - bytes);
    this.#free.push(block);
  }

  #allocate(size: number): Block {
    let block = this.#driver.allocate(size);
    if (!block) {
      this.trim();
      block = this.#driver.allocate(size);
    }
    if (!block) throw new MemoryError(this.#exhausted(size));
    this.held += size;
    return block;
  }

  #exhausted(size: number): string {
    const holders = [...this.#owned].filter(([, bytes]) => bytes > 0).sort((a, b) => b[1] - a[1]);
    const told = holders.map(([name, bytes]) => `${name} ${readable(bytes)}`).join(', ') || 'nothing';
    const room = this.#driver.room?.();
    const left = room ? `; ${readable(room.free)} of the device's ${readable(room.total)} are free` : '';
    return `out of memory: ${readable(size)} wanted while these hold it: ${told}${left}; use a smaller size, fewer images or a half-precision --dtype`;
  }
}

const readable = (bytes: number): string =>
  bytes >= 2 ** 30 / 10 ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;

function bucket(bytes: number): number {
  if (bytes <= 256) return 256;
  const step = 2 ** Math.max(8, Math.floor(Math.log2(bytes)) - 3);
  return Math.ceil(bytes / step) * step;
}
