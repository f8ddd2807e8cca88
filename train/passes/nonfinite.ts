// Finding where NaN or infinity first appeared: the trained weights, then the pass run again with every op's output looked
// at. Slow, and only done when a loss was not finite.
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { scope } from '../../engine/scope.ts';
import { LocatedError, type Tensor } from '../../engine/tensor.ts';
import { isFloat } from '../../io/dtype.ts';
import type { PassInputs } from '../objective/pass_inputs.ts';
import { place } from './pass.ts';
import { type Task, trainedParameters } from './task.ts';

/** Names the first tensor of the pass that is not finite. */
export function firstBadTensor(task: Task, inputs: PassInputs, device: Device): string {
  for (const [name, { tensor }] of trainedParameters(task.components))
    if (!allFinite(tensor)) return `the weight ${name}`;
  const { execute, together } = device;
  // Launches that are held back would be looked at before they ran.
  device.together = (fn) => fn();
  device.execute = (record, direction, tensors, attrs) => {
    execute(record, direction, tensors, attrs);
    const inputBad = Object.entries(tensors).find(([name, t]) => !outputs.test(name) && !allFinite(t));
    if (inputBad) throw new LocatedError(`the input ${inputBad[0]} of ${record.name}`);
    const outputBad = Object.entries(tensors).find(([, t]) => !allFinite(t));
    if (outputBad) throw new LocatedError(`the output of ${record.name}`);
  };
  try {
    noGrad(() => scope(() => void task.loss(place(inputs, device))));
    return 'the loss itself';
  } catch (error) {
    if (error instanceof LocatedError) return error.message.replace(/\s+/g, ' ');
    throw error;
  } finally {
    device.execute = execute;
    device.together = together;
  }
}

/** Names of what a forward op writes. */
const outputs = /^(y|mean|rstd|lse)$/;

const allFinite = (t: Tensor): boolean => !isFloat(t.dtype) || t.floats().every(Number.isFinite);
