// The loop: updates (update.ts), and between them whatever is due: a line of the log, a checkpoint, previews. Between two
// updates a run is nothing but its tensors and a position, as every draw is keyed: that is why resuming is exact.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { CudaError } from '../engine/cuda/errors.ts';
import type { Device } from '../engine/device.ts';
import { MemoryError } from '../engine/memory.ts';
import { UserError } from '../io/errors.ts';
import { makeFolder, writeFileAtomic } from '../io/files.ts';
import { type Position, removeLater, saveCheckpoint, type TrainedComponent } from './checkpoint.ts';
import { turnsFrom, type Update } from './data/order.ts';
import { removeLaterFinal, writeFinal } from './final.ts';
import { lossCurve } from './log/curve.ts';
import { appendLog, type LogEntry, readLog, rewindLog } from './log/log.ts';
import { openEventFile } from './log/tensorboard.ts';
import { type Materials, stateOf } from './materials.ts';
import { learningRate } from './optimizers/lr_schedule.ts';
import { type Report, type Stop, saved } from './passes/task.ts';
import { promptsOf } from './run/preview_prompts.ts';
import { openSession, resumeSession, type Session } from './session.ts';
import { prepare } from './tasks/preparation.ts';
import { hasPreviews, rewindPreviews, writePreviews, writeSheet } from './tasks/preview.ts';
import { type Feed, type Made, makeUpdate, openFeed } from './update.ts';
import { validationLoss } from './validation.ts';

export interface Outcome {
  position: Position;
  /** The folder of the last checkpoint, or of the finished model; empty where the run was stopped before its first update. */
  folder: string;
  /** Ended by the caller's wish rather than by the plan. */
  stopped: boolean;
}

/** Where a run's files lie in its output. */
const logFile = (output: string): string => join(output, 'log.jsonl');

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

/**
 * Trains on `devices` until the plan is done or `stop.asked`, from the checkpoint where there is one. @throws UserError
 */
export async function train(
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
    at.moving = false;
    if (at.position.step === begun) dropLater(run.output, begun);
    at.position = after(at.position, turn.endsEpoch);
    at.failures = made.skipped ? at.failures + 1 : 0;
    at.unsaved = true;
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

const after = ({ step, epoch, update }: Position, endsEpoch: boolean): Position =>
  endsEpoch ? { step: step + 1, epoch: epoch + 1, update: 0 } : { step: step + 1, epoch, update: update + 1 };

function gaveUp({ skipped }: Made, { failures, position: { step }, folder }: Standing): UserError {
  const mend = folder ? `resume from ${folder}` : 'start again';
  return new UserError(
    `training stopped at step ${step}: ${failures} updates in a row were not finite (${skipped}); lower optimizer.lr and ${mend}`,
  );
}

function save({ run, task, pictures, optimizer, ema }: Session, at: Standing): void {
  const components = task.components.map(
    (component): TrainedComponent => ({
      ...saved(component),
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

/** What a run tells while it goes: the progress line, the log, TensorBoard, previews. */
function openJournal({ run, task, ema, device, total }: Session, report: Report) {
  const events = openEventFile(join(run.output, 'tensorboard'));
  let [since, seen, rate] = [performance.now(), 0, Number.NaN];
  const preview = async (step: number, stop: Stop): Promise<void> => {
    const pictures = await task.preview(ema?.weights, stop);
    if (pictures.length === 0) return;
    const sheet = await writePreviews(run.output, step, pictures, promptsOf(run.previews));
    const { path, width, height } = sheet;
    events.image(step, 'previews', readFileSync(path), width, height);
  };
  /** A line of the log, with the rate since the one before. */
  const log = ({ step, epoch }: Position, scalars: Scalars, skipped?: string): void => {
    rate = (1000 * seen) / Math.max(1, performance.now() - since);
    [since, seen] = [performance.now(), 0];
    const { validation_loss, ...ofUpdate } = scalars;
    const all = { ...ofUpdate, images_per_second: rate, validation_loss };
    const entry: LogEntry = { step, epoch, ...all, skipped };
    appendLog(logFile(run.output), entry);
    report.entry?.(entry);
    events.scalars(step, all);
  };
  return {
    preview,
    /** Work whose time is none of training's, of which the rate is. */
    async aside<R>(work: () => R | Promise<R>): Promise<R> {
      const began = performance.now();
      const result = await work();
      since += performance.now() - began;
      return result;
    },
    /** A run that ended after it had saved and before its previews were whole has them yet to draw. */
    catchUp: (step: number, stop: Stop): Promise<unknown> =>
      hasPreviews(run.output, step) ? writeSheet(run.output, promptsOf(run.previews)) : preview(step, stop),
    /** An update that has been made at that rate, and what was measured after it. */
    note(at: Position, lr: number, made: Made, update: Update, validation_loss?: number): void {
      const { loss, grad_norm, dlr, skipped } = made;
      seen += update.reduce((sum, { samples }) => sum + samples.length, 0);
      if (at.step % run.log_every === 0 || at.step === total || skipped || validation_loss !== undefined)
        log(at, { loss, lr, 'd*lr': dlr, grad_norm, validation_loss }, skipped);
      report.progress('training', at.step, total, told({ loss, lr, dlr }, rate, device.memory.peak));
    },
  };
}

/** What of an update is logged, but for its rate. */
type Scalars = Omit<LogEntry, 'step' | 'epoch' | 'images_per_second' | 'skipped'>;

/** An update in the words of the progress line. */
const told = ({ loss, lr, dlr }: Pick<Made, 'loss' | 'dlr'> & { lr: number }, rate: number, peak: number) =>
  [
    `loss ${loss.toFixed(4)}`,
    dlr === undefined ? `lr ${Number(lr.toPrecision(3))}` : `d*lr ${Number(dlr.toPrecision(3))}`,
    Number.isNaN(rate) ? '' : `${rate.toFixed(1)} images/s`,
    `peak ${(peak / 2 ** 30).toFixed(2)} GiB`,
  ]
    .filter(Boolean)
    .join(', ');
