// Device memory as the engine sees it: blocks behind a Driver, handed out from size-bucketed free lists. A freed block
// goes back to its bucket, so a loop of equal steps allocates nothing after its first turn; and the lowest address is handed out
// first, so that each turn finds its tensors where they were, and the launches that were made for them (cuda/plan_memo.ts).
// Buckets are an eighth of a power of two apart, and 256 bytes at least: at most 12.5 % of 2 KiB or more is slack. When the
// driver has no more, the lists are emptied once; then recorded steps, which keep blocks out of the lists (Reserve), lose them;
// when that does not help, the error says what holds how much.
import { gibOrMib } from '../io/byte_sizes.ts';
import { UserError } from '../io/errors.ts';
import type { Block, Driver } from './driver.ts';

/** What a pool needs of a driver. */
type DriverMemory = Pick<Driver, 'label' | 'allocate' | 'free' | 'trim' | 'room'>;

/** What takes less of it, as errors end that say it is out. */
export const memoryMend = 'use a smaller size, fewer images or a half-precision --dtype';

/** No memory is left: what was wanted, what holds how much, and the mend. */
export class MemoryError extends UserError {
  override readonly name = 'MemoryError';

  constructor(problem: string) {
    super(problem, memoryMend);
  }
}

const AT_WORK = 'tensors at work';
let owner = AT_WORK;

/** Runs `fn`; should memory run out, the error lists what it has taken under this name. */
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

/**
 * Blocks set aside for recorded steps, which may share them where only one runs at a time. Between runs they are idle, but for
 * the tensors that a recording keeps.
 */
export interface Reserve {
  /** Runs `fn`, which takes at most `demand`, on blocks of the reserve. `drop` discards what it made when others need them. */
  record<R>(demand: Demand, drop: () => void, fn: () => R): R;
  /** Runs `fn`, which reads what a recording made: meanwhile its blocks go to nobody else. */
  use<R>(fn: () => R): R;
  /** Runs `fn`, which is given idle blocks of the reserve before others. */
  borrow<R>(fn: () => R): R;
  release(): void;
}

/** A reserve as its pool sees it. */
interface Reserved {
  readonly lists: Lists;
  /** What forgets the recordings on it. */
  readonly drops: (() => void)[];
  inUse: boolean;
}

class Lists {
  /** Each from the highest address to the lowest. */
  readonly #lists = new Map<number, Block[]>();

  pop = (size: number): Block | undefined => this.#lists.get(size)?.pop();
  count = (size: number): number => this.#lists.get(size)?.length ?? 0;

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
  readonly #driver: DriverMemory;
  readonly #free = new Lists();
  readonly #owned = new Map<string, number>();
  /** Given back while a launch that is held back needs them. */
  readonly #awaited: Block[] = [];
  /** The lists that a reserved block goes back to. */
  readonly #reserved = new Map<Block, Lists>();
  readonly #reserves = new Set<Reserved>();
  /** The lists of a reserve that blocks are taken from now, alone or first. */
  #only: Lists | undefined;
  #first: Lists | undefined;
  #meter: { blocks: Set<Block>; now: Map<number, number>; most: Map<number, number> } | undefined;
  /** Bytes in live tensors, their maximum so far, live storages, and bytes held from the driver. */
  live = 0;
  peak = 0;
  storages = 0;
  held = 0;

  constructor(driver: DriverMemory) {
    this.#driver = driver;
  }

  take(bytes: number): Block {
    const size = bucket(bytes);
    const block = this.#only
      ? takeReserved(this.#only, size)
      : (this.#first?.pop(size) ?? this.#takeFree(size));
    this.storages++;
    block.owner = owner;
    this.#owned.set(owner, (this.#owned.get(owner) ?? 0) + size);
    this.live += size;
    this.peak = Math.max(this.peak, this.live);
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
    if (this.awaits(block.address)) {
      this.#awaited.push(block);
      return;
    }
    const { bytes, owner: holder = AT_WORK } = block;
    this.storages--;
    this.live -= bytes;
    this.#owned.set(holder, (this.#owned.get(holder) as number) - bytes);
    if (this.#meter?.blocks.delete(block))
      this.#meter.now.set(bytes, (this.#meter.now.get(bytes) as number) - 1);
    (this.#reserved.get(block) ?? this.#free).push(block);
  }

  /** Whether a launch that is held back still needs what lies at an address. The device says. */
  awaits: (address: bigint) => boolean = () => false;

  /** Takes back what was given while a launch that was held back needed it, and none does any more. */
  settle(): void {
    for (const block of this.#awaited.splice(0)) this.give(block);
  }

  /** Returns every cached block to the driver. */
  trim(): void {
    for (const block of this.#free.drain()) {
      this.held -= block.bytes;
      this.#driver.free(block);
    }
    this.#driver.trim?.();
  }

  /**
   * Gives memory back to the driver where it has none left, at each turn more: what is cached, then what recordings hold. Not while
   * one is made, as the device cannot be waited for then.
   */
  *makeRoom(): Generator<void> {
    if (this.#only) return;
    this.trim();
    yield;
    if (!this.#reclaim()) return;
    this.trim();
    yield;
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

  /** A reserve without blocks. */
  openReserve(): Reserve {
    const mine: Reserved = { lists: new Lists(), drops: [], inUse: false };
    this.#reserves.add(mine);
    const use = <R>(fn: () => R): R => {
      const outer = mine.inUse;
      mine.inUse = true;
      try {
        return fn();
      } finally {
        mine.inUse = outer;
      }
    };
    return {
      use,
      record: (demand, drop, fn) =>
        use(() => {
          this.#fill(mine.lists, demand);
          mine.drops.push(drop);
          this.#only = mine.lists;
          try {
            return fn();
          } finally {
            this.#only = undefined;
          }
        }),
      borrow: (fn) => {
        const outer = this.#first;
        this.#first = mine.lists;
        try {
          return fn();
        } finally {
          this.#first = outer;
        }
      },
      release: () => {
        this.#empty(mine);
        this.#reserves.delete(mine);
      },
    };
  }

  /** Takes out of circulation what the lists lack. */
  #fill(lists: Lists, demand: Demand): void {
    const taken: Block[] = [];
    try {
      for (const [size, count] of demand)
        for (let i = lists.count(size); i < count; i++) taken.push(this.#takeFree(size));
    } catch (error) {
      for (const block of taken) this.#free.push(block);
      throw error;
    }
    for (const block of taken) {
      this.#reserved.set(block, lists);
      lists.push(block);
    }
  }

  /** Puts a reserve's blocks back; those in use come when they are given. Tells whether there were any. */
  #empty({ lists, drops }: Reserved): boolean {
    for (const drop of drops.splice(0)) drop();
    let any = false;
    for (const [block, own] of this.#reserved) {
      if (own !== lists) continue;
      this.#reserved.delete(block);
      any = true;
    }
    for (const block of lists.drain()) this.#free.push(block);
    return any;
  }

  /** Takes their blocks from the reserves that nobody reads now, if they have any. */
  #reclaim(): boolean {
    const idle = [...this.#reserves].filter(({ inUse }) => !inUse);
    return idle.filter((reserve) => this.#empty(reserve)).length > 0;
  }

  #takeFree(size: number): Block {
    const block = this.#free.pop(size);
    if (block) return block;
    const room = this.makeRoom();
    let made = this.#driver.allocate(size);
    while (!made && !room.next().done) made = this.#driver.allocate(size);
    if (!made) throw new MemoryError(this.#exhausted(size));
    this.held += size;
    return made;
  }

  #exhausted(size: number): string {
    const holders = [...this.#owned].filter(([, bytes]) => bytes > 0).sort((a, b) => b[1] - a[1]);
    const told = holders.map(([name, bytes]) => `${name} ${readable(bytes)}`).join(', ') || 'nothing';
    const room = this.#driver.room?.();
    const left = room ? `; ${readable(room.free)} of the device's ${readable(room.total)} are free` : '';
    const where = this.#driver.label ? ` on ${this.#driver.label}` : '';
    return `out of memory${where}: ${readable(size)} wanted while these hold it: ${told}${left}`;
  }
}

function takeReserved(lists: Lists, size: number): Block {
  const block = lists.pop(size);
  if (!block) throw new Error(`a captured step takes ${size} bytes that its run before did not take`);
  return block;
}

const readable = (bytes: number): string => gibOrMib(bytes, 0.1);

function bucket(bytes: number): number {
  if (bytes <= 256) return 256;
  const step = 2 ** Math.max(8, Math.floor(Math.log2(bytes)) - 3);
  return Math.ceil(bytes / step) * step;
}
