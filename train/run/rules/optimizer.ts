// What a run may not say together of its optimizer and learning rates.
import { UserError } from '../../../io/errors.ts';
import type { Run } from '../run.ts';
import { usual } from './owners.ts';

/** @throws UserError for rates, moments or gradients that nothing would be made of; `where` names the file */
export function refuseOptimizer(run: Run, where: string): void {
  const { train, optimizer } = run;
  if (optimizer.moments_dtype !== 'float32' && optimizer.name !== 'adamw')
    throw new UserError(
      `${where}: "optimizer.moments_dtype" is for AdamW's moments, and "optimizer.name" is "${optimizer.name}"; leave it out, or set "optimizer.name" to "adamw"`,
    );
  const ofTexts = [optimizer.text_encoder_lr].flat();
  if (ofTexts.length > 1 && ofTexts.every((rate) => rate === 0))
    throw new UserError(
      `${where}: "optimizer.text_encoder_lr" is 0 for both text encoders, so neither would be trained; set "train.text_encoders" to false instead`,
    );
  if (optimizer.text_encoder_lr && !train.text_encoders)
    throw new UserError(
      `${where}: "optimizer.text_encoder_lr" is the text encoders' learning rate, and they are not trained; set "train.text_encoders", or leave it out`,
    );
  if (optimizer.text_encoder_lr && optimizer.lr === 0)
    throw new UserError(
      `${where}: "optimizer.lr" is 0, of which "optimizer.text_encoder_lr" is kept as a multiple, so nothing would be trained; give lr a small value`,
    );
  if (optimizer.eps === 0 && /^adamw/.test(optimizer.name))
    throw new UserError(
      `${where}: "optimizer.eps" is 0, by which a weight without a gradient, as A of a LoRA at first, is moved by 0/0 to NaN; leave it out, or set it to a small value such as ${usual.optimizer.eps}`,
    );
  if (optimizer.clip_threshold === 0 && optimizer.name === 'adafactor')
    throw new UserError(
      `${where}: "optimizer.clip_threshold" is 0, the most that an update may be, so nothing would be trained; leave it out`,
    );
  refuseSchedule(run, where);
  refuseBlockRates(run, where);
  refuseRates(run, where);
  refuseScheduleFree(run, where);
  refuseFused(run, where);
}

/** Which schedules follow a key, the one to set first. */
const followers = [
  ['warmup_steps', ['constant_with_warmup', 'linear', 'cosine', 'cosine_with_restarts', 'polynomial']],
  ['num_cycles', ['cosine_with_restarts']],
  ['power', ['polynomial']],
  ['step_rules', ['piecewise_constant']],
] as const;

type Schedule = Run['lr_scheduler'];

/** The keys that say something which a schedule does not follow, with the one to set first. */
const unfollowed = (given: Schedule) =>
  followers.filter(
    ([key, names]) => given[key] !== usual.lr_scheduler[key] && !names.some((name) => name === given.name),
  );

/** A schedule without what it does not follow, which earlier programs passed over, so that checkpoints may have it. */
export const followed = (given: Schedule): Schedule => ({
  ...given,
  ...Object.fromEntries(unfollowed(given).map(([key]) => [key, usual.lr_scheduler[key]])),
});

/** What the schedule does not follow: the rate would be another than the run says. */
function refuseSchedule({ lr_scheduler: given }: Run, where: string): void {
  for (const [key, names] of unfollowed(given))
    throw new UserError(
      `${where}: "lr_scheduler.${key}" is ${JSON.stringify(given[key])}, which "lr_scheduler.name" "${given.name}" does not follow; set that to "${names[0]}", or leave it out`,
    );
}

/** Learning rates of blocks where there are none that are trained. */
function refuseBlockRates({ train, optimizer: { block_lr, lr } }: Run, where: string): void {
  if (block_lr.length === 0) return;
  if (train.target !== 'unet' && train.target !== 'lora')
    throw new UserError(
      `${where}: "optimizer.block_lr" has learning rates of the UNet's blocks, for the targets "unet" and "lora"; leave it out`,
    );
  if (lr === 0)
    throw new UserError(
      `${where}: "optimizer.lr" is 0, of which "optimizer.block_lr" are kept as multiples, so nothing would be trained; give lr a small value`,
    );
  if (!train.text_encoders && block_lr.every((rate) => rate === 0))
    throw new UserError(
      `${where}: "optimizer.block_lr" has only rates of 0, so nothing would be trained; give some blocks a rate such as "optimizer.lr"`,
    );
}

/** Prodigy finds its own learning rate: below this, what is multiplied by it is surely another optimizer's. */
const LEAST_MULTIPLE = 0.01;

/** What Prodigy could not find its learning rate with. */
function refuseRates({ optimizer, train, lora }: Run, where: string): void {
  if (optimizer.name !== 'prodigy') return;
  const { lr, text_encoder_lr, block_lr, d0, d_coef, growth_rate } = optimizer;
  if (lr < LEAST_MULTIPLE)
    throw new UserError(
      `${where}: "optimizer.lr" is ${lr}, and Prodigy takes the learning rate that it finds times that, so nothing would be learnt; set it to 1`,
    );
  const ofTexts = [text_encoder_lr].flat().find((rate) => rate !== 0 && rate !== lr);
  if (train.text_encoders && ofTexts !== undefined)
    throw new UserError(
      `${where}: "optimizer.text_encoder_lr" is ${ofTexts}, and Prodigy has one learning rate for all weights; leave it out`,
    );
  const other = block_lr.find((rate) => rate !== 0 && rate !== lr);
  if (other !== undefined)
    throw new UserError(
      `${where}: "optimizer.block_lr" has ${other} beside "optimizer.lr" ${lr}, and Prodigy has one learning rate for all weights; give each block that or 0`,
    );
  if (train.target === 'lora' && lora.loraplus_lr_ratio !== 1)
    throw new UserError(
      `${where}: "lora.loraplus_lr_ratio" is ${lora.loraplus_lr_ratio}, and Prodigy has one learning rate for all weights; leave it out`,
    );
  for (const [key, value] of Object.entries({ d0, d_coef, eps: optimizer.eps }))
    if (value === 0)
      throw new UserError(
        `${where}: "optimizer.${key}" is 0, with which Prodigy finds no learning rate; leave it out`,
      );
  if (growth_rate > 0 && growth_rate < 1)
    throw new UserError(
      `${where}: "optimizer.growth_rate" is ${growth_rate}, under which Prodigy's learning rate would shrink; give it a number above 1 such as 1.02, or 0 for no bound`,
    );
}

/** What Schedule-Free AdamW does itself, or cannot have done to the three points that it goes by. */
function refuseScheduleFree({ optimizer, lr_scheduler: { name }, ema, lora }: Run, where: string): void {
  if (optimizer.name !== 'adamw_schedule_free') return;
  if (name !== 'constant' && name !== 'constant_with_warmup')
    throw new UserError(
      `${where}: "lr_scheduler.name" "${name}" changes the learning rate as it goes, in whose place Schedule-Free AdamW has its mean of the weights; set it to "constant" or "constant_with_warmup"`,
    );
  if (ema.decay > 0)
    throw new UserError(
      `${where}: "ema.decay" keeps a moving average, and Schedule-Free AdamW draws and saves a mean of its own; leave it out`,
    );
  if (optimizer.stochastic_rounding)
    throw new UserError(
      `${where}: "optimizer.stochastic_rounding" is in the place of float32 masters, and Schedule-Free AdamW keeps none; leave it out`,
    );
  if (lora.scale_weight_norms > 0)
    throw new UserError(
      `${where}: "lora.scale_weight_norms" shrinks weights behind an update, which Schedule-Free AdamW makes anew of other points; leave it out, or take another "optimizer.name"`,
    );
}

/** Gradients that are gone at once can be neither added to nor looked at together. */
function refuseFused({ train, optimizer, gradient_accumulation_steps }: Run, where: string): void {
  if (!train.fused_backward_pass) return;
  if (optimizer.name === 'prodigy')
    throw new UserError(
      `${where}: "train.fused_backward_pass" moves weights one after the other, and Prodigy all by one number that hangs on every gradient; leave it out, or take another "optimizer.name"`,
    );
  if (optimizer.name === 'adamw_schedule_free')
    throw new UserError(
      `${where}: "train.fused_backward_pass" moves weights one after the other, and Schedule-Free AdamW moves all at once; leave it out, or take another "optimizer.name"`,
    );
  if (gradient_accumulation_steps > 1)
    throw new UserError(
      `${where}: "train.fused_backward_pass" keeps no gradients that "gradient_accumulation_steps" ${gradient_accumulation_steps} could be added to; set that to 1, or leave it out`,
    );
}
