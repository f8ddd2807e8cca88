// The launches of calls that were made before. To plan a product on Hopper, its tensor maps included, takes 20 to 90 us of
// JavaScript; a step of training makes the same few thousand calls again and again, and finds its tensors at the same addresses,
// because the pool hands out the lowest free block (../memory.ts). A call is known by its symbol and all its arguments. What a
// plan has between its launches is part of what is remembered: it must lie where it lay.
import type { ReadyLaunch } from './kernel_table.ts';
import { overrides } from './plan_sm90.ts';

export interface Remembered {
  readonly launches: readonly ReadyLaunch[];
  readonly workspaces: readonly { readonly bytes: number; readonly address: bigint }[];
}

/** Calls that are remembered, about 1.5 kB each: some steps of training in buckets of several sizes. */
const MOST = 20_000;

export class PlanMemo {
  readonly #calls = new Map<string, Remembered>();
  #version = overrides.version;

  find(call: string): Remembered | undefined {
    if (this.#version !== overrides.version) {
      this.#calls.clear();
      this.#version = overrides.version;
    }
    return this.#calls.get(call);
  }

  keep(call: string, launches: Remembered): void {
    // Arguments that change at every step, such as a seed, would fill it in the end.
    if (this.#calls.size >= MOST) this.#calls.clear();
    this.#calls.set(call, launches);
  }
}
