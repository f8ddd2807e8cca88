// Reverse-mode differentiation: a tape of nodes, each holding the op, what it saved and its input nodes. Gradients are
// summed in the order the tape is walked (newest op first), so a run repeats bit for bit. The gradient of an input that is added
// as it is (a residual) is dy itself, the same storage: a gradient is summed in place only where no other node holds it.
import type { DType } from '../io/dtype.ts';
import type { OpRecord, Tensors } from './op.ts';
import { keep, onFailure, scope, unscoped } from './scope.ts';
import { empty, type Tensor, tensor, zeros } from './tensor.ts';

let recording = true;
let sequence = 0;

export const isRecording = (): boolean => recording;

/** Runs `fn` without noting anything on the tape: inference. */
export const noGrad = <R>(fn: () => R): R => withRecording(false, fn);

/** Runs `fn` noting what it does on the tape, even inside noGrad. */
export const recorded = <R>(fn: () => R): R => withRecording(true, fn);

function withRecording<R>(wanted: boolean, fn: () => R): R {
  const before = recording;
  recording = wanted;
  try {
    return fn();
  } finally {
    recording = before;
  }
}

/** From the gradient of a node's output to those of its inputs; undefined where there is none. */
type Pull = (dy: Tensor) => (Tensor | undefined)[];

export class Node {
  readonly order = sequence++;
  /** For a leaf: the accumulated gradient. For an op: the gradient of its output, while backward runs. */
  grad: Tensor | undefined;
  /** Whether anything was added to it: the zeros of a leaf that no loss reaches are no gradient. */
  reached = false;
  /** Of a leaf: is given what would be added. */
  take: ((more: Tensor) => void) | undefined;
  /** The nodes of those inputs that want a gradient. */
  inputs: readonly Node[] = [];
  /** Makes the gradients of `inputs`, in their order. Undefined on a leaf or once spent. */
  #pull: Pull | undefined;
  #saved: readonly Tensor[] = [];

  static ofOp<A>(record: OpRecord<A>, inputs: Tensors, outputs: Tensors, attrs: A): Node {
    if (!record.backward) throw new Error(`op ${record.name} has no gradient, but one is wanted`);
    const nodes: Node[] = [];
    const wanted: { name: string; shape: readonly number[]; dtype: DType }[] = [];
    for (const [name, { node, shape, dtype }] of Object.entries(inputs)) {
      if (!node) continue;
      nodes.push(node);
      wanted.push({ name, shape, dtype });
    }
    const saved: Tensors = {};
    for (const name of record.saves) {
      const source = inputs[name] ?? outputs[name];
      if (source) saved[name] = keep(source.handle());
    }
    const { device, shape: shapeOfY } = outputs.y;
    return Node.ofFunction(nodes, Object.values(saved), (dy) => {
      // The spread last: V8 takes 20 times as long to join objects if it comes first.
      const tensors: Tensors = { dy: dy.reshape(...shapeOfY), ...saved };
      let computes = false;
      const gradients = wanted.map(({ name, shape, dtype }) => {
        if (record.passes?.includes(name)) return dy.handle(shape);
        computes = true;
        return (tensors[`d${name}`] = empty(shape, { device, dtype }));
      });
      if (computes) device.execute(record, 'backward', tensors, attrs);
      return gradients;
    });
  }

  /** A node that `pull` makes the gradients of, from what it has saved. */
  static ofFunction(inputs: readonly Node[], saved: readonly Tensor[], pull: Pull): Node {
    const node = new Node();
    node.inputs = inputs;
    node.#saved = saved;
    node.#pull = pull;
    onFailure(() => node.spend());
    return node;
  }

  pull(): (Tensor | undefined)[] {
    if (!this.#pull || !this.grad) return [];
    return this.#pull(this.grad);
  }

  /** Frees what was saved: a tape is walked once. */
  spend(): void {
    for (const t of this.#saved) t.release();
    this.#saved = [];
    this.#pull = undefined;
    this.grad?.release();
    this.grad = undefined;
    this.inputs = [];
  }

  get isLeaf(): boolean {
    return this.#pull === undefined;
  }
}

/** Marks a tensor as one whose gradient is wanted; read it from `gradOf` after backward. */
export function requireGrad<T extends Tensor>(tensor: T): T {
  tensor.node ??= new Node();
  return tensor;
}

/** The gradient collected at a leaf so far (same shape and type as the leaf), or undefined. */
export const gradOf = (leaf: Tensor): Tensor | undefined =>
  leaf.node?.reached ? leaf.node.grad?.handle(leaf.shape) : undefined;

export function clearGrad({ node }: Tensor): void {
  if (!node) return;
  node.grad?.release();
  node.grad = undefined;
  node.reached = false;
}

/** From now on has `take` given what backward finds for a leaf, when it is found, and collects nothing; collects again without. */
export function handOver({ node }: Tensor, take?: (gradient: Tensor) => void): void {
  if (node) node.take = take;
}

/** Adds to the gradient of a leaf, as backward does. */
export function addGrad(leaf: Tensor, more: Tensor): void {
  if (leaf.node) accumulate(leaf.node, more);
}

/** Gives a leaf zeros, in the storage of the gradient that it has: backward then adds to them where they lie. */
export function zeroGrad(leaf: Tensor): void {
  if (!leaf.node) return;
  if (leaf.node.grad) leaf.node.grad.clear();
  else leaf.node.grad = unscoped(() => zeros(leaf.shape, leaf));
}

/** Walks the tape from `output` (seeded with `dy`, or ones) and adds to the gradient of every leaf it reaches. */
export function backward(output: Tensor, dy?: Tensor): void {
  const root = output.node;
  if (!root) throw new Error('backward: nothing upstream of this tensor wants a gradient');
  noGrad(() =>
    scope(() => {
      accumulate(root, dy ?? ones(output));
      const nodes = newestFirst(root);
      for (const node of nodes) {
        if (node.isLeaf) continue;
        const { inputs } = node;
        scope(() => {
          node.pull().forEach((gradient, i) => {
            if (gradient) accumulate(inputs[i], gradient);
          });
        });
        node.spend();
      }
      for (const node of nodes) if (node.isLeaf) own(node);
    }),
  );
}

/** Adds to a node's gradient, in place where the storage is the node's alone. */
function accumulate(node: Node, more: Tensor): void {
  const { grad, take } = node;
  node.reached = true;
  if (take) take(more);
  else if (!grad) node.grad = keep(more.handle());
  else if (grad.isShared) replace(node, grad, more);
  else grad.device.add(grad, grad, more);
}

/** A leaf's gradient outlives the walk, and whoever reads it may change it. */
function own(leaf: Node): void {
  const { grad } = leaf;
  if (grad?.isShared) replace(leaf, grad, zeros(grad.shape, grad));
}

function replace(node: Node, grad: Tensor, more: Tensor): void {
  const sum = empty(grad.shape, grad);
  grad.device.add(sum, grad, more);
  node.grad = keep(sum);
  grad.release();
}

function ones(like: Tensor): Tensor {
  return tensor(new Float32Array(like.size).fill(1), like.shape, { device: like.device, dtype: like.dtype });
}

function newestFirst(root: Node): Node[] {
  const seen = new Set<Node>([root]);
  const stack = [root];
  for (let node = stack.pop(); node; node = stack.pop()) {
    for (const input of node.inputs) {
      if (seen.has(input)) continue;
      seen.add(input);
      stack.push(input);
    }
  }
  return [...seen].sort((a, b) => b.order - a.order);
}
