// The launches of calls that were made before. To plan a product on Hopper, its tensor maps included, takes 20 to 90 us of
// JavaScript; a step of training makes the same few thousand calls again and again, and finds its tensors at the same addresses,
// because the pool hands out the lowest free block (../memory.ts). A call is known by its symbol and all its arguments. What a
// plan has between its launches is part of what is remembered: it must lie where it lay, which for a call that a step makes more
// than once (again, under gradient checkpointing) may be in several places. Arguments are hashed by their bits and then compared,
// 0.1 us for a call, where a key of text, with each address written out, takes 1.4.
import type { ReadyLaunch } from './kernel_table.ts';
import type { LaunchArguments } from './plan.ts';
import { overrides } from './plan_sm90.ts';

export interface Remembered {
  readonly launches: readonly ReadyLaunch[];
  readonly workspaces: readonly { readonly bytes: number; readonly address: bigint }[];
}

/** Calls that are remembered, about 1.5 kB each: some steps of training in buckets of several sizes. */
const MOST = 20_000;
/** And places of what one call has between its launches. */
const MOST_PLACES = 4;
const NONE: readonly Remembered[] = [];

/** An argument's bits, seen as what it is and as two words. */
const numbers = new Float64Array(1);
const addresses = new BigUint64Array(numbers.buffer);
const halves = new Uint32Array(numbers.buffer);

interface Known {
  readonly symbol: string;
  readonly calls: readonly LaunchArguments[];
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
    return this.#find(symbol, calls)?.places ?? NONE;
  }

  keep(symbol: string, calls: readonly LaunchArguments[], launches: Remembered): void {
    // Arguments that change at every step, such as a seed, would fill it in the end.
    if (this.#count >= MOST) this.#forget();
    const found = this.#find(symbol, calls);
    if (found) {
      if (found.places.push(launches) > MOST_PLACES) found.places.shift();
      return;
    }
    this.#count++;
    const hash = this.#hash(symbol, calls);
    const known = { symbol, calls, places: [launches] };
    const others = this.#known.get(hash);
    if (others) others.push(known);
    else this.#known.set(hash, [known]);
  }

  #find(symbol: string, calls: readonly LaunchArguments[]): Known | undefined {
    const alike = this.#known.get(this.#hash(symbol, calls));
    return alike?.find((known) => known.symbol === symbol && equal(known.calls, calls));
  }

  #hash(symbol: string, calls: readonly LaunchArguments[]): number {
    let hash = this.#seeds.get(symbol);
    if (hash === undefined) {
      hash = Math.imul(this.#seeds.size + 1, 0x9e3779b1);
      this.#seeds.set(symbol, hash);
    }
    for (const args of calls)
      for (let i = 0; i < args.length; i++) {
        const argument = args[i];
        if (typeof argument === 'bigint') addresses[0] = argument;
        else numbers[0] = argument;
        hash = Math.imul(hash ^ halves[0] ^ Math.imul(halves[1], 31), 0x9e3779b1);
        hash ^= hash >>> 15;
      }
    return hash;
  }

  #forget(): void {
    this.#known.clear();
    this.#count = 0;
  }
}

function equal(a: readonly LaunchArguments[], b: readonly LaunchArguments[]): boolean {
  if (a.length !== b.length) return false;
  for (let k = 0; k < a.length; k++) {
    const [one, other] = [a[k], b[k]];
    if (one.length !== other.length) return false;
    for (let i = 0; i < one.length; i++) if (one[i] !== other[i]) return false;
  }
  return true;
}
