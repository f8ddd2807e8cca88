// Launches that may become one: inside gather() calls of the same kernel are held back as long as none needs another's result,
// and then go to the driver together, which may make a single launch of them (attention's three projections). Any other call
// sends what is held first: launches keep the order of the calls, on which the reuse of memory relies. What a held launch reads or
// writes is given to nobody else until it is sent, even if it is given back (memory.ts): sending takes memory of its own.
import type { Driver } from './driver.ts';

type Args = readonly (bigint | number)[];

export class Together {
  readonly #driver: Driver;
  readonly #sent: () => void;
  #gathering = false;
  #symbol = '';
  #held: Args[] = [];
  #sending: readonly Args[] = [];

  /** `sent` is called when nothing is held any more. */
  constructor(driver: Driver, sent: () => void = () => {}) {
    this.#driver = driver;
    this.#sent = sent;
  }

  gather<R>(fn: () => R): R {
    if (this.#gathering || !this.#driver.launchAll) return fn();
    this.#gathering = true;
    try {
      const result = fn();
      this.#flush();
      return result;
    } finally {
      this.#gathering = false;
      this.#held = []; // after an error
      this.#sent();
    }
  }

  launch(symbol: string, args: Args): void {
    if (!this.#gathering) {
      this.#driver.launch(symbol, args);
      return;
    }
    if (symbol !== this.#symbol || this.#held.some((held) => depend(held, args))) this.#flush();
    this.#symbol = symbol;
    this.#held.push(args);
  }

  launchAll(symbol: string, calls: readonly Args[]): void {
    this.#flush();
    if (this.#driver.launchAll) this.#driver.launchAll(symbol, calls);
    else for (const args of calls) this.#driver.launch(symbol, args);
  }

  /** Whether a launch that the driver has not got yet reads or writes what begins at `address`. */
  awaits = (address: bigint): boolean =>
    this.#held.some((args) => args.includes(address)) || this.#sending.some((args) => args.includes(address));

  #flush(): void {
    const held = this.#held;
    this.#held = [];
    this.#sending = held;
    try {
      if (held.length === 1) this.#driver.launch(this.#symbol, held[0]);
      else if (held.length > 1) this.#driver.launchAll?.(this.#symbol, held);
    } finally {
      this.#sending = [];
      this.#sent();
    }
  }
}

/** Whether one of two calls writes what the other has: a kernel writes its first argument, y. */
const depend = (a: Args, b: Args): boolean => b.includes(a[0]) || a.includes(b[0]);
