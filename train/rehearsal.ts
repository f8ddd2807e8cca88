// What memory a run will take: a session on devices that hold no numbers goes once through all that the run does.
import type { Device } from '../engine/device.ts';
import type { Parameter } from '../engine/module.ts';
import { standInDevice } from '../engine/profile.ts';
import { type Materials, mostPasses } from './materials.ts';
import type { PassInputs } from './objective/pass_inputs.ts';
import { queueNorms } from './optimizers/clip.ts';
import { boundNorms } from './parts/max_norm.ts';
import { moveThrough } from './passes/fused.ts';
import { openSession, type Session } from './session.ts';
import { rehearse } from './tasks/preparation.ts';
import { measuredLoss } from './validation.ts';

/**
 * The most memory of each device that a run takes (its preparation, the largest pass, backward and step, a pass of validation, the
 * largest preview, all run on devices without numbers), and counts.
 */
export function estimate(
  materials: Materials,
  devices: readonly Device[] = [standInDevice()],
): { bytes: number[]; trained: number; all: number } {
  const [device, ...further] = devices;
  const session = openSession(materials, rehearse(materials, device), device, further);
  rehearseUpdate(session, devices);
  const { samples } = session.run.validation;
  if (samples > 0) measuredLoss(session, largestPass(session, samples));
  session.task.rehearsePreviews?.(session.averages);
  const sizes = (parameters: Iterable<Parameter>) => [...parameters].reduce((sum, { size }) => sum + size, 0);
  const all = session.task.components.flatMap(({ parameters }) => [...parameters.values()]);
  session.release();
  const bytes = devices.map(({ memory }) => memory.peak);
  return { bytes, trained: sizes(session.parameters.values()), all: sizes(all) };
}

/** A pass of as many of the largest pictures as it may have, without numbers. */
function largestPass({ run, pictures, task }: Session, most: number): PassInputs {
  const area = (bucket: number) => pictures.buckets[bucket][0] * pictures.buckets[bucket][1];
  const bucket = pictures.bucketOf.reduce(
    (best, b) => (area(b) > area(best) ? b : best),
    pictures.bucketOf[0],
  );
  const samples = Array<number>(Math.min(run.batch_size, pictures.samples.length, most)).fill(0);
  return task.blank({ bucket, samples });
}

/** An update, after which its gradients are gone as they are when a run measures or draws. */
function rehearseUpdate(session: Session, devices: readonly Device[]): void {
  const { run, passes, optimizer, ema } = session;
  const blank = () => largestPass(session, run.batch_size);
  if (run.train.fused_backward_pass) {
    const { made, move } = optimizer.begin(run.optimizer.lr);
    moveThrough(session, blank(), move);
    boundNorms(session);
    ema?.step(made);
    return;
  }
  // A device's second pass finds the gradients of its first, and a third no more.
  const rounds = mostPasses(session) > devices.length ? 2 : 1;
  const losses = Array.from({ length: rounds * devices.length }, () => passes.queue(blank(), 1));
  passes.gather();
  const norms = queueNorms(session.parameters);
  const { made } = optimizer.step(run.optimizer.lr);
  boundNorms(session);
  for (const held of [norms, ...losses]) held.release();
  passes.broadcast();
  ema?.step(made);
  passes.clear();
}
