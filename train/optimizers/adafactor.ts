// Adafactor (Shazeer & Stern 2018) as the seed recipe uses transformers' implementation: relative_step and scale_parameter
// off, no momentum, eps 1e-30. Its state is a few numbers per row and column, which lets the full UNet train in little memory.
import { adafactorStep, factorShapes } from '../../engine/ops/adafactor.ts';
import type { Rule, Slot } from './rule.ts';

const EPS = 1e-30;

export interface AdafactorOptions {
  /** Bound on the root mean square of an update. */
  clip_threshold: number;
  /** The second moment's decay at step t is 1 - t^decay_rate. */
  decay_rate: number;
}

export const adafactor = ({ clip_threshold, decay_rate }: AdafactorOptions): Rule => ({
  slots({ memoryShape }): Record<string, Slot> {
    const factors = factorShapes(memoryShape);
    if (!factors) return { exp_avg_sq: { shape: memoryShape } };
    return { exp_avg_sq_row: { shape: factors.row }, exp_avg_sq_col: { shape: factors.col } };
  },
  step: (tensors, { exp_avg_sq_row, exp_avg_sq_col, exp_avg_sq }, context) =>
    adafactorStep(
      { exp_avg_sq_row, exp_avg_sq_col, exp_avg_sq, ...tensors },
      { eps: EPS, clipThreshold: clip_threshold, decayRate: decay_rate, ...context },
    ),
});
