// The loss on held-out draws: some pictures of the dataset with noise, timesteps and captions of an epoch that no run comes
// to, so that no update has seen them and every measurement sees the same ones. Unlike the loss of updates, whose timesteps
// change, it falls smoothly.
import { noGrad } from '../engine/grad.ts';
import { scope } from '../engine/scope.ts';
import { passesOf } from './data/order.ts';
import type { PassInputs } from './objective/pass_inputs.ts';
import { undropped } from './parts/dropout.ts';
import { place } from './passes/pass.ts';
import { spread } from './pictures/pictures.ts';
import type { Session } from './session.ts';

/** The last number that keys of draws hold. */
const HELD_OUT_EPOCH = 2 ** 32 - 1;

/** The mean loss over the run's validation samples, with the averaged weights where there are any. */
export async function validationLoss(session: Session): Promise<number> {
  const { run, pictures, task } = session;
  const chosen = spread(
    pictures.samples.flatMap(({ prior }, i) => (prior ? [] : [i])),
    run.validation.samples,
  );
  let sum = 0;
  for (const pass of passesOf(chosen, pictures.bucketOf, run.batch_size)) {
    sum += pass.samples.length * measuredLoss(session, await task.prepare(pass, HELD_OUT_EPOCH));
  }
  return sum / chosen.length;
}

/** The loss of a pass from which nothing is learnt. */
export const measuredLoss = ({ task, averages, device }: Session, inputs: PassInputs): number =>
  noGrad(() => scope(() => task.loss(place(undropped(inputs), device), averages).floats()[0]));
