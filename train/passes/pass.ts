// One pass: inputs to the device, the loss, and back. Where the device can record launches, a pass is recorded for each shape of
// inputs and replayed: a small model, or adapters on a large one, else take the host longer than the device. A replay adds to
// gradients where they lie, so they stay between updates and are cleared in place, which costs much where they are many.
import type { Step } from '../../engine/capture.ts';
import type { Device } from '../../engine/device.ts';
import { backward, clearGrad, noGrad, zeroGrad } from '../../engine/grad.ts';
import type { Parameter } from '../../engine/module.ts';
import type { Tensors } from '../../engine/op.ts';
import { scale } from '../../engine/ops/unary.ts';
import { built, scope, unscoped } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import type { HostTensor, PassInputs } from '../objective/pass_inputs.ts';
import type { Task } from './task.ts';

type Trained = Pick<Task, 'loss'>;

export interface Passes {
  /** Queues a pass, whose gradients weigh `share` and add up. Its loss [1], on its way: release it. */
  queue(inputs: PassInputs, share: number): Tensor;
  /** Forgets the gradients. */
  clear(): void;
  release(): void;
}

/** Bytes of gradients that are cleared and added to in some 1 ms, by 4.3 TB/s: less than recording saves. Not measured. */
const MOST_BYTES = 2 ** 30;

export function openPasses(
  task: Trained,
  parameters: ReadonlyMap<string, Parameter>,
  device: Device,
): Passes {
  const leaves = [...parameters.values()].map(({ tensor }) => tensor);
  const bytes = leaves.reduce((sum, { byteLength }) => sum + byteLength, 0);
  const records = device.driver.capture && bytes <= MOST_BYTES;
  return records ? recordedPasses(task, leaves, device) : eagerPasses(task, leaves, device);
}

/** Inputs on the device. */
export const place = (inputs: PassInputs, device: Device): Tensors =>
  mapped(inputs, ({ values, shape, dtype }) => tensor(values, shape, { device, dtype }));

function eagerPasses(task: Trained, leaves: readonly Tensor[], device: Device): Passes {
  const clear = () => {
    for (const leaf of leaves) clearGrad(leaf);
  };
  return {
    queue: (inputs, share) =>
      scope(() => forwardAndBack(task, place(inputs, device), tensor([share], [1], { device }))),
    clear,
    release: clear,
  };
}

interface Recording {
  inputs: Tensors;
  share: Tensor;
  step: Step;
}

function recordedPasses(task: Trained, leaves: readonly Tensor[], device: Device): Passes {
  const reserve = device.memory.openReserve();
  const recordings = new Map<string, Recording>();
  const clear = () => {
    for (const leaf of leaves) zeroGrad(leaf);
  };
  const start = (given: PassInputs): Recording =>
    built(() => {
      const inputs = unscoped(() => place(given, device));
      const share = unscoped(() => tensor([1], [1], { device }));
      return { inputs, share, step: device.step(() => forwardAndBack(task, inputs, share), reserve) };
    });
  return {
    queue(given, share) {
      if (recordings.size === 0) clear();
      const shapes = JSON.stringify(mapped(given, ({ shape }) => shape));
      const recording = recordings.get(shapes) ?? start(given);
      recordings.set(shapes, recording);
      for (const [name, { values }] of Object.entries(given)) recording.inputs[name].set(values);
      recording.share.set([share]);
      // The next replay writes its loss over this one.
      return recording.step.run((loss) => noGrad(() => scale(loss, 1)));
    },
    clear,
    release() {
      for (const { inputs, share, step } of recordings.values()) {
        step.release();
        for (const t of [share, ...Object.values(inputs)]) t.release();
      }
      reserve.release();
      for (const leaf of leaves) clearGrad(leaf);
    },
  };
}

function forwardAndBack(task: Trained, inputs: Tensors, share: Tensor): Tensor {
  const loss = task.loss(inputs);
  backward(loss, share);
  return loss;
}

const mapped = <R>(inputs: PassInputs, fn: (input: HostTensor) => R): Record<string, R> =>
  Object.fromEntries(Object.entries(inputs).map(([name, input]) => [name, fn(input)]));
