// What passes give the UNet beside noised latents, captions and sizes, by what a run trains: images to follow, pictures as prompts, what it
// sees beside the latents, or the mask of its loss. Each is a record of inputs, the network that they make, and what previews are given.
import type { Tensors } from '../../engine/op.ts';
import { UserError } from '../../io/errors.ts';
import type { Picture } from '../../io/pixels.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import type { Asked } from '../../models/request.ts';
import type { Size } from '../../models/text/conditioning.ts';
import type { Network } from '../objective/objective.ts';
import type { PassInputs } from '../objective/pass_inputs.ts';
import type { View } from '../pictures/cache.ts';
import type { Preview } from '../run/preview_prompts.ts';

/** What passes give the UNet beside what it is always given. */
export interface Control {
  inputs(views: readonly View[], epoch: number, signal?: AbortSignal): Promise<PassInputs>;
  /** Inputs of the shapes that `n` pictures of a size have, without their numbers. */
  blank(n: number, size: Size): PassInputs;
  /** The network that such inputs make of a model. */
  network(model: Pipeline, inputs: Tensors): Network;
  /** Whether a view is shown without its caption in an epoch, whatever dataset.caption_dropout_rate says. */
  isUnprompted?(view: View, epoch: number): boolean;
  /** What a preview is given for it, over one of previews.validation_image where there are any. */
  preview(preview: Preview, image?: Picture): Partial<Asked>;
}

export const uncontrolled: Control = {
  inputs: async () => ({}),
  blank: () => ({}),
  network: ({ unet }) => unet,
  preview: () => ({}),
};

/** @throws UserError for a refiner, beside which none of these is trained */
export function refuseRefiner({ aesthetic }: Pipeline, { path }: ModelSource, what: string): void {
  if (aesthetic)
    throw new UserError(
      `${path} is a refiner, which takes no ${what}; train one for the base model, with another "model"`,
    );
}
