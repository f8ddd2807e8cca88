// What a method's loss asks in a pass, on the device of that: networks under what the run gives them beside (controls/), and texts.
import { withDrop } from '../../engine/dropout.ts';
import { noGrad } from '../../engine/grad.ts';
import type { Tensors } from '../../engine/op.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import type { Conditioning } from '../../models/unet/transformer.ts';
import type { UNet } from '../../models/unet/unet.ts';
import type { Control } from '../controls/control.ts';
import type { LossContext } from '../methods/method.ts';
import type { Network } from '../objective/objective.ts';
import { releaseTwin } from '../parts/twin.ts';
import { fromAside, type Texts } from './texts.ts';

/** What a pass runs through. */
export interface Side {
  model: Pipeline;
  teacher?: UNet;
}

/** `averaged` makes a twin with the moving averages, where the method asks them, or gives the model itself. */
export function lossContext(
  { model, teacher }: Side,
  inputs: Tensors,
  control: Control,
  encoded: Texts['encoded'],
  averaged: () => Pipeline,
): LossContext {
  const told = (given: Tensors): Conditioning => {
    const { context, pooled } = encoded(model, given);
    return { context, textEmbeds: pooled, timeIds: inputs.timeIds };
  };
  const target: Network = (...asked) => {
    const other = averaged();
    try {
      return noGrad(() => withDrop(undefined, () => control.network(other, inputs)(...asked)));
    } finally {
      releaseTwin(other, model);
    }
  };
  return {
    student: control.network(model, inputs),
    teacher: (...asked) => noGrad(() => (teacher as UNet)(...asked)),
    target,
    conditioning: told(inputs),
    get unconditional() {
      return told(fromAside(inputs));
    },
  };
}
