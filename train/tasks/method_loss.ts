// The loss of the UNet's passes by the run's method (methods/): over the model itself, over a twin with averages in place of what is trained,
// over copies on other devices; and over a twin without numbers, by which a dropout learns what there is to drop.
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { unload } from '../../engine/module.ts';
import type { Tensors } from '../../engine/op.ts';
import { standInDevice } from '../../engine/profile.ts';
import { scope } from '../../engine/scope.ts';
import { empty, type Tensor } from '../../engine/tensor.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import type { Control } from '../controls/control.ts';
import type { Method } from '../methods/method.ts';
import type { Teacher } from '../methods/teacher.ts';
import type { PassInputs } from '../objective/pass_inputs.ts';
import { type Dropout, dropoutOf } from '../parts/dropout.ts';
import { releaseTwin, twinPipeline } from '../parts/twin.ts';
import { place } from '../passes/pass.ts';
import { copied, lent, type Replica, type Substitute, type Task, type Weights } from '../passes/task.ts';
import type { Run } from '../run/run.ts';
import { lossContext, type Side } from './loss_context.ts';
import { aside, blankEmbeddings, fromEmbeddings, type Texts } from './texts.ts';
import type { TrainedParts } from './trained_parts.ts';

interface Makers {
  run: Run;
  parts: TrainedParts;
  method: Method;
  teacher?: Teacher;
  control: Control;
  texts: Texts;
}

interface MethodLoss {
  task: Pick<Task, 'loss' | 'follow' | 'replicate'>;
  dropout: Dropout;
  /** The model with other weights in what is trained, for releaseTwin() when done; the model itself where there are none. */
  averaged(weights: Weights): Pipeline;
}

export function methodLoss({ run, parts, method, teacher, control, texts }: Makers): MethodLoss {
  const { pipeline, networks, added } = parts;
  let averages: Weights;
  const twinOf = (substitute: Substitute) => twinPipeline(run, pipeline, networks, added, substitute);
  const averaged = (weights: Weights): Pipeline => (weights ? twinOf(lent(weights)).other : pipeline);
  const lossOf = (side: Side, inputs: Tensors, encoded: Texts['encoded']): Tensor => {
    const followed = () => (side.model === pipeline ? averaged(averages) : side.model);
    return dropout.during(inputs, () =>
      method.loss(lossContext(side, inputs, control, encoded, followed), inputs),
    );
  };
  /** A twin, with a teacher of its own on its device. */
  const replicaOf = (substitute: Substitute, device: Device, encoded = texts.encoded): Replica => {
    const { other: model, weights } = twinOf(substitute);
    const own = teacher?.beside(weights, device);
    return {
      weights,
      loss: (inputs) => lossOf({ model, teacher: own }, inputs, encoded),
      release() {
        if (own) unload(own);
        releaseTwin(model, pipeline);
      },
    };
  };
  const dropout = dropoutOf(run, (inputs) => passWithoutNumbers(run, parts, inputs, replicaOf));
  return {
    dropout,
    averaged,
    task: {
      loss(inputs, weights) {
        const model = averaged(weights);
        try {
          return lossOf({ model, teacher: teacher?.unet }, inputs, texts.encoded);
        } finally {
          releaseTwin(model, pipeline);
        }
      },
      ...(method.asks.average && { follow: (weights) => void (averages = weights) }),
      // Frozen models that are asked beforehand stay where they are: other devices get what these say.
      replicate: (further) => replicaOf(copied(further), further),
    },
  };
}

/** A pass on a stand-in device. Encoders that are not trained are on the model's own device alone, and have nothing to drop. */
function passWithoutNumbers(
  { train }: Run,
  { pipeline, networks }: TrainedParts,
  inputs: PassInputs,
  replicaOf: (...twin: [Substitute, Device, Texts['encoded'] | undefined]) => Replica,
): void {
  const device = standInDevice();
  const hollow: Substitute = (_, { shape, dtype }) => empty(shape, { device, dtype });
  const replica = replicaOf(hollow, device, train.text_encoders ? undefined : fromEmbeddings);
  const blank = blankEmbeddings(pipeline, networks, inputs.timesteps.shape[0]);
  const told = train.text_encoders ? inputs : { ...inputs, ...blank, ...aside(blank) };
  noGrad(() => scope(() => void replica.loss(place(told, device))));
  replica.release();
}
