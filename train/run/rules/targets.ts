// What a run may not say together of what it trains.
import { UserError } from '../../../io/errors.ts';
import type { Run } from '../run.ts';
import { usual } from './owners.ts';

/** @throws UserError for what its target has no use for, or lacks; `where` names the file */
export function refuseTargets(run: Run, where: string): void {
  const { target, parts, text_encoders, q8, gradient_checkpointing } = run.train;
  if (q8 && (target === 'unet' || target === 'vae'))
    throw new UserError(
      `${where}: "train.q8" keeps a UNet in 8-bit integers that is not trained, for the targets "lora", "controlnet", "t2i_adapter", "ip_adapter" and "textual_inversion", and "train.target" is "${target}"; leave it out`,
    );
  if (q8 && !gradient_checkpointing)
    throw new UserError(
      `${where}: "train.q8" takes more memory, not less, where every layer's weight is kept for its gradient; set "train.gradient_checkpointing" too, or leave it out`,
    );
  if (parts.length > 0 && target !== 'unet')
    throw new UserError(
      `${where}: "train.parts" are the UNet's own weights, which target "${target}" does not train; ${
        target === 'lora' ? 'choose layers with "lora.targets"' : 'leave it out'
      }`,
    );
  if (text_encoders && target !== 'unet' && target !== 'lora')
    throw new UserError(
      `${where}: "train.text_encoders" trains the encoders beside the UNet, which target "${target}" does not; leave it out`,
    );
  refuseUNet(run, where);
  refuseNothing(run, where);
  if (target === 'controlnet') refuseControlNet(run, where);
  if (target === 'textual_inversion') refuseToken(run, where);
  if (target === 'ip_adapter') refuseImagePrompts(run, where);
}

/** A UNet that has no model to be put into, or no part in what is trained. */
function refuseUNet({ model, unet, train: { target } }: Run, where: string): void {
  if (!unet) return;
  if (typeof model !== 'string')
    throw new UserError(
      `${where}: "unet" stands in a model's place for its own, and "model" is a preset of random weights; leave it out`,
    );
  if (target === 'vae') throw new UserError(`${where}: "unet" has no part in target "vae"; leave it out`);
}

/** Values under which no update would change a weight. */
function refuseNothing({ train: { target }, objective, vae_objective }: Run, where: string): void {
  if (target === 'vae' && Object.values(vae_objective).every((weight) => weight === 0))
    throw new UserError(
      `${where}: "vae_objective" has only weights of 0, so nothing would be trained; give l1, mse or kl a weight above 0`,
    );
  if (target !== 'vae' && objective.loss === 'huber' && objective.huber_delta === 0)
    throw new UserError(
      `${where}: "objective.huber_delta" is 0, which makes the loss 0, so nothing would be trained; give it a value such as 0.1`,
    );
}

/** What is amiss with a ControlNet. */
function refuseControlNet({ controlnet }: Run, where: string): void {
  const { controlnet_model_name_or_path: path, transformer_layers_per_block: depths } = controlnet;
  const { network_dim, cond_emb_dim } = controlnet;
  const own =
    depths.length > 0 ? 'transformer_layers_per_block' : network_dim > 0 ? 'network_dim' : undefined;
  if (path && own)
    throw new UserError(
      `${where}: "controlnet.${own}" is for a new ControlNet, and the one of "controlnet.controlnet_model_name_or_path" has its own; leave out one of them`,
    );
  if (network_dim > 0 && depths.length > 0)
    throw new UserError(
      `${where}: "controlnet.network_dim" makes a ControlNet-LLLite, which has no transformer blocks for "controlnet.transformer_layers_per_block"; leave out one of them`,
    );
  if (network_dim === 0 && cond_emb_dim !== usual.controlnet.cond_emb_dim)
    throw new UserError(
      `${where}: "controlnet.cond_emb_dim" is for a new ControlNet-LLLite, which "controlnet.network_dim" makes; set that too (64), or leave it out`,
    );
}

/** What is amiss with the token of a textual inversion. */
function refuseToken({ textual_inversion, dataset }: Run, where: string): void {
  const { placeholder_token: token, initializer_token, learnable_property, weights } = textual_inversion;
  if (token === '')
    throw new UserError(
      `${where}: "textual_inversion.placeholder_token" is empty; name what is learnt as captions and prompts call it, such as "<cat-toy>"`,
    );
  if (!/^[^\s./\\][^/\\\n\0]*(?<!\s)$/.test(token) || Buffer.byteLength(token) > 200)
    throw new UserError(
      `${where}: "textual_inversion.placeholder_token" is ${JSON.stringify(token)}, and a file is named by it; give a word such as "<cat-toy>", without a slash, a dot before it or spaces around it`,
    );
  if ((initializer_token === '') === (weights === ''))
    throw new UserError(
      weights
        ? `${where}: "textual_inversion.initializer_token" and "textual_inversion.weights" both say what the token begins as; leave out one of them`
        : `${where}: "textual_inversion.initializer_token" is empty; name a word that is near what is learnt, such as "toy", or a file to go on with in "textual_inversion.weights"`,
    );
  if (learnable_property && dataset.instance_prompt)
    throw new UserError(
      `${where}: "textual_inversion.learnable_property" takes templates for all captions, and "dataset.instance_prompt" is one; leave out one of them`,
    );
}

/** What is amiss with an IP-Adapter. */
function refuseImagePrompts({ ip_adapter }: Run, where: string): void {
  const { image_encoder_path, image_projection, pretrained_ip_adapter_path: path } = ip_adapter;
  if (!image_encoder_path && !path)
    throw new UserError(
      `${where}: "ip_adapter.image_encoder_path" is empty; name the vision encoder by which pictures are seen, such as "h94/IP-Adapter/models/image_encoder", or one to go on with in "ip_adapter.pretrained_ip_adapter_path"`,
    );
  const own = [
    image_encoder_path && 'image_encoder_path',
    image_projection !== usual.ip_adapter.image_projection && 'image_projection',
  ].find((key) => key);
  if (path && own)
    throw new UserError(
      `${where}: "ip_adapter.${own}" is for a new IP-Adapter, and the one of "ip_adapter.pretrained_ip_adapter_path" has its own; leave out one of them`,
    );
}
