// The exponential moving average of the trained weights, in float32, as diffusers' EMAModel: its decay rises with the
// number of updates, so that early averages forget the start.
import { holding } from '../../engine/memory.ts';
import { update } from '../../engine/op.ts';
import { duplicate } from '../../engine/ops/move.ts';
import { emaStep } from '../../engine/ops/optimizer.ts';
import { built, unscoped } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';

export interface Ema {
  /** The averages by name. */
  readonly weights: ReadonlyMap<string, Tensor>;
  /** Takes in the weights as they are after the `k`-th update, counted from 1; returns the decay it used. */
  step(k: number): number;
  release(): void;
}

/** The decay of update k, counted from 1: 0 at the first, then min(decay, (1 + n) / (10 + n)) with n = k - 1. */
const emaDecay = (decay: number, k: number): number => (k <= 1 ? 0 : Math.min(decay, k / (9 + k)));

/** Averages of the tensors that `weightOf` gives for `names`, beginning as copies of them. */
export const ema = (names: Iterable<string>, weightOf: (name: string) => Tensor, decay: number): Ema =>
  holding('averages', () => built(() => startEma(names, weightOf, decay)));

function startEma(names: Iterable<string>, weightOf: (name: string) => Tensor, decay: number): Ema {
  const weights = new Map<string, Tensor>();
  for (const name of names)
    weights.set(
      name,
      unscoped(() => duplicate(weightOf(name), 'float32')),
    );
  return {
    weights,
    step(k) {
      const used = emaDecay(decay, k);
      update([...weights].map(([name, average]) => emaStep(average, weightOf(name), used)));
      return used;
    },
    release() {
      for (const t of weights.values()) t.release();
    },
  };
}
