// Keys of a run that are of one target or method alone: where another is trained they would do nothing, and are refused.
import { UserError } from '../../../io/errors.ts';
import { fill } from '../fields.ts';
import type { Run } from '../run.ts';
import { fields } from '../run_fields.ts';

/** A run that says nothing. */
export const usual = fill(fields, {}, 'the defaults');

type Group = {
  [K in keyof Run]: Run[K] extends string | number | readonly unknown[] ? never : K;
}[keyof Run];

/** The keys of a group that are not as by default. */
export const given = <G extends Group>(run: Run, group: G): (keyof Run[G] & string)[] =>
  (Object.keys(run[group]) as (keyof Run[G] & string)[]).filter(
    (key) => String(run[group][key]) !== String(usual[group][key]),
  );

/** Keys that say whose others are. */
const deciders = {
  'train.target': ({ train }: Run) => train.target,
  'train.method': ({ train }: Run) => train.method,
  'optimizer.name': ({ optimizer }: Run) => optimizer.name,
  'objective.loss': ({ objective }: Run) => objective.loss,
  'lcm.loss_type': ({ lcm }: Run) => lcm.loss_type,
};

type Decider = keyof typeof deciders;

interface Owned {
  group: Group;
  /** Which of its keys; all by default. */
  keys?: RegExp;
  /** What they are of, in words. */
  of: string;
  by: Decider;
  /** The values of `by` that they are for, the usual one first, or the one that has no use for them. */
  owner?: string | readonly string[];
  stranger?: string;
}

/** Keys of a group that are for one value of another key, or a few. */
const row = (
  group: Group,
  keys: RegExp | undefined,
  of: string,
  by: Decider,
  owner: Owned['owner'],
): Owned => ({ group, keys, of, by, owner });

// What every adapter has may stay where none is trained: a run may be tried with and without.
const ofAdapters = /^(?!(rank|alpha|targets|text_encoder_targets)$)/;
const ofThresholds = /^huber_(c|scale|schedule)$/;
const ofProdigy = /^(d_coef|d0|beta3|growth_rate|use_bias_correction|safeguard_warmup)$/;

const owned: readonly Owned[] = [
  row('lora', ofAdapters, 'adapters', 'train.target', 'lora'),
  row('controlnet', undefined, 'a ControlNet', 'train.target', 'controlnet'),
  row('t2i_adapter', undefined, 'a T2I-Adapter', 'train.target', 't2i_adapter'),
  row('ip_adapter', undefined, 'an IP-Adapter', 'train.target', 'ip_adapter'),
  row('textual_inversion', undefined, "a token's vectors", 'train.target', 'textual_inversion'),
  row('vae_objective', undefined, 'a VAE', 'train.target', 'vae'),
  // masked_loss is told by what it is for (images.ts).
  { group: 'objective', keys: /^(?!masked_loss$)/, of: 'a UNet', by: 'train.target', stranger: 'vae' },
  { group: 'train', keys: /^gradient_checkpointing$/, of: 'a UNet', by: 'train.target', stranger: 'vae' },
  row('lcm', undefined, 'latent consistency distillation', 'train.method', 'lcm'),
  row('distillation', undefined, 'distillation into a smaller UNet', 'train.method', 'distillation'),
  row('dpo', undefined, 'Diffusion-DPO', 'train.method', 'dpo'),
  row('dataset', /^(rejected_image|label)_column$/, 'Diffusion-DPO', 'train.method', 'dpo'),
  row('esd', undefined, 'ESD', 'train.method', 'esd'),
  row('objective', /^huber_delta$/, 'the Huber loss', 'objective.loss', 'huber'),
  row('objective', ofThresholds, 'the pseudo-Huber loss', 'objective.loss', ['pseudo_huber', 'smooth_l1']),
  row('lcm', /^huber_c$/, 'the pseudo-Huber loss', 'lcm.loss_type', 'huber'),
  // Moments' betas and eps may stay: most optimizers have them, and a run may be tried with one or another.
  row('optimizer', /^(clip_threshold|decay_rate)$/, 'Adafactor', 'optimizer.name', 'adafactor'),
  row('optimizer', ofProdigy, 'Prodigy', 'optimizer.name', 'prodigy'),
  row('optimizer', /^(r|weight_lr_power)$/, 'Schedule-Free AdamW', 'optimizer.name', 'adamw_schedule_free'),
];

/** What is another's in a run. */
const foreignTo = (run: Run): Owned[] =>
  owned.filter(({ by, owner, stranger }) => {
    const own = deciders[by](run);
    return owner === undefined ? own === stranger : ![owner].flat().includes(own);
  });

/** @throws UserError for the first key that is another's; `where` names the file */
export function refuseForeign(run: Run, where: string): void {
  for (const { group, keys = /./, of, by, owner } of foreignTo(run)) {
    const key = given(run, group).find((each) => keys.test(each));
    const mend =
      owner === undefined ? 'leave it out' : `leave it out, or set "${by}" to "${[owner].flat()[0]}"`;
    if (key)
      throw new UserError(
        `${where}: "${group}.${key}" is of ${of}, and "${by}" is "${deciders[by](run)}"; ${mend}`,
      );
  }
}

/** A run without what is another's, which earlier programs passed over, so that checkpoints may have it. */
export function withoutForeign(run: Run): Run {
  const own: Record<string, unknown> = { ...usual, ...run };
  for (const { group, keys = /./ } of foreignTo(own as unknown as Run))
    own[group] = Object.fromEntries(Object.entries(own[group] as object).filter(([key]) => !keys.test(key)));
  return own as unknown as Run;
}
