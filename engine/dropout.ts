// Dropout (Srivastava et al. 2014) by masks that come from outside: a layer asks by its name, and what it is given hangs on who runs the
// pass. Nobody does so when sampling, and then nothing is dropped. Checkpointing runs a module again under what it ran under at first.
import type { Tensor } from './tensor.ts';

/** x with some of its numbers dropped, as told for the layer of that name. */
export type Drop = (layer: string, x: Tensor) => Tensor;

let current: Drop | undefined;

export const currentDrop = (): Drop | undefined => current;

/** Runs `fn`, in which layers drop by `drop`. */
export function withDrop<R>(drop: Drop | undefined, fn: () => R): R {
  const before = current;
  current = drop;
  try {
    return fn();
  } finally {
    current = before;
  }
}

/** What a layer makes of x, where something is to be dropped. */
export const dropped: Drop = (layer, x) => current?.(layer, x) ?? x;
