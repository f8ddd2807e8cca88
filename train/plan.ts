// What a run comes to, before it starts: the resolved keys, and what it will take. Printed by `sdxl plan` and before every training.
import type { Device } from '../engine/device.ts';
import { standInFor } from '../engine/profile.ts';
import { gib } from '../io/byte_sizes.ts';
import { bytesPerElement } from '../io/dtype.ts';
import { type Materials, mostPasses } from './materials.ts';
import { objectiveOf } from './objective/objective.ts';
import { blockRatesInWords } from './parts/rates.ts';
import { estimate } from './rehearsal.ts';
import { given } from './run/rules/owners.ts';
import { type Run, trainsEdits } from './run/run.ts';

/** What a run comes to. */
export interface Plan {
  run: Run;
  /** Where the model lies. */
  model: string;
  images: number;
  /** Of these, those that have fewer pixels than they are trained at. */
  enlarged: number;
  /** Pictures for prior preservation, which are not among them. */
  class_images: number;
  /** Pictures of each size, of those sizes that have any. */
  buckets: { width: number; height: number; images: number }[];
  /** Pictures in an update. */
  effective_batch_size: number;
  /** The most that one can have: pictures of several sizes share none. */
  passes_per_update: number;
  updates: number;
  updates_per_epoch: number;
  /** What the network predicts, which the model's scheduler may decide; undefined where a VAE is trained. */
  prediction_type?: string;
  trained_parameters: number;
  /** All those of the networks that have some trained: of adapters theirs alone. */
  parameters: number;
  /** The most that preparation, an update, validation or previews take, by device; estimated. */
  memory_bytes: number[];
}

/** Opens the run on stand-ins for `devices`, so as to know what it takes of their memory. */
export function planOf(materials: Materials, devices?: readonly Device[]): Plan {
  const { run, pictures, updatesPerEpoch, total, source } = materials;
  const { trained, all, bytes } = estimate(materials, devices?.map(standInFor));
  const own = pictures.samples.flatMap(({ prior }, i) => (prior ? [] : [i]));
  const counts = pictures.buckets.map((_, i) => pictures.bucketOf.filter((b) => b === i).length);
  return {
    run,
    model: source.path,
    images: own.length,
    enlarged: own.filter((i) => isEnlarged(pictures, i)).length,
    class_images: pictures.samples.length - own.length,
    buckets: pictures.buckets.flatMap(([height, width], i) =>
      counts[i] ? [{ width, height, images: counts[i] }] : [],
    ),
    effective_batch_size: run.batch_size * run.gradient_accumulation_steps,
    passes_per_update: mostPasses(materials),
    updates: total,
    updates_per_epoch: updatesPerEpoch,
    prediction_type:
      run.train.target === 'vae'
        ? undefined
        : objectiveOf(run.objective, source.config('scheduler')).settings.prediction_type,
    trained_parameters: trained,
    parameters: all,
    memory_bytes: bytes,
  };
}

function isEnlarged({ samples, buckets, bucketOf }: Materials['pictures'], i: number): boolean {
  const [height, width] = buckets[bucketOf[i]];
  return height > samples[i].size[0] || width > samples[i].size[1];
}

/** The plan in lines, with what `devices` have of the memory. */
export function describe(plan: Plan, devices?: readonly Device[]): string[] {
  const { run, updates, updates_per_epoch, memory_bytes } = plan;
  const buckets = plan.buckets.map(({ width, height, images }) => `${width}x${height} (${images})`);
  const count = (updates / updates_per_epoch).toFixed(updates % updates_per_epoch ? 1 : 0);
  const epochs = count === '1' ? '1 epoch' : `${count} epochs`;
  return [
    `run         ${run.name}, into ${run.output}`,
    `model       ${plan.model}${run.unet ? `, UNet ${run.unet}` : ''}${ofTeacher(run)}${run.vae ? `, VAE ${run.vae}` : ''}, ${run.dtype}`,
    `images      ${plan.images} from ${run.dataset.path}${ofSizes(plan)}${ofClass(plan)}`,
    `buckets     ${buckets.join(', ')}`,
    `batch       ${plan.effective_batch_size} (${run.batch_size} x ${run.gradient_accumulation_steps} accumulated)`,
    `updates     ${updates}: ${updates_per_epoch} an epoch, ${epochs}`,
    `trained     ${run.train.target}${ofLora(run)}${ofToken(run)}${ofSeeing(run)}${run.train.text_encoders ? ' and text encoders' : ''}: ${counted(plan)}`,
    ...(plan.prediction_type
      ? [`objective   ${[plan.prediction_type, ...ofMethod(run), ...furtherOf(run, 'objective')].join(', ')}`]
      : []),
    `optimizer   ${run.optimizer.name}${ofMoments(run)}, lr ${run.optimizer.lr}${blockRatesInWords(run)}${ofTexts(run)} ${run.lr_scheduler.name}, weight decay ${run.optimizer.weight_decay}, clip ${run.optimizer.max_grad_norm || 'off'}${run.ema.decay ? `, EMA ${run.ema.decay}` : ''}`,
    `checkpoints ${ofCheckpoints(run)}`,
    ...(memory_bytes.length > 1 ? [`gpus        ${memory_bytes.length}, ${dealing(plan)}`] : []),
    `memory      ${memory(memory_bytes)}, estimated${there(devices)}`,
  ];
}

/** How many pictures come out softer than they are, as those that are too small do. */
const ofSizes = ({ enlarged }: Plan): string => (enlarged ? `, ${enlarged} of them enlarged` : '');

/** The pictures for prior preservation, where there are any. */
const ofClass = ({ class_images, run: { dataset, objective } }: Plan): string =>
  class_images
    ? `, ${class_images} of the class from ${dataset.class_data_dir} (loss times ${objective.prior_loss_weight})`
    : '';

const ofTeacher = ({ distillation: { pretrained_teacher_model, student_weight_from_teacher } }: Run) =>
  pretrained_teacher_model
    ? `, teacher ${pretrained_teacher_model}${student_weight_from_teacher ? ', whose weights it begins with' : ''}`
    : '';

/** The loss, and what it is of where it is not the plain one. */
function ofMethod({ train, objective, distillation, dpo, esd, lcm }: Run): string[] {
  if (train.method === 'diffusion') return [objective.loss];
  const { output_weight, feature_weight, distill_level } = distillation;
  if (train.method === 'distillation')
    return [
      ...[train.method, objective.loss, `output_weight ${output_weight}`],
      `feature_weight ${feature_weight} by ${distill_level}`,
    ];
  if (train.method === 'dpo') return [train.method, `beta_dpo ${dpo.beta_dpo}`];
  if (train.method === 'esd')
    return [train.method, objective.loss, `negative_guidance ${esd.negative_guidance}`];
  const { w_min, w_max, num_ddim_timesteps, loss_type } = lcm;
  return [train.method, loss_type, `w ${w_min} to ${w_max}`, `${num_ddim_timesteps} DDIM timesteps`];
}

/** How often they are written, and that older ones go. */
const ofCheckpoints = ({ checkpoints: { every_steps, keep } }: Run): string =>
  `every ${every_steps ? `${every_steps} updates` : 'epoch'}, the newest ${keep === 1 ? 'one' : keep} kept`;

/** Keys that are told otherwise, or not at all. */
const toldElsewhere = {
  objective: /^(prediction_type|loss|prior_loss_weight)$/,
  lora: /^(algo|rank|alpha|conv_.*|targets|text_encoder_targets|network_weights)$/,
};

/** What else of a group is not as by default. */
const furtherOf = (run: Run, group: keyof typeof toldElsewhere): string[] =>
  given(run, group)
    .filter((key) => !toldElsewhere[group].test(key))
    .map((key) => {
      const value = (run[group] as Readonly<Record<string, unknown>>)[key];
      return value === true ? key : `${key} ${value}`;
    });

function ofLora(run: Run): string {
  const { train, lora } = run;
  if (train.target !== 'lora') return '';
  const { algo, rank, alpha, conv_rank, conv_alpha, network_weights } = lora;
  const kind = algo === 'lora' ? [] : [algo];
  // An OFT has no alpha.
  const sizes = (r: number, a: number) => (algo === 'oft' ? `rank ${r}` : `rank ${r}, alpha ${a}`);
  const larger =
    conv_rank || conv_alpha
      ? [`convolutions larger than 1x1 ${sizes(conv_rank || rank, conv_alpha || alpha)}`]
      : [];
  const begun = network_weights ? [`from ${network_weights}`] : [];
  return ` (${[...kind, sizes(rank, alpha), ...larger, ...furtherOf(run, 'lora'), ...begun].join(', ')})`;
}

function ofSeeing(run: Run): string {
  const { mask_mode, full_mask_rate } = run.inpainting;
  if (trainsEdits(run)) return ', an InstructPix2Pix model';
  if (!mask_mode) return '';
  return `, an inpainting model (${mask_mode} masks${full_mask_rate ? `, ${full_mask_rate} of them whole` : ''})`;
}

function ofToken({ train, textual_inversion }: Run): string {
  if (train.target !== 'textual_inversion') return '';
  const { placeholder_token, num_vectors, initializer_token, weights, learnable_property } =
    textual_inversion;
  const templates = learnable_property ? `, templates of ${learnable_property}` : '';
  const vectors = `${num_vectors} ${num_vectors === 1 ? 'vector' : 'vectors'}`;
  return ` ("${placeholder_token}", ${vectors} from ${weights || `"${initializer_token}"`}${templates})`;
}

/** The type of its moments, where it is another. */
const ofMoments = ({ optimizer: { moments_dtype } }: Run): string =>
  moments_dtype === 'float32' ? '' : ` (moments in ${moments_dtype})`;

/** The text encoders' learning rate, where it is another. */
const ofTexts = ({ train, optimizer: { text_encoder_lr } }: Run): string =>
  train.text_encoders && text_encoder_lr
    ? ` (text encoders ${[text_encoder_lr]
        .flat()
        .map((rate) => rate || 'frozen')
        .join(' and ')})`
    : '';

/** How GPUs share an update, and what that takes between them: each sends all but its own share of gradients. */
function dealing({ run, buckets, passes_per_update, trained_parameters, memory_bytes }: Plan): string {
  const bytes = trained_parameters * bytesPerElement[run.dtype] * (1 - 1 / memory_bytes.length);
  const passes = `${buckets.length > 1 ? 'up to ' : ''}${passes_per_update} passes`;
  return `for an update's ${passes} in turn; each then sends ${(bytes / 1e6).toFixed(1)} MB of gradients and as much of weights`;
}

/** What is taken of the first GPU, which has the whole model, and of the others. */
function memory([first, ...further]: readonly number[]): string {
  const most = `${gib(first)} at the most`;
  return further.length ? `${most} on the first GPU, ${gib(Math.max(...further))} on each other` : most;
}

/** What the devices have of it, where they tell. */
function there(devices: readonly Device[] = []): string {
  const told = devices.flatMap(({ name, driver }) => {
    const room = name === 'stand-in' ? undefined : driver.room?.();
    return room ? [`${gib(room.free)} are free on ${name}`] : [];
  });
  return told.length ? `; ${told.join(', ')}` : '';
}

/** Of how many parameters those are that are trained, where they are not all. */
const counted = ({ trained_parameters: trained, parameters: all }: Plan): string =>
  `${count(trained)}${trained < all ? ` of ${count(all)}` : ''} parameters`;

const count = (n: number): string =>
  n >= 1e9 ? `${(n / 1e9).toFixed(2)} B` : n >= 1e6 ? `${(n / 1e6).toFixed(2)} M` : `${n}`;
