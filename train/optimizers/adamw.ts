// AdamW (Loshchilov & Hutter 2019), as torch's: decoupled weight decay, bias-corrected moments in float32.
import { adamwStep } from '../../engine/ops/optimizer.ts';
import type { Rule } from './rule.ts';

export const adamw = ({ betas, eps }: { betas: readonly [number, number]; eps: number }): Rule => ({
  slots: ({ memoryShape: shape }) => ({ exp_avg: { shape }, exp_avg_sq: { shape } }),
  step: (tensors, { exp_avg, exp_avg_sq }, context) =>
    adamwStep({ exp_avg, exp_avg_sq, ...tensors }, { betas, eps, ...context }),
});
