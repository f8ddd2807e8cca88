// Training on several GPUs of a machine. Each further one has copies of the weights that a pass reads. The passes of an update
// are dealt out in turn, and so add up on each GPU; then the gradients of the others are added to the first one's, in the order
// of the GPUs, and the weights that its optimizer makes are copied back. So the number of GPUs changes no draw, and no bit where
// an update has no more passes than there are GPUs, all of one kind; else it changes the order of sums.
import type { Device } from '../engine/device.ts';
import { addGrad, gradOf, requireGrad } from '../engine/grad.ts';
import type { Parameter } from '../engine/module.ts';
import { scope } from '../engine/scope.ts';
import { copyBetween, empty, type Tensor } from '../engine/tensor.ts';
import { UserError } from '../io/errors.ts';
import { openPasses, type Passes } from './pass.ts';
import type { Run } from './run.ts';
import type { Task } from './task.ts';

/** Passes on one GPU or several: each is queued where it is next. */
export interface Replicas extends Passes {
  /** Adds the gradients of the update's passes up on the first GPU. */
  gather(): void;
  /** Gives the others the first one's weights. */
  share(): void;
}

/** Gradients that are on their way at once: what they take is free again, as no pass is at work meanwhile. */
const PART_BYTES = 2 ** 28;

/** Copies of what a pass of `task` needs on `further` devices, and passes on all. */
export function openReplicas(
  task: Pick<Task, 'loss' | 'repeats' | 'replicate'>,
  parameters: ReadonlyMap<string, Parameter>,
  device: Device,
  further: readonly Device[],
): Replicas {
  const own = [...parameters.values()].map(({ tensor }) => tensor);
  const replicas = further.map((other) => {
    const { weights, loss, release } = task.replicate(other);
    const trained = new Map([...parameters.keys()].map((name) => [name, weights.get(name) as Parameter]));
    const leaves = [...trained.values()].map(({ tensor }) => requireGrad(tensor));
    return { leaves, release, passes: openPasses({ loss, repeats: task.repeats }, trained, other) };
  });
  const all = [openPasses(task, parameters, device), ...replicas.map(({ passes }) => passes)];
  let queued = 0;
  return {
    queue: (inputs, share) => all[queued++ % all.length].queue(inputs, share),
    gather() {
      const busy = replicas.slice(0, Math.max(0, queued - 1));
      for (const { leaves } of busy) addGradients(own, leaves);
    },
    share() {
      for (const { leaves } of replicas) copyBetween(leaves.map((leaf, i) => [leaf, own[i]]));
    },
    clear() {
      queued = 0;
      for (const passes of all) passes.clear();
    },
    release() {
      for (const passes of all) passes.release();
      for (const { release } of replicas) release();
    },
  };
}

/** Adds what the leaves of another device have collected to the gradients of these, part by part. */
function addGradients(to: readonly Tensor[], from: readonly Tensor[]): void {
  for (let at = 0; at < from.length; )
    scope(() => {
      const arriving: { leaf: Tensor; copy: Tensor; gradient: Tensor }[] = [];
      for (let bytes = 0; at < from.length && bytes < PART_BYTES; at++) {
        const gradient = gradOf(from[at]);
        if (!gradient) continue;
        const leaf = to[at];
        arriving.push({ leaf, gradient, copy: empty(leaf.shape, leaf) });
        bytes += gradient.byteLength;
      }
      copyBetween(arriving.map(({ copy, gradient }) => [copy, gradient]));
      for (const { leaf, copy } of arriving) addGrad(leaf, copy);
    });
}

/** @throws UserError where GPUs would have nothing to do */
export function requirePasses(
  { name, batch_size, gradient_accumulation_steps: passes }: Run,
  gpus: number,
): void {
  if (passes >= gpus) return;
  throw new UserError(
    `an update of ${name} has ${passes} ${passes === 1 ? 'pass' : 'passes'} of batch_size ${batch_size}, fewer than the ${gpus} GPUs that take them in turn; set gradient_accumulation_steps to ${gpus} or a multiple of it`,
  );
}
