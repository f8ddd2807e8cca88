// What a run makes of its pictures (`train.method`): what a pass is given beside captions and sizes, and the loss over it. Plain
// diffusion teaches the network its own target. Other methods ask networks, too: a teacher that stays as the model was loaded,
// or is another one (teacher.ts), or the student itself off the tape.
import type { Tensors } from '../../engine/op.ts';
import { sizeOf, type Tensor } from '../../engine/tensor.ts';
import type { Conditioning } from '../../models/unet/transformer.ts';
import {
  diffusionLoss,
  type LatentBatch,
  type Network,
  noiseBatch,
  noisedInputs,
  type Objective,
} from '../objective/objective.ts';
import type { PassInputs } from '../objective/pass_inputs.ts';
import { hasThreshold } from '../objective/pseudo_huber.ts';
import type { Run } from '../run/run.ts';

/** What a loss may ask, on the device of its pass. What is not asked costs nothing. */
export interface LossContext {
  /** The network that is trained. A tape may have it once: with `train.fused_backward_pass` a weight's gradient comes whole. */
  student: Network;
  /** The model as it was loaded, without adapters, off the tape: for methods that have it in `asks`. */
  teacher: Network;
  /**
   * The student off the tape, with nothing dropped; the moving average of its weights, where the method has that in `asks` and the run
   * keeps one.
   */
  target: Network;
  /** Captions and sizes. */
  conditioning: Conditioning;
  /** The model's own without a caption, of the same sizes: for methods that have it in `asks`. */
  unconditional: Conditioning;
}

export interface Method {
  asks: { teacher?: boolean; average?: boolean; unconditional?: boolean };
  /** Everything random is drawn here, keyed by the run's seed and the batch's epoch and ids. Of `timesteps` there is one for each image. */
  inputs(batch: LatentBatch): PassInputs;
  /** Inputs of the shapes that latents [n, h, w, c] have, without their numbers. */
  blank(shape: readonly number[]): PassInputs;
  /** The mean loss of a batch, [1] float32, on the tape. By ops alone, the same ones for the same shapes of inputs. */
  loss(context: LossContext, inputs: Tensors): Tensor;
}

/** @throws UserError for what does not go together, or with the model */
export type MakeMethod = (run: Run, objective: Objective) => Method;

/** The network's own target: noise or velocity (objective.ts). */
export const plainDiffusion: MakeMethod = ({ seed, dtype }, objective) => ({
  asks: {},
  inputs: (batch) => noisedInputs(noiseBatch(objective, batch, seed), dtype),
  blank(shape) {
    const nothing = new Float32Array(sizeOf(shape));
    const timesteps = new Float32Array(shape[0]);
    const huber_c = hasThreshold(objective.settings) ? timesteps : undefined;
    return noisedInputs({ shape, sample: nothing, timesteps, target: nothing, huber_c }, dtype);
  },
  loss: ({ student, conditioning }, inputs) => diffusionLoss(student, objective, inputs, conditioning),
});
