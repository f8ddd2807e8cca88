// Updates whose gradients are never all there (kohya's fused_backward_pass; LOMO, Lv et al. 2023): weights move while backward still
// walks towards the input, and their gradients go. Clipping wants the norm of all before any weight moves, so the pass is then made
// twice: first for loss and norm, and again, from the same inputs, to move. Such an update has the bits of one that keeps its gradients.
import type { Device } from '../../engine/device.ts';
import { backward, handOver } from '../../engine/grad.ts';
import type { Parameter } from '../../engine/module.ts';
import { keep, scope } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';
import type { PassInputs } from '../objective/pass_inputs.ts';
import { type Clipping, type Gradients, openNorms } from '../optimizers/clip.ts';
import { place } from './pass.ts';
import type { Task } from './task.ts';

/** What an update is made of. */
export interface Fused {
  task: Pick<Task, 'loss'>;
  parameters: ReadonlyMap<string, Parameter>;
  device: Device;
}

/** What a pass there and back has told. */
export interface Walked extends Clipping {
  loss: number;
}

/** Gradients that wait to be used: enough for each launch to be of many parameters, and of a small model a part of all too. */
const PART_BYTES = 2 ** 26;
const PARTS = 32;

/** The loss and the norm of its gradients, of which none is kept. */
export function measure(fused: Fused, inputs: PassInputs, maxNorm: number): Walked {
  const norms = openNorms(fused.parameters);
  try {
    const loss = walk(fused, inputs, norms.add);
    return { loss, ...norms.read(maxNorm) };
  } finally {
    norms.release();
  }
}

/**
 * Has `move` move the weights by the gradients of a pass, part after part, and gives the loss. Where `checked`, each part is looked at
 * before: from one that is not finite on no weight is moved, and its first bad parameter is named.
 */
export function moveThrough(
  fused: Fused,
  inputs: PassInputs,
  move: (part: Gradients) => void,
  checked = false,
): Walked {
  const norms = openNorms(fused.parameters);
  let bad = false;
  try {
    const loss = walk(fused, inputs, (part) => {
      norms.add(part);
      bad ||= checked && norms.read(0).nonfinite !== undefined;
      if (!bad) move(part);
    });
    return { loss, ...norms.read(0) };
  } finally {
    norms.release();
  }
}

/** A pass there and back, which hands its gradients to `use`, each parameter's once. The loss. */
function walk(
  { task, parameters, device }: Fused,
  inputs: PassInputs,
  use: (part: Gradients) => void,
): number {
  const all = [...parameters.values()].reduce((sum, { tensor }) => sum + tensor.byteLength, 0);
  const enough = Math.min(PART_BYTES, all / PARTS);
  const seen = new Set<string>();
  let waiting = new Map<string, Tensor>();
  let bytes = 0;
  const useUp = () => {
    const part = waiting;
    [waiting, bytes] = [new Map(), 0];
    try {
      use(part);
    } finally {
      for (const gradient of part.values()) gradient.release();
    }
  };
  for (const [name, { tensor }] of parameters)
    handOver(tensor, (gradient) => {
      if (seen.has(name)) throw new Error(`${name} is used twice in a pass, so its gradient comes in parts`);
      seen.add(name);
      waiting.set(name, keep(gradient.handle(tensor.shape)));
      bytes += gradient.byteLength;
      if (bytes >= enough) useUp();
    });
  try {
    return scope(() => {
      const loss = task.loss(place(inputs, device));
      backward(loss);
      useUp();
      return loss.floats()[0];
    });
  } finally {
    for (const gradient of waiting.values()) gradient.release();
    for (const { tensor } of parameters.values()) handOver(tensor);
  }
}
