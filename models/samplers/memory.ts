// What a method remembers from step to step: latents, outputs and derivatives, each list the latest first and so long at most. The
// lists hold handles of their own, as scopes free whatever else a step makes.
import { keep } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';

export interface Remembered {
  /** The latest first. */
  readonly values: readonly Tensor[];
  /** Puts x in front, drops what is then too much, and gives all that is left. */
  add(x: Tensor): readonly Tensor[];
  clear(): void;
}

/** A list of so many tensors at most. */
export type Remember = (most: number) => Remembered;

export function openMemory(): { remember: Remember; release(): void } {
  const lists: Remembered[] = [];
  return {
    remember(most) {
      const list = remembered(most);
      lists.push(list);
      return list;
    },
    release() {
      for (const list of lists) list.clear();
    },
  };
}

function remembered(most: number): Remembered {
  let values: readonly Tensor[] = [];
  const keepFirst = (count: number) => {
    for (const t of values.slice(count)) t.release();
    values = values.slice(0, count);
    return values;
  };
  return {
    get values() {
      return values;
    },
    add(x) {
      values = [keep(x.handle()), ...values];
      return keepFirst(most);
    },
    clear() {
      keepFirst(0);
    },
  };
}
