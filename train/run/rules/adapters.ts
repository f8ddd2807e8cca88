// What a run may not say together of adapters (`lora`): each kind has keys of its own.
import { UserError } from '../../../io/errors.ts';
import type { Run } from '../run.ts';
import { usual } from './owners.ts';

/** @throws UserError for what the kind of adapter does not have; `where` names the file */
export function refuseAdapters({ train: { target }, lora }: Run, where: string): void {
  if (target !== 'lora') return;
  const { algo, factor, network_weights } = lora;
  for (const key of ['factor', 'decompose_both'] as const)
    if (lora[key] !== usual.lora[key] && algo !== 'lokr')
      throw new UserError(
        `${where}: "lora.${key}" is of LoKr, and "lora.algo" is "${algo}"; leave it out, or set "lora.algo" to "lokr"`,
      );
  refuseOfOft(lora, where);
  if (lora.alpha === 0)
    throw new UserError(
      `${where}: "lora.alpha" is 0, which takes adapters times 0, so nothing would be trained; kohya's 0 means the rank: set lora.alpha to ${lora.rank}`,
    );
  if (factor === 0)
    throw new UserError(
      `${where}: "lora.factor" is 0, by which nothing is divided; set it to -1 for two factors near each other, or to one such as 8`,
    );
  if (algo === 'lora') return;
  if (lora.network_dropout)
    throw new UserError(
      `${where}: "lora.network_dropout" drops what is behind the A of a LoRA, and "lora.algo" "${algo}" has none; leave it out, or set "lora.module_dropout"`,
    );
  if (lora.use_dora)
    throw new UserError(
      `${where}: "lora.use_dora" is of LoRA, and "lora.algo" is "${algo}", which LyCORIS trains with other lengths and another gradient; leave it out`,
    );
  if (lora.loraplus_lr_ratio !== 1)
    throw new UserError(
      `${where}: "lora.loraplus_lr_ratio" is of the B of a LoRA, and "lora.algo" "${algo}" has none; leave it out`,
    );
  if (network_weights)
    throw new UserError(
      `${where}: "lora.network_weights" goes on with a plain LoRA, and "lora.algo" is "${algo}"; leave it out`,
    );
}

/** What only OFT has, and what it has not: it scales no product, and what is left of a rotation is none. */
function refuseOfOft(lora: Run['lora'], where: string): void {
  const { algo } = lora;
  if (lora.rescaled && algo !== 'oft')
    throw new UserError(
      `${where}: "lora.rescaled" is of OFT, and "lora.algo" is "${algo}"; leave it out, or set "lora.algo" to "oft"`,
    );
  if (algo !== 'oft') return;
  for (const key of ['alpha', 'conv_alpha'] as const)
    if (lora[key] !== usual.lora[key])
      throw new UserError(
        `${where}: "lora.${key}" is what a difference is multiplied by, and OFT turns weights; leave it out (${usual.lora[key]})`,
      );
  if (lora.rank_dropout)
    throw new UserError(
      `${where}: "lora.rank_dropout" would drop numbers of rotations, and "lora.algo" is "oft"; leave it out, or set "lora.module_dropout"`,
    );
}
