// The orders of a server, drawn one after the other in the order in which they came: a device that draws one picture as fast as it can
// draws two no faster at once.
import { UserError } from '../../io/errors.ts';
import type { Drawer, Hearing } from './drawer_process.ts';
import { Refusal } from './http.ts';
import type { Drawn, ModelTold, Order } from './messages.ts';

/** What is told of an order on its way. */
export interface Watch {
  /** It is its turn. */
  begin?(): void;
  /** The part that is done, 0 to 1. */
  step?(share: number): void;
  /** What was asked for by `look`. */
  preview?(png: Uint8Array): void;
  /** One that is finished. */
  picture?(drawn: Drawn): void;
}

/** The order at work. */
export interface Working {
  order: Order;
  /** The part that is done, 0 to 1. */
  share: number;
  step: number;
  steps: number;
  /** When it began, in milliseconds as of `performance.now()`. */
  began: number;
  /** The newest preview that was asked for. */
  preview?: Uint8Array;
}

interface Entry {
  begin(): void;
  refuse(error: Error): void;
}

export interface Queue {
  /** The pictures of an order, or those that were finished when `interrupt` ended it. An order whose `signal` aborts is given up. */
  draw(order: Order, signal: AbortSignal, watch?: Watch): Promise<Drawn[]>;
  working(): Working | undefined;
  /** What is known of the model, once it was open. */
  model(): ModelTold | undefined;
  /** How many wait. */
  waiting(): number;
  /** Asks for a preview of the order at work after its next step. */
  look(): void;
  /** Ends the order at work after its step. */
  interrupt(): void;
  /** Frees the models' memory, where nothing is at work; the next order, or `reload`, opens them again. */
  unload(): void;
  reload(): Promise<void>;
  /** Refuses those that wait and whatever comes, and resolves when the one at work is done. */
  close(): Promise<void>;
}

/** Notes what is told of the order at work, and tells it on. */
const noting = (told: Working, watch: Watch, pictures: Drawn[]): Hearing => ({
  step(share, step, steps) {
    Object.assign(told, { share, step, steps });
    watch.step?.(share);
  },
  preview(png) {
    told.preview = png;
    watch.preview?.(png);
  },
  picture(drawn) {
    pictures.push(drawn);
    watch.picture?.(drawn);
  },
});

/** Those that wait. */
function openLine(most: number) {
  const entries: Entry[] = [];
  return {
    length: () => entries.length,
    shift: () => entries.shift(),
    /** Lets an order wait until it is begun; one whose `signal` aborts leaves. */
    wait<T>(begin: () => Promise<T>, signal: AbortSignal): Promise<T> {
      if (entries.length >= most)
        return Promise.reject(new Refusal(429, `${most} orders wait already; ask again later`));
      return new Promise((resolve, reject) => {
        const entry: Entry = { begin: () => void begin().then(resolve, reject), refuse: reject };
        entries.push(entry);
        signal.addEventListener('abort', () => {
          if (entries.includes(entry)) entries.splice(entries.indexOf(entry), 1);
          reject(signal.reason);
        });
      });
    },
  };
}

export const leaving = () => new Refusal(503, 'the server is about to end; ask again when it is back');

/** `most` may wait; further ones are refused. */
export function openQueue(drawer: Drawer, most: number): Queue {
  const line = openLine(most);
  let current: { told: Working; stop: AbortController; done: Promise<unknown> } | undefined;
  let closed = false;
  const next = (): void => {
    if (!current) line.shift()?.begin();
  };

  async function work(order: Order, signal: AbortSignal, watch: Watch): Promise<Drawn[]> {
    const told: Working = { order, share: 0, step: 0, steps: 0, began: performance.now() };
    const stop = new AbortController();
    const pictures: Drawn[] = [];
    const hearing = noting(told, watch, pictures);
    watch.begin?.();
    const done = drawer.draw(order, hearing, AbortSignal.any([signal, stop.signal]));
    current = { told, stop, done };
    try {
      await done;
    } finally {
      current = undefined;
      next();
    }
    return pictures;
  }

  return {
    async draw(order, signal, watch = {}) {
      if (closed) throw leaving();
      const drawn = line.wait(() => work(order, signal, watch), signal);
      next();
      return drawn;
    },
    working: () => current?.told,
    model: () => drawer.told(),
    waiting: line.length,
    look: () => drawer.look(),
    interrupt: () => current?.stop.abort(),
    unload() {
      if (!current) drawer.close();
    },
    reload: async () => void (await drawer.open()),
    async close() {
      closed = true;
      for (let entry = line.shift(); entry; entry = line.shift()) entry.refuse(leaving());
      await current?.done.catch(() => {});
    },
  };
}

/** A queue whose mistakes are told in other words than those of flags, where `keys` has any. */
export const tellingBy = (keys: Readonly<Record<string, string>>, queue: Queue): Queue => ({
  ...queue,
  draw: (...order) =>
    queue.draw(...order).catch((error) => {
      if (!(error instanceof UserError)) throw error;
      const told = error.message.replace(/--[a-z][a-z0-9-]*/g, (flag) =>
        Object.hasOwn(keys, flag) ? keys[flag] : flag,
      );
      throw new UserError(told);
    }),
});
