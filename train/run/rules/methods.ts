// What a run may not say together with its method.
import { UserError } from '../../../io/errors.ts';
import type { Run } from '../run.ts';
import { given, usual } from './owners.ts';

/** What of `objective` every method has: what the model predicts, and what pictures weigh. */
const ofAllMethods = ['prediction_type', 'zero_terminal_snr', 'prior_loss_weight'];

type Method = Run['train']['method'];

/** Whether a method has no use for a key of `objective`. */
const isUnused: Record<Method, (key: string) => boolean> = {
  diffusion: () => false,
  distillation: (key) => key === 'masked_loss',
  dpo: (key) => /^(loss|huber_delta|masked_loss)$/.test(key),
  esd: () => false,
  lcm: (key) => !ofAllMethods.includes(key),
};

/** @throws UserError for what a method does not train, or has no use for; `where` names the file */
export function refuseOfMethods(run: Run, where: string): void {
  const { train, lcm } = run;
  const { method, target } = train;
  if (method === 'diffusion') return;
  if (method === 'distillation') refuseOfStudents(run, where);
  if (target !== 'unet' && target !== 'lora')
    throw new UserError(
      `${where}: "train.method" "${method}" is for the targets "unet" and "lora", and "train.target" is "${target}"; leave it out`,
    );
  if (train.text_encoders)
    throw new UserError(
      `${where}: "train.text_encoders" is of the method "diffusion", and "train.method" is "${method}", whose teacher and student read the same text; leave it out`,
    );
  const seen = [
    run.inpainting.mask_mode && 'inpainting.mask_mode',
    run.dataset.original_image_column && 'dataset.original_image_column',
  ].find((key) => key);
  if (seen)
    throw new UserError(
      `${where}: "${seen}" is of models that see more than latents, which the method "diffusion" trains, and "train.method" is "${method}"; leave it out`,
    );
  const other = given(run, 'objective').find(isUnused[method]);
  if (other)
    throw new UserError(
      `${where}: "objective.${other}" is of the method "diffusion", and "train.method" is "${method}"; leave it out`,
    );
  const { unet_time_cond_proj_dim: dim } = lcm;
  if (dim !== usual.lcm.unet_time_cond_proj_dim && target !== 'unet')
    throw new UserError(
      `${where}: "lcm.unet_time_cond_proj_dim" is of a UNet that is distilled whole, and "train.target" is "${target}"; leave it out`,
    );
  if (dim % 2 === 1 || dim === 2)
    throw new UserError(
      `${where}: "lcm.unet_time_cond_proj_dim" is ${dim}, and sines and cosines come in pairs, more than one; give an even number such as 256, or 0`,
    );
  if (lcm.w_min > lcm.w_max)
    throw new UserError(
      `${where}: "lcm.w_min" is ${lcm.w_min} and "lcm.w_max" ${lcm.w_max}; write the smaller first`,
    );
  if (method === 'dpo') refuseOfPairs(run, where);
}

/** What makes no teacher and student. */
function refuseOfStudents({ train: { target }, model, distillation }: Run, where: string): void {
  const { pretrained_teacher_model, output_weight, feature_weight } = distillation;
  if (target !== 'unet')
    throw new UserError(
      `${where}: "train.method" "distillation" makes a smaller UNet, and "train.target" is "${target}"; set "train.target" to "unet"`,
    );
  if (pretrained_teacher_model === '')
    throw new UserError(
      `${where}: "distillation.pretrained_teacher_model" is empty; name the model whose UNet is the teacher, such as "stabilityai/stable-diffusion-xl-base-1.0"`,
    );
  if (typeof model !== 'string')
    throw new UserError(
      `${where}: "model" is a preset, whose random text encoders the teacher of "distillation.pretrained_teacher_model" knows nothing of; name a model with the teacher's, and perhaps with "unet" a smaller UNet`,
    );
  if (output_weight === 0 && feature_weight === 0)
    throw new UserError(
      `${where}: "distillation.output_weight" and "distillation.feature_weight" are 0, so the teacher would teach nothing; give one of them a value such as 0.5`,
    );
}

/** What pairs of pictures cannot be used for. */
function refuseOfPairs({ dataset, dpo }: Run, where: string): void {
  if (dpo.beta_dpo === 0)
    throw new UserError(
      `${where}: "dpo.beta_dpo" is 0, which takes every pair times 0, so nothing would be trained; give it a value such as ${usual.dpo.beta_dpo}`,
    );
  if (dataset.class_data_dir)
    throw new UserError(
      `${where}: "dataset.class_data_dir" has no part in "train.method" "dpo", which learns from pairs of pictures; leave it out`,
    );
}

/** Whether a loss asks the moving averages: the target of a UNet that is distilled whole. */
export const asksAverages = ({ train, ema }: Run): boolean =>
  train.method === 'lcm' && train.target === 'unet' && ema.decay > 0;

/** @throws UserError where several GPUs would have to ask them: each holds those of its own weights */
export function requireAverages(run: Run, gpus: number): void {
  if (gpus === 1 || !asksAverages(run)) return;
  throw new UserError(
    `train.method "${run.train.method}" of ${run.name} asks the moving averages of ema.decay ${run.ema.decay}, which several GPUs share among them; name one GPU, or set ema.decay to 0`,
  );
}
