// The launches of calls that were made before. To plan a product on Hopper, its tensor maps included, takes 20 to 90 us of
// JavaScript; a step of training makes the same few thousand calls again and again, and finds its tensors at the same addresses,
// because the pool hands out the lowest free block (../memory.ts). A call is known by its symbol and all its arguments. The
// launches also name the plan's workspaces, and are used again only if these come to lie where they lay; a call that a step makes
// more than once (under gradient checkpointing) is remembered with several such places. Arguments are hashed and compared as
// words: a key of text, with each address written out, takes 0.6 us longer, of some 4 for an op.
import type { ReadyLaunch } from './kernel_table.ts';
import type { LaunchArguments } from './plan.ts';
import { overrides } from './plan_sm90.ts';

export interface Remembered {
  readonly launches: readonly ReadyLaunch[];
  readonly workspaces: readonly { readonly bytes: number; readonly address: bigint }[];
}

/** Calls that are remembered, about 1.5 kB each: some steps of training in buckets of several sizes. */
const MOST = 20_000;
/** Places of its workspaces that are remembered of one call. */
const MOST_PLACES = 4;
const NONE: readonly Remembered[] = [];

/** The arguments of the call that is looked up, as they come and as words. */
let numbers = new Float64Array(64);
let addresses = new BigUint64Array(numbers.buffer);
let words = new Uint32Array(numbers.buffer);

interface Known {
  readonly symbol: string;
  readonly words: Uint32Array;
  readonly places: Remembered[];
}

export class PlanMemo {
  /** By hash; nearly always one to a hash. */
  readonly #known = new Map<number, Known[]>();
  readonly #seeds = new Map<string, number>();
  #count = 0;
  #version = overrides.version;

  /** What was queued for these arguments of a symbol, wherever its workspaces lay. */
  find(symbol: string, calls: readonly LaunchArguments[]): readonly Remembered[] {
    if (this.#version !== overrides.version) {
      this.#forget();
      this.#version = overrides.version;
    }
    const count = writeWords(calls);
    return this.#find(symbol, count, this.#hash(symbol, count))?.places ?? NONE;
  }

  keep(symbol: string, calls: readonly LaunchArguments[], launches: Remembered): void {
    // Arguments that change at every step, such as a seed, would fill it in the end.
    if (this.#count >= MOST) this.#forget();
    const count = writeWords(calls);
    const hash = this.#hash(symbol, count);
    const found = this.#find(symbol, count, hash);
    if (found) {
      if (found.places.push(launches) > MOST_PLACES) found.places.shift();
      return;
    }
    this.#count++;
    const known = { symbol, words: words.slice(0, count), places: [launches] };
    const others = this.#known.get(hash);
    if (others) others.push(known);
    else this.#known.set(hash, [known]);
  }

  #find(symbol: string, count: number, hash: number): Known | undefined {
    const alike = this.#known.get(hash);
    if (!alike) return undefined;
    for (let i = 0; i < alike.length; i++)
      if (alike[i].symbol === symbol && isWritten(alike[i].words, count)) return alike[i];
    return undefined;
  }

  #hash(symbol: string, count: number): number {
    let hash = this.#seeds.get(symbol);
    if (hash === undefined) {
      hash = Math.imul(this.#seeds.size + 1, 0x9e3779b1);
      this.#seeds.set(symbol, hash);
    }
    for (let i = 0; i < count; i += 2) {
      hash = Math.imul(hash ^ words[i] ^ Math.imul(words[i + 1], 31), 0x9e3779b1);
      hash ^= hash >>> 15;
    }
    return hash;
  }

  #forget(): void {
    this.#known.clear();
    this.#count = 0;
  }
}

/** Writes into `words` how many calls there are, then all arguments; tells how many words that is. */
function writeWords(calls: readonly LaunchArguments[]): number {
  let at = 0;
  numbers[at++] = calls.length;
  for (const args of calls) {
    if (at + args.length > numbers.length) grow(2 * (at + args.length));
    for (let i = 0; i < args.length; i++, at++) {
      const argument = args[i];
      if (typeof argument === 'bigint') addresses[at] = argument;
      else numbers[at] = argument as number;
    }
  }
  return 2 * at;
}

function grow(length: number): void {
  const larger = new Float64Array(length);
  larger.set(numbers);
  numbers = larger;
  addresses = new BigUint64Array(numbers.buffer);
  words = new Uint32Array(numbers.buffer);
}

function isWritten(known: Uint32Array, count: number): boolean {
  if (known.length !== count) return false;
  for (let i = 0; i < count; i++) if (known[i] !== words[i]) return false;
  return true;
}
