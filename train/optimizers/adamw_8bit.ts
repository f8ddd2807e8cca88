// AdamW with moments of one byte (Dettmers et al. 2022), as bitsandbytes' AdamW8bit: a quarter of AdamW's state. Parameters
// of fewer than 4096 elements keep float32 moments, as there. Blocks are of a weight as it lies in memory: a convolution's are
// others than in bitsandbytes, which has its channels first. Weights decay before the step, as AdamW's, where its CUDA kernels
// shrink the step with them.
import { adamw8bitStep, blocksOf } from '../../engine/ops/adamw_8bit.ts';
import { adamw } from './adamw.ts';
import type { Rule } from './rule.ts';

const SMALLEST = 4096;

export function adamw8bit({ betas, eps }: { betas: readonly [number, number]; eps: number }): Rule {
  const plain = adamw({ betas, eps });
  return {
    slots(parameter) {
      if (parameter.size < SMALLEST) return plain.slots(parameter);
      const bytes = { shape: parameter.memoryShape, dtype: 'uint8' } as const;
      const blocks = { shape: [blocksOf(parameter.size)] };
      return { state1: bytes, state2: bytes, absmax1: blocks, absmax2: blocks };
    },
    step(tensors, slots, context) {
      const { state1, state2, absmax1, absmax2 } = slots;
      if (!state1) return plain.step(tensors, slots, context);
      return adamw8bitStep({ state1, state2, absmax1, absmax2, ...tensors }, { betas, eps, ...context });
    },
  };
}
