// DoRA as it trains (Liu et al. 2024, and peft): a layer computes m / n * (W x + alpha / rank * B (A x)) + bias, where n are the lengths
// of the rows of W + alpha / rank * B A, which no gradient goes through, and m those that are trained. m begins as n, so that the layer
// computes what it did. W itself is not touched, so it may be in bfloat16 or in 8 bits as for a LoRA.
import { noGrad } from '../../engine/grad.ts';
import type { Parameter } from '../../engine/module.ts';
import { rowNorms } from '../../engine/ops/weight_norm.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';
import type { Matrices } from './adapter_kinds.ts';

/** The lengths [o] of the rows of a weight with `factor` times up * down added, in float32; no gradient goes through them. */
export const lengthsOf = (weight: Tensor, down: Tensor, up: Tensor, factor: number): Tensor =>
  noGrad(() => rowNorms(weight, down, up, factor));

/** The same of a layer's weight and its LoRA. */
export const adaptedLengths = (weight: Tensor, { matrices: [down, up], rank, alpha }: Matrices): Tensor =>
  lengthsOf(weight, down.parameter.tensor, up.parameter.tensor, alpha / rank);

/** Loads the magnitude, where there is one, with the lengths that rows have. */
export function beginMagnitude(adapter: Matrices, weight: Parameter): void {
  const { magnitude } = adapter;
  if (!magnitude) return;
  const { parameter } = magnitude;
  parameter.tensor = unscoped(() =>
    scope(() => adaptedLengths(weight.tensor, adapter).reshape(...parameter.memoryShape)),
  );
}
