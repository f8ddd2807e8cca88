// Max-norm regularisation of adapters, kohya's scale_weight_norms: after each update a layer whose difference alpha / rank * B A has a
// Frobenius norm above the bound is brought back to it, each of its matrices by the same factor, the root of what is too much. (LyCORIS
// does so for LoKr; its LoHa keeps a factor of its own beside the matrices, which only its file has multiplied in; of OFT it is the blocks'
// own norm, there and here.)
import { noGrad } from '../../engine/grad.ts';
import type { Parameter } from '../../engine/module.ts';
import { update } from '../../engine/op.ts';
import { copy } from '../../engine/ops/move.ts';
import { sumSquares } from '../../engine/ops/optimizer.ts';
import { cast, scale } from '../../engine/ops/unary.ts';
import { scope } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { openSums } from '../optimizers/clip.ts';
import type { Optimizer } from '../optimizers/rule.ts';
import { onDevice, type Task, type TrainedAdapter } from '../passes/task.ts';
import type { Run } from '../run/run.ts';

/** What of a session an update leaves to be bounded. */
interface Moved {
  run: Pick<Run, 'lora'>;
  task: Pick<Task, 'adapters'>;
  parameters: ReadonlyMap<string, Parameter>;
  optimizer: Pick<Optimizer, 'weightOf'>;
}

/** Bounds the norms of a session's adapters, where its run says so. What was moved lies on its owners, as an optimizer leaves it. */
export function boundNorms({ run, task, parameters, optimizer }: Moved): void {
  const bound = run.lora.scale_weight_norms;
  const adapters = task.adapters ?? [];
  if (bound === 0 || adapters.length === 0) return;
  noGrad(() => {
    const norms = normsOf(adapters, optimizer.weightOf);
    for (const [i, { names }] of adapters.entries()) {
      if (!(norms[i] > bound)) continue;
      const factor = (bound / norms[i]) ** (1 / names.length);
      for (const name of names) shrink(parameters.get(name) as Parameter, optimizer.weightOf(name), factor);
    }
  });
}

/** Of what is bounded as it is at full precision, a layer at a time. */
function normsOf(adapters: readonly TrainedAdapter[], weightOf: (name: string) => Tensor): number[] {
  const sums = openSums(adapters.length);
  try {
    for (const [i, { names, bounded }] of adapters.entries())
      scope(() => {
        const weights = names.map(weightOf);
        const [{ device }] = weights; // a layer's matrices may have several owners
        const measured = bounded(weights.map((weight) => cast(onDevice(weight, device), 'float32')));
        update([sumSquares(measured, sums.on(device), i)]);
      });
    return sums.read().map(Math.sqrt);
  } finally {
    sums.release();
  }
}

/** `weight` may be the parameter's own tensor, or the master that it is rounded from. */
function shrink({ tensor }: Parameter, weight: Tensor, factor: number): void {
  scope(() => {
    update([copy(weight, scale(weight, factor))]);
    if (weight !== tensor) update([copy(tensor, cast(weight, tensor.dtype))]);
  });
}
