// A run told before it starts: what was resolved, and what it will take. Printed by `sdxl plan` and before every training.
import type { Device } from '../engine/device.ts';
import { standInFor } from '../engine/profile.ts';
import { bytesPerElement } from '../io/dtype.ts';
import { objectiveOf } from './objective.ts';
import { foretell, type Materials } from './session.ts';

/** The plan in lines, with the memory that it takes on `devices`. */
export function describe(materials: Materials, devices?: readonly Device[]): string[] {
  const { run, pictures, updatesPerEpoch, total, source } = materials;
  const effective = run.batch_size * run.gradient_accumulation_steps;
  const { trained, all, bytes } = foretell(materials, devices?.map(standInFor));
  const counts = pictures.buckets.map((_, i) => pictures.bucketOf.filter((b) => b === i).length);
  const buckets = pictures.buckets.flatMap(([h, w], i) => (counts[i] ? [`${w}x${h} (${counts[i]})`] : []));
  const epochs = (total / updatesPerEpoch).toFixed(total % updatesPerEpoch ? 1 : 0);
  return [
    `run         ${run.name}, into ${run.output}`,
    `model       ${source.path}${run.vae ? `, VAE ${run.vae}` : ''}, ${run.dtype}`,
    `images      ${pictures.samples.length} from ${run.dataset.path}`,
    `buckets     ${buckets.join(', ')}`,
    `batch       ${effective} (${run.batch_size} x ${run.gradient_accumulation_steps} accumulated)`,
    `updates     ${total}: ${updatesPerEpoch} an epoch, ${epochs} epochs`,
    `trained     ${run.train.target}${run.train.text_encoders ? ' and text encoders' : ''}: ${count(trained)} of ${count(all)} parameters`,
    ...(run.train.target === 'vae' ? [] : [`objective   ${objective(materials)}`]),
    `optimizer   ${run.optimizer.name}, lr ${run.optimizer.lr} ${run.lr_scheduler.name}, weight decay ${run.optimizer.weight_decay}, clip ${run.optimizer.max_grad_norm || 'off'}${run.ema.decay ? `, EMA ${run.ema.decay}` : ''}`,
    ...(bytes.length > 1 ? [`gpus        ${bytes.length}, ${dealing(materials, trained)}`] : []),
    `memory      ${memory(bytes)}, estimated${there(devices)}`,
  ];
}

/** How GPUs share an update, and what that takes between them. */
function dealing({ run, pictures }: Materials, trained: number): string {
  const most = Math.min(run.batch_size * run.gradient_accumulation_steps, pictures.samples.length);
  const passes = Math.ceil(most / run.batch_size);
  const megabytes = ((trained * bytesPerElement[run.dtype]) / 1e6).toFixed(1);
  return `for an update's ${passes} passes in turn; each but the first then sends ${megabytes} MB of gradients and is sent as much of weights`;
}

/** What is taken of the first GPU, and of the others, which have the same to do. */
function memory([first, ...further]: readonly number[]): string {
  const most = `${gib(first)} at the most`;
  return further.length ? `${most} on the first GPU, ${gib(Math.max(...further))} on each other` : most;
}

/** What the network predicts, which the model's scheduler may decide, and the loss of it. */
function objective({ run, source }: Materials): string {
  const { prediction_type, loss } = objectiveOf(run.objective, source.config('scheduler')).settings;
  return `${prediction_type}, ${loss}`;
}

/** What the devices have of it, where they tell. */
function there(devices: readonly Device[] = []): string {
  const told = devices.flatMap(({ name, driver }) => {
    const room = name === 'stand-in' ? undefined : driver.room?.();
    return room ? [`${gib(room.free)} are free on ${name}`] : [];
  });
  return told.length ? `; ${told.join(', ')}` : '';
}

const gib = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(2)} GiB`;

const count = (n: number): string =>
  n >= 1e9 ? `${(n / 1e9).toFixed(2)} B` : n >= 1e6 ? `${(n / 1e6).toFixed(2)} M` : `${n}`;
