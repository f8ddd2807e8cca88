// Gradient checkpointing (Chen et al. 2016): a module that keeps only its inputs on the tape and runs again, this time
// recording, when its gradient is due. Memory falls to one module's activations at a time, for one more forward pass.
import { currentDrop, withDrop } from './dropout.ts';
import { backward, clearGrad, gradOf, isRecording, Node, noGrad, recorded, requireGrad } from './grad.ts';
import { type Children, isTrained, type Module } from './module.ts';
import { keep, mapTensors, onFailure, tensorsIn } from './scope.ts';
import type { Tensor } from './tensor.ts';

/**
 * `module` with checkpointing. Its inputs are the tensors in its arguments, also those in maps and plain objects among them; its
 * parameters collect their gradients as always. It must return one tensor, and the same numbers when it runs again.
 */
export function checkpointed<A extends readonly unknown[], C extends Children>(
  module: Module<A, Tensor, C>,
): Module<A, Tensor, C> {
  const call = (...args: A): Tensor => (isRecording() ? taped(module, args) : module(...args));
  return Object.assign(call, { children: module.children });
}

function taped<A extends readonly unknown[]>(module: Module<A, Tensor>, args: A): Tensor {
  const y = noGrad(() => module(...args));
  const inputs = [...new Set(tensorsIn(args))];
  const wanted = inputs.filter((t) => t.node);
  if (wanted.length === 0 && !isTrained(module)) return y;
  const saved = new Map(inputs.map((t) => [t, keep(t.handle())]));
  const nodes = wanted.map(({ node }) => node as Node);
  const drop = currentDrop();
  y.node = Node.ofFunction(nodes, [...saved.values()], (dy) => {
    const leaves = new Map(inputs.map((t) => [t, (saved.get(t) as Tensor).handle()]));
    for (const t of wanted) {
      const leaf = requireGrad(leaves.get(t) as Tensor);
      onFailure(() => clearGrad(leaf));
    }
    const given = mapTensors(args, (t) => leaves.get(t) as Tensor) as unknown as A;
    const again = withDrop(drop, () => recorded(() => module(...given)));
    backward(again, dy);
    return wanted.map((t) => {
      const leaf = leaves.get(t) as Tensor;
      const gradient = gradOf(leaf);
      clearGrad(leaf);
      return gradient;
    });
  });
  return y;
}
