// A run file's value as the run that will be trained: defaults filled in, `--set` applied, and what it may say key by key but not
// together refused in a sentence before any work is begun.
import { UserError } from '../io/errors.ts';
import { mostChunks } from '../models/conditioning.ts';
import { fill, override } from './fields.ts';
import { refuseOfMethods } from './method_rules.ts';
import { refuseLines } from './preview_prompts.ts';
import { refuseSeeing } from './resolve_seeing.ts';
import { fields, followsImages, type Run } from './run.ts';

/** Fills in the defaults, then applies `--set` assignments. @throws UserError for an unknown key or an unfit value */
export function resolveRun(
  given: unknown,
  where: string,
  name: string,
  assignments: readonly string[] = [],
): Run {
  const run = fill(fields, given, where);
  for (const assignment of assignments) override(fields, run, assignment);
  run.name ||= name;
  if (!run.output && !/^[^/\\]+$/.test(run.name.replace(/^\.+$/, '')))
    throw new UserError(
      `${where}: "name" is "${run.name}", which names no folder in runs/; give a plain name, or say with "output" where the run goes`,
    );
  run.output ||= `runs/${run.name}`;
  refuseUnfit(run, where);
  const { dataset } = run;
  if (conditioned(run))
    dataset.conditioning_image_column ||= dataset.original_image_column || 'conditioning_image';
  if (run.train.method === 'dpo') dataset.rejected_image_column ||= 'rejected';
  mostChunks(run.dataset.max_token_length, `${where}: "dataset.max_token_length"`); // refuses what is no multiple of a chunk
  return run;
}

/** @throws UserError for what does not go together; `where` names the file */
function refuseUnfit(run: Run, where: string): void {
  refuseUNet(run, where);
  refuseUnused(run, where);
  refuseOfMethods(run, where);
  refuseOfOtherKinds(run, where);
  refuseSeeing(run, where);
  refuseConditions(run, where);
  refuseToken(run, where);
  refuseImagePrompts(run, where);
  refuseLines(run.previews, where);
  refuseNothing(run, where);
  refuseRates(run, where);
  refuseFused(run, where);
}

/** Values under which no update would change a weight. */
function refuseNothing({ train: { target }, lora, objective, vae_objective }: Run, where: string): void {
  if (target === 'vae' && Object.values(vae_objective).every((weight) => weight === 0))
    throw new UserError(
      `${where}: "vae_objective" has only weights of 0, so nothing would be trained; give l1, mse or kl a weight above 0`,
    );
  if (target === 'lora' && lora.alpha === 0)
    throw new UserError(
      `${where}: "lora.alpha" is 0, which takes adapters times 0, so nothing would be trained; kohya's 0 means the rank: set lora.alpha to ${lora.rank}`,
    );
  if (target !== 'vae' && objective.loss === 'huber' && objective.huber_delta === 0)
    throw new UserError(
      `${where}: "objective.huber_delta" is 0, which makes the loss 0, so nothing would be trained; give it a value such as 0.1`,
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
  if (train.text_encoders && text_encoder_lr && text_encoder_lr !== lr)
    throw new UserError(
      `${where}: "optimizer.text_encoder_lr" is ${text_encoder_lr}, and Prodigy has one learning rate for all weights; leave it out`,
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

/** What only adapters have; where they are not asked for, these do nothing. */
export const ofAdapters = [
  'algo',
  'conv_rank',
  'conv_alpha',
  'factor',
  'decompose_both',
  'use_dora',
  'rescaled',
  'network_dropout',
  'rank_dropout',
  'module_dropout',
  'loraplus_lr_ratio',
  'scale_weight_norms',
] as const;

const { lora: usual, textual_inversion: noToken, ip_adapter: noIPAdapter } = fill(fields, {}, 'the defaults');

/** What a kind of adapter does not have. */
function refuseOfOtherKinds({ lora }: Run, where: string): void {
  const { algo, factor, network_weights } = lora;
  for (const key of ['factor', 'decompose_both'] as const)
    if (lora[key] !== usual[key] && algo !== 'lokr')
      throw new UserError(
        `${where}: "lora.${key}" is of LoKr, and "lora.algo" is "${algo}"; leave it out, or set "lora.algo" to "lokr"`,
      );
  refuseOfOft(lora, where);
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
    if (lora[key] !== usual[key])
      throw new UserError(
        `${where}: "lora.${key}" is what a difference is multiplied by, and OFT turns weights; leave it out (${usual[key]})`,
      );
  if (lora.rank_dropout)
    throw new UserError(
      `${where}: "lora.rank_dropout" would drop numbers of rotations, and "lora.algo" is "oft"; leave it out, or set "lora.module_dropout"`,
    );
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

/** What a run asks for that its target would pass over. */
function refuseUnused(
  { train: { target, parts, text_encoders, q8, gradient_checkpointing }, lora, optimizer, dataset }: Run,
  where: string,
): void {
  if (q8 && (target === 'unet' || target === 'vae'))
    throw new UserError(
      `${where}: "train.q8" keeps a UNet in 8-bit integers that is not trained, for the targets "lora", "controlnet", "t2i_adapter", "ip_adapter" and "textual_inversion", and "train.target" is "${target}"; leave it out`,
    );
  if (q8 && !gradient_checkpointing)
    throw new UserError(
      `${where}: "train.q8" takes more memory, not less, where every layer's weight is kept for its gradient; set "train.gradient_checkpointing" too, or leave it out`,
    );
  if (lora.network_weights && target !== 'lora')
    throw new UserError(
      `${where}: "lora.network_weights" is what adapters begin with, and target "${target}" trains none; leave it out, or set "train.target" to "lora"`,
    );
  for (const key of ofAdapters)
    if (lora[key] !== usual[key] && target !== 'lora')
      throw new UserError(
        `${where}: "lora.${key}" is of adapters, and target "${target}" trains none; leave it out, or set "train.target" to "lora"`,
      );
  if (parts.length > 0 && target !== 'unet')
    throw new UserError(
      `${where}: "train.parts" are the UNet's own weights, which target "${target}" does not train; ${
        target === 'lora' ? 'choose layers with "lora.targets"' : 'leave it out'
      }`,
    );
  const trainsUNet = target === 'unet' || target === 'lora';
  if (text_encoders && !trainsUNet)
    throw new UserError(
      `${where}: "train.text_encoders" trains the encoders beside the UNet, which target "${target}" does not; leave it out`,
    );
  if (optimizer.moments_dtype !== 'float32' && optimizer.name !== 'adamw')
    throw new UserError(
      `${where}: "optimizer.moments_dtype" is for AdamW's moments, and "optimizer.name" is "${optimizer.name}"; leave it out, or set "optimizer.name" to "adamw"`,
    );
  if (optimizer.text_encoder_lr && !text_encoders)
    throw new UserError(
      `${where}: "optimizer.text_encoder_lr" is the text encoders' learning rate, and they are not trained; set "train.text_encoders", or leave it out`,
    );
  if (optimizer.text_encoder_lr && optimizer.lr === 0)
    throw new UserError(
      `${where}: "optimizer.lr" is 0, of which "optimizer.text_encoder_lr" is kept as a multiple, so nothing would be trained; give lr a small value`,
    );
  refuseBlockRates(optimizer, trainsUNet, text_encoders, where);
  if (dataset.class_data_dir && !trainsUNet)
    throw new UserError(
      `${where}: "dataset.class_data_dir" has pictures for the UNet to keep in mind, which target "${target}" does not train; leave it out`,
    );
  if (dataset.class_prompt && !dataset.class_data_dir)
    throw new UserError(
      `${where}: "dataset.class_prompt" says what pictures in "dataset.class_data_dir" are, and there is none; name it too`,
    );
}

/** Learning rates of blocks where there are none that are trained. */
function refuseBlockRates(
  { block_lr, lr }: Run['optimizer'],
  trainsUNet: boolean,
  trainsTexts: boolean,
  where: string,
): void {
  if (block_lr.length === 0) return;
  if (!trainsUNet)
    throw new UserError(
      `${where}: "optimizer.block_lr" has learning rates of the UNet's blocks, for the targets "unet" and "lora"; leave it out`,
    );
  if (lr === 0)
    throw new UserError(
      `${where}: "optimizer.lr" is 0, of which "optimizer.block_lr" are kept as multiples, so nothing would be trained; give lr a small value`,
    );
  if (!trainsTexts && block_lr.every((rate) => rate === 0))
    throw new UserError(
      `${where}: "optimizer.block_lr" has only rates of 0, so nothing would be trained; give some blocks a rate such as "optimizer.lr"`,
    );
}

/** What is amiss with the token of a textual inversion, or meant for one where none is trained. */
function refuseToken({ train: { target }, textual_inversion, dataset }: Run, where: string): void {
  const { placeholder_token: token, initializer_token, learnable_property, weights } = textual_inversion;
  if (target !== 'textual_inversion') {
    const given = givenIn(textual_inversion, noToken);
    if (!given) return;
    throw new UserError(
      `${where}: "textual_inversion.${given}" is of a token's vectors, which target "${target}" does not train; leave it out, or set "train.target" to "textual_inversion"`,
    );
  }
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

/** The first key of a group that is not as by default. */
const givenIn = <G extends object>(group: G, usual: G): string | undefined =>
  Object.entries(group).find(([key, value]) => value !== usual[key as keyof G])?.[0];

/** What is amiss with an IP-Adapter, or meant for one where none is trained. */
function refuseImagePrompts({ train: { target }, ip_adapter }: Run, where: string): void {
  const { image_encoder_path, image_projection, pretrained_ip_adapter_path: path } = ip_adapter;
  if (target !== 'ip_adapter') {
    const given = givenIn(ip_adapter, noIPAdapter);
    if (!given) return;
    throw new UserError(
      `${where}: "ip_adapter.${given}" is for an IP-Adapter, which target "${target}" does not train; leave it out, or set "train.target" to "ip_adapter"`,
    );
  }
  if (!image_encoder_path && !path)
    throw new UserError(
      `${where}: "ip_adapter.image_encoder_path" is empty; name the vision encoder by which pictures are seen, such as "h94/IP-Adapter/models/image_encoder", or one to go on with in "ip_adapter.pretrained_ip_adapter_path"`,
    );
  const own = [
    image_encoder_path && 'image_encoder_path',
    image_projection !== noIPAdapter.image_projection && 'image_projection',
  ].find((key) => key);
  if (path && own)
    throw new UserError(
      `${where}: "ip_adapter.${own}" is for a new IP-Adapter, and the one of "ip_adapter.pretrained_ip_adapter_path" has its own; leave out one of them`,
    );
}

/** Gradients that are gone at once can be neither added to nor looked at together. */
function refuseFused({ train, optimizer, gradient_accumulation_steps }: Run, where: string): void {
  if (!train.fused_backward_pass) return;
  if (optimizer.name === 'prodigy')
    throw new UserError(
      `${where}: "train.fused_backward_pass" moves weights one after the other, and Prodigy all by one number that hangs on every gradient; leave it out, or take another "optimizer.name"`,
    );
  if (gradient_accumulation_steps > 1)
    throw new UserError(
      `${where}: "train.fused_backward_pass" keeps no gradients that "gradient_accumulation_steps" ${gradient_accumulation_steps} could be added to; set that to 1, or leave it out`,
    );
}

/** Whether each picture has an image beside it. */
const conditioned = (run: Run): boolean =>
  run.train.target === 'controlnet' ||
  run.train.target === 't2i_adapter' ||
  run.inpainting.mask_mode === 'conditioning_image' ||
  run.dataset.original_image_column !== '' ||
  (run.objective.masked_loss && !run.dataset.alpha_mask);

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

/** What is amiss with conditioning images, or meant for a ControlNet or T2I-Adapter where none is trained. */
function refuseConditions(run: Run, where: string): void {
  const { dataset, controlnet, t2i_adapter, previews, objective } = run;
  const { target } = run.train;
  const { validation_image: images } = previews;
  if (objective.masked_loss && (followsImages(run) || target === 'vae'))
    throw new UserError(
      `${where}: "objective.masked_loss" is for the targets "unet", "lora" and "textual_inversion", and "train.target" is "${target}"; leave it out`,
    );
  refuseAlphaMask(run, where);
  if (dataset.conditioning_image_column && !conditioned(run))
    throw new UserError(
      `${where}: "dataset.conditioning_image_column" has images for a ControlNet or T2I-Adapter, which target "${target}" does not train, masks for "inpainting.mask_mode", which is not "conditioning_image", or masks for "objective.masked_loss", which is off; leave it out`,
    );
  for (const [key, value, of] of [
    ['controlnet.controlnet_model_name_or_path', controlnet.controlnet_model_name_or_path, 'controlnet'],
    ['controlnet.transformer_layers_per_block', controlnet.transformer_layers_per_block, 'controlnet'],
    ['t2i_adapter.adapter_model_name_or_path', t2i_adapter.adapter_model_name_or_path, 't2i_adapter'],
  ] as const)
    if (value.length > 0 && target !== of)
      throw new UserError(
        `${where}: "${key}" is for a ${of === 'controlnet' ? 'ControlNet' : 'T2I-Adapter'}, which target "${target}" does not train; leave it out, or set "train.target" to "${of}"`,
      );
  const edits = dataset.original_image_column !== '';
  if (images.length > 0 && !followsImages(run) && !run.inpainting.mask_mode && !edits)
    throw new UserError(
      `${where}: "previews.validation_image" is for what is trained to follow images, or for an inpainting or InstructPix2Pix model, and the run trains none; leave it out, or set "train.target" to "controlnet", "t2i_adapter" or "ip_adapter", or "inpainting.mask_mode" or "dataset.original_image_column"`,
    );
  if (!followsImages(run)) {
    if (images.length > 0 || edits) refuseCounts(previews, where);
    return;
  }
  if (controlnet.controlnet_model_name_or_path && controlnet.transformer_layers_per_block.length > 0)
    throw new UserError(
      `${where}: "controlnet.transformer_layers_per_block" is for a new ControlNet, and the one of "controlnet.controlnet_model_name_or_path" has its own; leave out one of them`,
    );
  refuseCounts(previews, where);
}

/** Previews that are not as many as what they are over. */
function refuseCounts({ prompts, validation_image }: Run['previews'], where: string): void {
  const [texts, pictures] = [prompts.length, validation_image.length];
  if (texts > 0 !== pictures > 0 || (texts !== pictures && texts > 1 && pictures > 1))
    throw new UserError(
      `${where}: "previews.prompts" has ${texts} and "previews.validation_image" ${pictures}, the pictures that previews follow or begin with; give one to each prompt, or one of either for all`,
    );
}
