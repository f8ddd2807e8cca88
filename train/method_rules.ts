// What a run may not say of `train.method`: targets that it does not train, and keys that are another method's.
import { UserError } from '../io/errors.ts';
import { fill } from './fields.ts';
import { fields, type Run } from './run.ts';

const { lcm: noLcm, objective: plain } = fill(fields, {}, 'the defaults');

/** What of `objective` is not of the diffusion loss alone: what the model predicts, and what pictures weigh. */
const ofAllMethods = ['prediction_type', 'zero_terminal_snr', 'prior_loss_weight'];

/** The keys of a group that are not as by default. */
const given = <T extends object>(group: T, usual: T): string[] =>
  Object.keys(group).filter((key) => String(group[key as keyof T]) !== String(usual[key as keyof T]));

/** @throws UserError for what a method does not train, or what is of another; `where` names the file */
export function refuseOfMethods({ train, lcm, objective }: Run, where: string): void {
  const { method, target } = train;
  const [foreign] = method === 'lcm' ? [] : given(lcm, noLcm);
  if (foreign)
    throw new UserError(
      `${where}: "lcm.${foreign}" is of latent consistency distillation, and "train.method" is "${method}"; leave it out, or set "train.method" to "lcm"`,
    );
  if (method === 'diffusion') return;
  if (target !== 'unet' && target !== 'lora')
    throw new UserError(
      `${where}: "train.method" "${method}" is for the targets "unet" and "lora", and "train.target" is "${target}"; leave it out`,
    );
  if (train.text_encoders)
    throw new UserError(
      `${where}: "train.text_encoders" is of the method "diffusion", and "train.method" is "${method}", whose teacher and student read the same text; leave it out`,
    );
  const other = given(objective, plain).find((key) => !ofAllMethods.includes(key));
  if (other)
    throw new UserError(
      `${where}: "objective.${other}" is of the method "diffusion", and "train.method" is "${method}"; leave it out`,
    );
  if (lcm.w_min > lcm.w_max)
    throw new UserError(
      `${where}: "lcm.w_min" is ${lcm.w_min} and "lcm.w_max" ${lcm.w_max}; write the smaller first`,
    );
}
