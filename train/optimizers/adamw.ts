// AdamW (Loshchilov & Hutter 2019), as torch's: decoupled weight decay, bias-corrected moments, in float32 or, at half the memory,
// in bfloat16 that is rounded at random.
import { adamwStep } from '../../engine/ops/optimizer.ts';
import type { Rule } from './rule.ts';

export interface AdamwOptions {
  betas: readonly [number, number];
  eps: number;
  /** What both moments are kept in; float32 unless told. */
  moments_dtype?: 'float32' | 'bfloat16';
}

export const adamw = ({ betas, eps, moments_dtype: dtype }: AdamwOptions): Rule => ({
  slots: ({ memoryShape: shape }) => ({ exp_avg: { shape, dtype }, exp_avg_sq: { shape, dtype } }),
  step: (tensors, { exp_avg, exp_avg_sq }, context) =>
    adamwStep({ exp_avg, exp_avg_sq, ...tensors }, { betas, eps, ...context }),
});
