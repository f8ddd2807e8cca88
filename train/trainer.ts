// The loop: updates (update.ts), and between them whatever is due: a line of the log, a checkpoint, previews. Between two
// updates a run is nothing but its tensors and a position, as every draw is keyed: that is why resuming is exact.
import { join } from 'node:path';
import { CudaError, isOutOfMemory } from '../engine/cuda/errors.ts';
import type { Device } from '../engine/device.ts';
import { MemoryError } from '../engine/memory.ts';
import { UserError } from '../io/errors.ts';
import { makeFolder, writeFileAtomic } from '../io/files.ts';
import { type Position, removeLater, saveCheckpoint, type TrainedComponent } from './checkpoint.ts';
import { turnsFrom } from './data/order.ts';
import { removeLaterFinal, writeFinal } from './final.ts';
import { openJournal } from './journal.ts';
import { lossCurve } from './log/curve.ts';
import { logFile, readLog, rewindLog } from './log/log.ts';
import { rewindPreviews } from './log/preview_files.ts';
import { type Materials, stateOf } from './materials.ts';
import { learningRate } from './optimizers/lr_schedule.ts';
import { type Report, type Stop, saved } from './passes/task.ts';
import { openSession, resumeSession, type Session } from './session.ts';
import { prepare } from './tasks/preparation.ts';
import { type Feed, type Made, makeUpdate, openFeed } from './update.ts';
import { validationLoss } from './validation.ts';

export interface Outcome {
  position: Position;
  /** The folder of the last checkpoint, or of the finished model; empty where the run was stopped before its first update. */
  folder: string;
  /** Ended by the caller's wish rather than by the plan. */
  stopped: boolean;
}

const start: Position = { step: 0, epoch: 0, update: 0 };

/** Where a run stands between two updates. */
interface Standing {
  position: Position;
  /** Of the last checkpoint; empty before the first. */
  folder: string;
  /** Updates in a row that were not finite. */
  failures: number;
  /** Whether updates were made that no checkpoint has. */
  unsaved: boolean;
  /** Whether weights are being moved: a device that fails then may have moved some of them. */
  moving: boolean;
}

/** In place of a picture's mend: a run has keys for it, not flags, and more of them. */
const ownMend = '`sdxl plan` with --vram tells what to set';

/**
 * Trains on `devices` until the plan is done or `stop.asked`, from the checkpoint where there is one. @throws UserError
 */
export async function train(
  materials: Materials,
  devices: readonly Device[],
  report: Report,
  stop: Stop,
): Promise<Outcome> {
  try {
    return await prepareAndTrain(materials, devices, report, stop);
  } catch (error) {
    if (error instanceof MemoryError || isOutOfMemory(error)) error.message = `${error.problem}; ${ownMend}`;
    throw error;
  }
}

async function prepareAndTrain(
  materials: Materials,
  [device, ...further]: readonly Device[],
  report: Report,
  stop: Stop,
): Promise<Outcome> {
  const prepared = await prepare(materials, device, report, stop);
  const { run, checkpoint } = materials;
  if (!prepared) {
    const { step, epoch, update } = checkpoint ? stateOf(run, checkpoint) : start;
    return { position: { step, epoch, update }, folder: checkpoint ?? '', stopped: true };
  }
  const session = openSession(materials, prepared, device, further);
  return trainSession(session, report, stop).finally(session.release);
}

/**
 * The same once all is loaded. What fails beside the weights, such as a picture that has vanished or previews that find no memory, costs
 * no update: those before it are saved.
 */
async function trainSession(session: Session, report: Report, stop: Stop): Promise<Outcome> {
  const feed = openFeed(session.task);
  const at: Standing = {
    position: start,
    ...{ folder: session.checkpoint ?? '', failures: 0, unsaved: false, moving: false },
  };
  try {
    return await trainFrom(feed, session, report, stop, at);
  } catch (error) {
    // A device that has failed tells nothing any more; one without memory does.
    const isLost = error instanceof CudaError || (error instanceof MemoryError && at.moving);
    if (error instanceof UserError && !isLost && at.unsaved && at.failures === 0) {
      save(session, at);
      report.line(`what was trained until then is saved: ${at.folder}`);
    }
    throw error;
  } finally {
    feed.end();
  }
}

async function trainFrom(
  feed: Feed,
  session: Session,
  report: Report,
  stop: Stop,
  at: Standing,
): Promise<Outcome> {
  const { run, total, device } = session;
  makeFolder(run.output);
  if (at.folder) at.position = resumeSession(session, at.folder);
  device.memory.peak = device.memory.live; // what is told of it is of training
  await othersTurn();
  if (stop.asked) return stoppedAt(at);
  const journal = openJournal(session, report);
  const turns = turnsOf(session, at.position);
  const begun = at.position.step;
  if (begun > 0 && (begun === total || isDue(run.previews.every_steps, begun, at.position.update === 0)))
    await journal.aside(() => journal.catchUp(begun, stop));
  if (stop.asked) return stoppedAt(at);
  for (let turn = turns.next().value, next = turn; at.position.step < total; turn = next) {
    const lr = learningRate(run.lr_scheduler, run.optimizer.lr, at.position.step, total);
    const done = at.position.step + 1 === total;
    if (!done) next = turns.next().value;
    const made = await makeUpdate(session, feed, turn, {
      lr,
      next: done ? undefined : next,
      moving() {
        at.moving = true;
      },
    });
    if (at.position.step === begun) dropLater(run.output, begun);
    advance(at, made, turn.endsEpoch);
    const due = (every: number) => done || isDue(every, at.position.step, turn.endsEpoch);
    const measured = run.validation.samples > 0 && due(run.validation.every_steps);
    const loss = measured ? await journal.aside(() => validationLoss(session)) : undefined;
    journal.note(at.position, lr, made, turn.update, loss);
    if (made.skipped) report.line(`step ${at.position.step} skipped: ${made.skipped}`);
    if (at.failures >= run.max_nonfinite) throw gaveUp(made, at);
    await saveAndDraw(session, journal, at, { due, done }, stop);
    if (stop.asked && !done) return stoppedAt(at);
    await othersTurn();
  }
  return finish(session, at);
}

const stoppedAt = ({ position, folder }: Standing): Outcome => ({ position, folder, stopped: true });

/** All updates from there on. */
function turnsOf({ run, pictures }: Session, position: Position): ReturnType<typeof turnsFrom> {
  const placed = pictures.samples.map(({ key, prior }, i) => ({ key, prior, bucket: pictures.bucketOf[i] }));
  const sizes = { seed: run.seed, batch: run.batch_size, accumulation: run.gradient_accumulation_steps };
  return turnsFrom(placed, sizes, position);
}

/** Makes the checkpoint and the previews that are due after an update. */
async function saveAndDraw(
  session: Session,
  journal: ReturnType<typeof openJournal>,
  at: Standing,
  { due, done }: { due: (every: number) => boolean; done: boolean },
  stop: Stop,
): Promise<void> {
  const { checkpoints, previews } = session.run;
  // Not while updates fail: these weights may lead to NaN.
  if (done || (at.failures === 0 && due(checkpoints.every_steps)))
    await journal.aside(() => save(session, at));
  if (!stop.asked && due(previews.every_steps))
    await journal.aside(() => journal.preview(at.position.step, stop));
  // Asked during the update, or during the previews after it.
  if (stop.asked && at.unsaved) save(session, at);
}

/** Writes what a run ends with. */
async function finish(session: Session, at: Standing): Promise<Outcome> {
  const { run } = session;
  // Where no update was left to make, later lines are still there.
  const entries = readLog(logFile(run.output)).filter(({ step }) => step <= at.position.step);
  writeFileAtomic(join(run.output, 'loss.svg'), lossCurve(entries, `${run.name}: loss`));
  return { position: at.position, folder: await writeFinal(session, at.folder), stopped: false };
}

/** Signals are heard here. */
const othersTurn = () => new Promise((resolve) => setImmediate(resolve));

/**
 * Drops what was trained past `step` before the run was taken up again there. That stays whole until there is an update to take its
 * place; from then on no `--resume` may go on with it, nor a finished model of it pass for this run's.
 */
function dropLater(output: string, step: number): void {
  // Without the finished model, its last checkpoint makes it again.
  removeLaterFinal(output, step);
  removeLater(output, step);
  rewindLog(logFile(output), step);
  rewindPreviews(output, step);
}

const isDue = (every: number, step: number, endsEpoch: boolean): boolean =>
  every > 0 ? step % every === 0 : endsEpoch;

/** Stands behind an update that has been made. */
function advance(at: Standing, { skipped }: Made, endsEpoch: boolean): void {
  const { step, epoch, update } = at.position;
  const next = endsEpoch ? { epoch: epoch + 1, update: 0 } : { epoch, update: update + 1 };
  at.position = { step: step + 1, ...next };
  at.failures = skipped ? at.failures + 1 : 0;
  at.unsaved = true;
  at.moving = false;
}

function gaveUp({ skipped }: Made, { failures, position: { step }, folder }: Standing): UserError {
  const mend = folder ? `resume from ${folder}` : 'start again';
  return new UserError(
    `training stopped at step ${step}: ${failures} updates in a row were not finite (${skipped}); lower optimizer.lr and ${mend}`,
  );
}

function save({ run, task, pictures, optimizer, ema }: Session, at: Standing): void {
  const components = task.components.map(
    (component): TrainedComponent => ({
      ...saved(component, optimizer.averages),
      ema: ema && saved(component, ema.weights).weights,
    }),
  );
  const { hash: dataset, captionsHash: captions } = pictures;
  const state = { ...at.position, run, dataset, captions };
  // Weights that lead to NaN take no sound ones' place.
  const keep = at.failures === 0 ? run.checkpoints.keep : Infinity;
  at.unsaved = false; // nor is it tried again where it fails
  at.folder = saveCheckpoint(run.output, state, components, optimizer.state, keep);
}
