// What a run may not say together of the images that its pictures have beside them, and that previews follow.
import { UserError } from '../../../io/errors.ts';
import { followsImages, type Run, trainsEdits } from '../run.ts';

/** Whether each picture has an image beside it. */
export const conditioned = (run: Run): boolean =>
  run.train.target === 'controlnet' ||
  run.train.target === 't2i_adapter' ||
  run.inpainting.mask_mode === 'conditioning_image' ||
  trainsEdits(run) ||
  (run.objective.masked_loss && !run.dataset.alpha_mask);

/** @throws UserError for images beside pictures, or under previews, that nothing would be made of; `where` names the file */
export function refuseImages(run: Run, where: string): void {
  const { dataset, previews, objective } = run;
  const { target } = run.train;
  const { validation_image: images } = previews;
  if (objective.masked_loss && (followsImages(run) || target === 'vae'))
    throw new UserError(
      `${where}: "objective.masked_loss" is for the targets "unet", "lora" and "textual_inversion", and "train.target" is "${target}"; leave it out`,
    );
  if (dataset.bucket_no_upscale && !dataset.aspect_ratio_buckets)
    throw new UserError(
      `${where}: "dataset.bucket_no_upscale" gives small pictures sizes of their own, and without "dataset.aspect_ratio_buckets" all have one; set that too, or leave it out`,
    );
  refuseClass(run, where);
  refuseAlphaMask(run, where);
  if (dataset.conditioning_image_column && !conditioned(run))
    throw new UserError(
      `${where}: "dataset.conditioning_image_column" has images for a ControlNet or T2I-Adapter, which target "${target}" does not train, masks for "inpainting.mask_mode", which is not "conditioning_image", or masks for "objective.masked_loss", which is off; leave it out`,
    );
  const edits = trainsEdits(run);
  if (images.length > 0 && !followsImages(run) && !run.inpainting.mask_mode && !edits)
    throw new UserError(
      `${where}: "previews.validation_image" is for what is trained to follow images, or for an inpainting or InstructPix2Pix model, and the run trains none; leave it out, or set "train.target" to "controlnet", "t2i_adapter" or "ip_adapter", or "inpainting.mask_mode" or "dataset.original_image_column"`,
    );
  if (images.length > 0 || edits || followsImages(run)) refuseCounts(previews, where);
}

/** Pictures for prior preservation where the UNet is not trained. */
function refuseClass({ train: { target }, dataset }: Run, where: string): void {
  if (dataset.class_data_dir && target !== 'unet' && target !== 'lora')
    throw new UserError(
      `${where}: "dataset.class_data_dir" has pictures for the UNet to keep in mind, which target "${target}" does not train; leave it out`,
    );
  if (dataset.class_prompt && !dataset.class_data_dir)
    throw new UserError(
      `${where}: "dataset.class_prompt" says what pictures in "dataset.class_data_dir" are, and there is none; name it too`,
    );
}

/** Alpha as a mask where no loss is weighed by one, or by another. */
function refuseAlphaMask(run: Run, where: string): void {
  const { dataset, objective, inpainting } = run;
  const { target } = run.train;
  if (!dataset.alpha_mask) return;
  if (followsImages(run) || target === 'vae')
    throw new UserError(
      `${where}: "dataset.alpha_mask" is for the targets "unet", "lora" and "textual_inversion", and "train.target" is "${target}"; leave it out`,
    );
  if (!objective.masked_loss)
    throw new UserError(
      `${where}: "dataset.alpha_mask" makes each picture's alpha the mask of "objective.masked_loss", which is off; set that to true too, or leave alpha_mask out`,
    );
  if (dataset.conditioning_image_column && inpainting.mask_mode !== 'conditioning_image')
    throw new UserError(
      `${where}: "dataset.alpha_mask" and "dataset.conditioning_image_column" each name a mask for every picture; leave out one of them`,
    );
}

/** Previews that are not as many as what they are over. */
function refuseCounts({ prompts, validation_image }: Run['previews'], where: string): void {
  const [texts, pictures] = [prompts.length, validation_image.length];
  if (texts > 0 !== pictures > 0 || (texts !== pictures && texts > 1 && pictures > 1))
    throw new UserError(
      `${where}: "previews.prompts" has ${texts} and "previews.validation_image" ${pictures}, the pictures that previews follow or begin with; give one to each prompt, or one of either for all`,
    );
}
