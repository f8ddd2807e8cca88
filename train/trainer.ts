// The loop: updates (update.ts), and between them whatever is due: a line of the log, a checkpoint, previews. Between two
// updates a run is nothing but its tensors and a position, as every draw is keyed: that is why resuming is exact.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { UserError } from '../io/errors.ts';
import { makeFolder, writeFileAtomic } from '../io/files.ts';
import { type Position, saveCheckpoint, type TrainedComponent } from './checkpoint.ts';
import { lossCurve } from './curve.ts';
import { turnsFrom, type Update } from './data/order.ts';
import { writeFinal } from './final.ts';
import { appendLog, type LogEntry, readLog, rewindLog } from './log.ts';
import { learningRate } from './lr_schedule.ts';
import { promptsOf, rewindPreviews, writePreviews } from './preview.ts';
import { resumeSession, type Session } from './session.ts';
import { type Report, type Stop, saved } from './task.ts';
import { openEventFile } from './tensorboard.ts';
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

/** Trains until the plan is done or `stop.asked`, from `checkpoint` where one is given. @throws UserError */
export async function train(
  session: Session,
  report: Report,
  stop: Stop,
  checkpoint?: string,
): Promise<Outcome> {
  const feed = openFeed(session.task);
  try {
    return await trainFrom(feed, session, report, stop, checkpoint);
  } finally {
    feed.end();
  }
}

async function trainFrom(
  feed: Feed,
  session: Session,
  report: Report,
  stop: Stop,
  checkpoint: string | undefined,
): Promise<Outcome> {
  const { run, pictures, total, task, device } = session;
  makeFolder(run.output);
  let position: Position = { step: 0, epoch: 0, update: 0 };
  if (checkpoint) position = resumeSession(session, checkpoint);
  rewindLog(logFile(run.output), position.step);
  rewindPreviews(run.output, position.step);
  await task.fillCache?.(report, stop);
  if (stop.asked) return { position, folder: checkpoint ?? '', stopped: true };
  // What follows needs other sizes, and its peak is what the plan estimated.
  device.memory.trim();
  device.memory.peak = device.memory.live;
  const journal = openJournal(session, report);
  const placed = pictures.samples.map(({ key, prior }, i) => ({ key, prior, bucket: pictures.bucketOf[i] }));
  const sizes = { seed: run.seed, batch: run.batch_size, accumulation: run.gradient_accumulation_steps };
  let folder = checkpoint ?? '';
  let failures = 0;
  const turns = turnsFrom(placed, sizes, position);
  for (let turn = turns.next().value, next = turn; position.step < total; turn = next) {
    const lr = learningRate(run.lr_scheduler, run.optimizer.lr, position.step, total);
    const done = position.step + 1 === total;
    if (!done) next = turns.next().value;
    const made = await makeUpdate(session, feed, turn, lr, done ? undefined : next);
    const { update, endsEpoch } = turn;
    position = after(position, endsEpoch);
    failures = made.skipped ? failures + 1 : 0;
    const measured =
      run.validation.samples > 0 && (done || isDue(run.validation.every_steps, position.step, endsEpoch));
    journal.note(position, lr, made, update, measured ? await validationLoss(session) : undefined);
    if (made.skipped) report.line(`step ${position.step} skipped: ${made.skipped}`);
    if (failures >= run.max_nonfinite) throw gaveUp(made, failures, position.step, folder);
    // Not while updates fail: weights that lead to NaN would take the places of sound ones.
    const saves = done || (failures === 0 && isDue(run.checkpoints.every_steps, position.step, endsEpoch));
    if (saves) folder = save(session, position);
    if (!stop.asked && (done || isDue(run.previews.every_steps, position.step, endsEpoch)))
      await journal.preview(position.step, stop);
    // Asked during the update, or during the previews after it.
    if (stop.asked && !saves) folder = save(session, position);
    if (stop.asked && !done) return { position, folder, stopped: true };
    await new Promise((resolve) => setImmediate(resolve)); // signals are heard here
  }
  const curve = lossCurve(readLog(logFile(run.output)), `${run.name}: loss`);
  writeFileAtomic(join(run.output, 'loss.svg'), curve);
  return { position, folder: await writeFinal(session, folder), stopped: false };
}

const isDue = (every: number, step: number, endsEpoch: boolean): boolean =>
  every > 0 ? step % every === 0 : endsEpoch;

const after = ({ step, epoch, update }: Position, endsEpoch: boolean): Position =>
  endsEpoch ? { step: step + 1, epoch: epoch + 1, update: 0 } : { step: step + 1, epoch, update: update + 1 };

function gaveUp({ skipped }: Made, failures: number, step: number, folder: string): UserError {
  const mend = folder ? `resume from ${folder}` : 'start again';
  return new UserError(
    `training stopped at step ${step}: ${failures} updates in a row were not finite (${skipped}); lower optimizer.lr and ${mend}`,
  );
}

function save({ run, task, pictures, optimizer, ema }: Session, position: Position): string {
  const components = task.components.map(
    (component): TrainedComponent => ({
      ...saved(component),
      ema: ema && saved(component, ema.weights).weights,
    }),
  );
  const state = { ...position, run, dataset: pictures.hash };
  return saveCheckpoint(run.output, state, components, optimizer.state, run.checkpoints.keep);
}

/** What a run tells while it goes: the progress line, the log, TensorBoard, previews. */
function openJournal({ run, task, ema, device, total }: Session, report: Report) {
  const events = openEventFile(join(run.output, 'tensorboard'));
  let [since, seen, rate] = [Date.now(), 0, Number.NaN];
  return {
    note(
      { step, epoch }: Position,
      lr: number,
      { loss, grad_norm, skipped }: Made,
      update: Update,
      validation_loss?: number,
    ): void {
      seen += update.reduce((sum, { samples }) => sum + samples.length, 0);
      if (step % run.log_every === 0 || step === total || skipped || validation_loss !== undefined) {
        rate = (1000 * seen) / Math.max(1, Date.now() - since);
        [since, seen] = [Date.now(), 0];
        const scalars = { loss, lr, grad_norm, images_per_second: rate };
        const entry: LogEntry = { step, epoch, ...scalars, validation_loss, skipped };
        appendLog(logFile(run.output), entry);
        report.entry?.(entry);
        events.scalars(step, validation_loss === undefined ? scalars : { ...scalars, validation_loss });
      }
      const told = [
        `loss ${loss.toFixed(4)}`,
        `lr ${Number(lr.toPrecision(3))}`,
        Number.isNaN(rate) ? '' : `${rate.toFixed(1)} images/s`,
        `peak ${(device.memory.peak / 2 ** 30).toFixed(2)} GiB`,
      ];
      report.progress('training', step, total, told.filter(Boolean).join(', '));
    },
    async preview(step: number, stop: Stop): Promise<void> {
      const pictures = await task.preview(ema?.weights, stop);
      if (pictures.length === 0) return;
      const { path, width, height } = await writePreviews(
        run.output,
        step,
        pictures,
        promptsOf(run.previews),
      );
      events.image(step, 'previews', readFileSync(path), width, height);
      since = Date.now(); // the rate is of training alone
    },
  };
}
