// Lion (Chen et al. 2023): steps of one size in the direction of the sign of an interpolated momentum. It wants a learning
// rate some ten times smaller than AdamW's, and a weight decay that much larger.
import { lionStep } from '../../engine/ops/optimizer.ts';
import type { Rule } from './rule.ts';

export const lion = ({ betas }: { betas: readonly [number, number] }): Rule => ({
  slots: ({ memoryShape: shape }) => ({ exp_avg: { shape } }),
  step: (tensors, { exp_avg }, context) => lionStep({ exp_avg, ...tensors }, { betas, ...context }),
});
