// A run told before it starts: what was resolved, and what it will take. Printed by `sdxl plan` and before every training.
import type { Device } from '../engine/device.ts';
import { standInFor } from '../engine/profile.ts';
import { objectiveOf } from './objective.ts';
import { foretell, type Materials } from './session.ts';

/** The plan in lines, with the memory that it takes on `device`. */
export function describe(materials: Materials, device?: Device): string[] {
  const { run, pictures, updatesPerEpoch, total, source } = materials;
  const effective = run.batch_size * run.gradient_accumulation_steps;
  const { trained, all, bytes } = foretell(materials, device && standInFor(device));
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
    `memory      ${(bytes / 2 ** 30).toFixed(2)} GiB at the most, estimated${there(device)}`,
  ];
}

/** What the network predicts, which the model's scheduler may decide, and the loss of it. */
function objective({ run, source }: Materials): string {
  const { prediction_type, loss } = objectiveOf(run.objective, source.config('scheduler')).settings;
  return `${prediction_type}, ${loss}`;
}

/** What the device has of it, where it tells. */
function there(device: Device | undefined): string {
  const room = device?.name === 'stand-in' ? undefined : device?.driver.room?.();
  return room ? `; ${(room.free / 2 ** 30).toFixed(2)} GiB are free on ${device?.name}` : '';
}

const count = (n: number): string =>
  n >= 1e9 ? `${(n / 1e9).toFixed(2)} B` : n >= 1e6 ? `${(n / 1e6).toFixed(2)} M` : `${n}`;
