// The launches of calls that were made before. To plan a product on Hopper, its tensor maps included, takes 20 to 90 us of
// JavaScript; a step of training makes the same few thousand calls again and again, and finds its tensors at the same addresses,
// because the pool hands out the lowest free block (../memory.ts). A call is known by its symbol and all its arguments. What a
// plan has between its launches is part of what is remembered: it must lie where it lay, which for a call that a step makes more
// than once (again, under gradient checkpointing) may be in several places.
import type { ReadyLaunch } from './kernel_table.ts';
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

export class PlanMemo {
  readonly #calls = new Map<string, Remembered[]>();
  #version = overrides.version;

  find(call: string): readonly Remembered[] {
    if (this.#version !== overrides.version) {
      this.#calls.clear();
      this.#version = overrides.version;
    }
    return this.#calls.get(call) ?? NONE;
  }

  keep(call: string, launches: Remembered): void {
    // Arguments that change at every step, such as a seed, would fill it in the end.
    if (this.#calls.size >= MOST) this.#calls.clear();
    const known = this.#calls.get(call);
    if (!known) this.#calls.set(call, [launches]);
    else if (known.push(launches) > MOST_PLACES) known.shift();
  }
}
