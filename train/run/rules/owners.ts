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

interface Owned {
  group: Group;
  /** Which of its keys; all by default. */
  keys?: RegExp;
  /** What they are of, in words. */
  of: string;
  by: 'target' | 'method';
  owner: Run['train']['target'] | Run['train']['method'];
}

const owned: readonly Owned[] = [
  // What every adapter has may stay where none is trained: a run may be tried with and without.
  {
    ...{ group: 'lora', keys: /^(?!(rank|alpha|targets|text_encoder_targets)$)/ },
    ...{ of: 'adapters', by: 'target', owner: 'lora' },
  },
  { group: 'controlnet', of: 'a ControlNet', by: 'target', owner: 'controlnet' },
  { group: 't2i_adapter', of: 'a T2I-Adapter', by: 'target', owner: 't2i_adapter' },
  { group: 'ip_adapter', of: 'an IP-Adapter', by: 'target', owner: 'ip_adapter' },
  { group: 'textual_inversion', of: "a token's vectors", by: 'target', owner: 'textual_inversion' },
  { group: 'lcm', of: 'latent consistency distillation', by: 'method', owner: 'lcm' },
  { group: 'distillation', of: 'distillation into a smaller UNet', by: 'method', owner: 'distillation' },
  { group: 'dpo', of: 'Diffusion-DPO', by: 'method', owner: 'dpo' },
  {
    ...{ group: 'dataset', keys: /^(rejected_image|label)_column$/ },
    ...{ of: 'Diffusion-DPO', by: 'method', owner: 'dpo' },
  },
  { group: 'esd', of: 'ESD', by: 'method', owner: 'esd' },
];

/** @throws UserError for the first key that is another's; `where` names the file */
export function refuseForeign(run: Run, where: string): void {
  for (const { group, keys = /./, of, by, owner } of owned) {
    const own = run.train[by];
    const key = own === owner ? undefined : given(run, group).find((each) => keys.test(each));
    if (key)
      throw new UserError(
        `${where}: "${group}.${key}" is of ${of}, and "train.${by}" is "${own}"; leave it out, or set "train.${by}" to "${owner}"`,
      );
  }
}
