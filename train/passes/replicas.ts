// Training on several GPUs of a machine. Each has a copy of the weights that a pass reads, and the passes of an update are dealt
// out in turn, so that they add up on each GPU. Of every trained parameter one GPU is the owner: there the gradients of all are
// added up, in the order of the GPUs, there the optimizer moves it and its average lies, and from there it goes back to all (the
// first stage of ZeRO, Rajbhandari et al. 2020). So the number of GPUs changes no draw, and no bit where an update has no more
// passes than there are GPUs, all of one kind; else it changes the order of sums.
import type { Device } from '../../engine/device.ts';
import { copyBetween } from '../../engine/exchange.ts';
import { addGrad, gradOf, requireGrad } from '../../engine/grad.ts';
import type { Parameter } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { empty, type Tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import type { Run } from '../run/run.ts';
import { openPasses, type Passes } from './pass.ts';
import type { Task } from './task.ts';

/** Passes on one GPU or several: each is queued where it is next. */
export interface Replicas extends Passes {
  /** The trained parameters, each on its owner. */
  readonly parameters: ReadonlyMap<string, Parameter>;
  /** Adds the gradients of the update's passes up, on the owners. */
  gather(): void;
  /** Gives all GPUs the owners' weights. */
  broadcast(): void;
}

/** Gradients that are on their way to a GPU at once: what they take is free again, as no pass is at work meanwhile. */
const PART_BYTES = 2 ** 28;

/** Copies of what a pass of `task` needs on `further` devices, and passes on all. */
export function openReplicas(
  task: Pick<Task, 'loss' | 'replicate'>,
  parameters: ReadonlyMap<string, Parameter>,
  device: Device,
  further: readonly Device[],
): Replicas {
  const names = [...parameters.keys()];
  const replicas = further.map((other) => {
    const { weights, loss, release } = task.replicate(other);
    const trained = new Map(names.map((name) => [name, weights.get(name) as Parameter]));
    for (const { tensor } of trained.values()) requireGrad(tensor);
    return { trained, release, passes: openPasses({ loss }, trained, other) };
  });
  const all = [openPasses(task, parameters, device), ...replicas.map(({ passes }) => passes)];
  const copies = [parameters, ...replicas.map(({ trained }) => trained)];
  const owners = ownersOf([...parameters.values()], all.length);
  const shared = names.map((name, i): Shared => {
    return { leaves: copies.map((copy) => (copy.get(name) as Parameter).tensor), owner: owners[i] };
  });
  const parts = partsOf(shared, all.length);
  let queued = 0;
  return {
    parameters: new Map(names.map((name, i) => [name, copies[owners[i]].get(name) as Parameter])),
    queue: (inputs, share) => all[queued++ % all.length].queue(inputs, share),
    gather() {
      for (const part of parts) addUp(part);
    },
    broadcast() {
      copyBetween(
        shared.flatMap(({ leaves, owner }) => others(leaves, owner).map((leaf) => [leaf, leaves[owner]])),
      );
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

/** A trained parameter: its tensors on all GPUs, and which of these owns it. */
interface Shared {
  readonly leaves: readonly Tensor[];
  readonly owner: number;
}

const others = <T>(each: readonly T[], owner: number): T[] => each.filter((_, i) => i !== owner);

/** Runs of parameters, of as many elements as can be, to each of `count` GPUs. */
function ownersOf(parameters: readonly Parameter[], count: number): number[] {
  const total = parameters.reduce((sum, { size }) => sum + size, 0);
  let before = 0;
  return parameters.map(({ size }) => {
    const middle = before + size / 2;
    before += size;
    return Math.floor((middle / total) * count);
  });
}

/** Parts of all GPUs' shares, side by side, of which each GPU receives so many bytes at the most, or one parameter. */
function partsOf(shared: readonly Shared[], count: number): Shared[][] {
  const parts: Shared[][] = [];
  const filled = Array.from({ length: count }, () => ({ part: 0, bytes: 0 }));
  for (const each of shared) {
    const { leaves, owner } = each;
    const share = filled[owner];
    const bytes = (count - 1) * leaves[owner].byteLength;
    if (share.bytes > 0 && share.bytes + bytes > PART_BYTES)
      Object.assign(share, { part: share.part + 1, bytes: 0 });
    share.bytes += bytes;
    (parts[share.part] ??= []).push(each);
  }
  return parts;
}

/** Brings to the owners of these what the others have collected, and adds it up there in the order of the GPUs. */
function addUp(part: readonly Shared[]): void {
  scope(() => {
    const arriving = part.map(({ leaves, owner }) => {
      const own = leaves[owner];
      const fetched = leaves.map((leaf, i) => {
        const gradient = i === owner ? undefined : gradOf(leaf);
        return gradient && { gradient, copy: empty(own.shape, own) };
      });
      return { own, before: present(fetched.slice(0, owner)), after: present(fetched.slice(owner)) };
    });
    copyBetween(
      arriving.flatMap(({ before, after }) =>
        [...before, ...after].map(({ copy, gradient }) => [copy, gradient] as const),
      ),
    );
    for (const { own, before, after } of arriving) {
      const [first, ...rest] = before.map(({ copy }) => copy);
      for (const next of rest) first.device.add(first, first, next);
      // A sum of two does not depend on which comes first.
      if (first) addGrad(own, first);
      for (const { copy } of after) addGrad(own, copy);
    }
  });
}

const present = <T>(values: readonly (T | undefined)[]): T[] => values.filter((value) => value !== undefined);

/** @throws UserError where GPUs would have nothing to do */
export function requirePasses(
  { name, train, batch_size, gradient_accumulation_steps: passes }: Run,
  gpus: number,
): void {
  if (passes >= gpus) return;
  if (train.fused_backward_pass)
    throw new UserError(
      `an update of ${name} is one pass, as train.fused_backward_pass is set, and ${gpus} GPUs take passes in turn; name one GPU, or leave that out`,
    );
  throw new UserError(
    `an update of ${name} has ${passes} ${passes === 1 ? 'pass' : 'passes'} of batch_size ${batch_size}, fewer than the ${gpus} GPUs that take them in turn; set gradient_accumulation_steps to ${gpus} or a multiple of it`,
  );
}
