// The loss on held-out draws: some pictures of the dataset with noise, timesteps and captions of an epoch that no run comes
// to, so that no update has seen them and every measurement sees the same ones. Unlike the loss of updates, whose timesteps
// change, it falls smoothly.
import { noGrad } from '../engine/grad.ts';
import { scope } from '../engine/scope.ts';
import type { MicroBatch } from './data/order.ts';
import { undropped } from './parts/dropout.ts';
import { place } from './passes/pass.ts';
import { spread } from './pictures/pictures.ts';
import type { Session } from './session.ts';

/** The last number that keys of draws hold. */
const HELD_OUT_EPOCH = 2 ** 32 - 1;

/** The mean loss over the run's validation samples, with the averaged weights where there are any. */
export async function validationLoss({ run, pictures, task, ema, device }: Session): Promise<number> {
  const chosen = spread(
    pictures.samples.flatMap(({ prior }, i) => (prior ? [] : [i])),
    run.validation.samples,
  );
  let sum = 0;
  for (const pass of batches(chosen, pictures.bucketOf, run.batch_size)) {
    const inputs = undropped(await task.prepare(pass, HELD_OUT_EPOCH));
    const loss = noGrad(() => scope(() => task.loss(place(inputs, device), ema?.weights).floats()[0]));
    sum += pass.samples.length * loss;
  }
  return sum / chosen.length;
}

/** Samples in batches of one bucket each. */
function batches(samples: readonly number[], bucketOf: readonly number[], size: number): MicroBatch[] {
  const all: MicroBatch[] = [];
  for (const bucket of new Set(samples.map((i) => bucketOf[i]))) {
    const members = samples.filter((i) => bucketOf[i] === bucket);
    for (let at = 0; at < members.length; at += size)
      all.push({ bucket, samples: members.slice(at, at + size) });
  }
  return all;
}
