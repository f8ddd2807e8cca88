// What a run may not say together of models whose UNets see more than latents (controls/seeing.ts).
import { UserError } from '../../../io/errors.ts';
import type { Run } from '../run.ts';

/** @throws UserError for masks, or pictures before an edit, that nothing would be made of; `where` names the file */
export function refuseSeeing(run: Run, where: string): void {
  refuseInpainting(run, where);
  refuseEditing(run, where);
}

/** Masks for what paints nothing in. */
function refuseInpainting({ train: { target }, inpainting }: Run, where: string): void {
  const { mask_mode, full_mask_rate } = inpainting;
  if (mask_mode && target !== 'unet' && target !== 'lora')
    throw new UserError(
      `${where}: "inpainting.mask_mode" is of inpainting models, for the targets "unet" and "lora", and "train.target" is "${target}"; leave it out`,
    );
  const drawn = mask_mode && mask_mode !== 'conditioning_image';
  if (full_mask_rate && !drawn)
    throw new UserError(
      `${where}: "inpainting.full_mask_rate" is of masks that are drawn, and "inpainting.mask_mode" is "${mask_mode}"; leave it out, or set that to "random_mask"`,
    );
}

/** Pictures before an edit where none is learnt, or beside what has no place there. */
function refuseEditing({ train: { target }, dataset, inpainting, objective }: Run, where: string): void {
  if (!dataset.original_image_column) {
    if (dataset.conditioning_dropout_prob)
      throw new UserError(
        `${where}: "dataset.conditioning_dropout_prob" is of InstructPix2Pix models, which see what "dataset.original_image_column" names; set that too, or leave it out`,
      );
    return;
  }
  const whose = `${where}: "dataset.original_image_column" has what InstructPix2Pix models see`;
  if (target !== 'unet' && target !== 'lora')
    throw new UserError(
      `${whose}, for the targets "unet" and "lora", and "train.target" is "${target}"; leave it out`,
    );
  for (const [key, given] of [
    ['inpainting.mask_mode', inpainting.mask_mode !== ''],
    ['objective.masked_loss', objective.masked_loss && !dataset.alpha_mask],
    [
      'dataset.conditioning_image_column',
      !['', dataset.original_image_column].includes(dataset.conditioning_image_column),
    ],
    ['dataset.class_data_dir', dataset.class_data_dir !== ''],
  ] as const)
    if (given) throw new UserError(`${whose}, and "${key}" does not go with that; leave out one of them`);
}
