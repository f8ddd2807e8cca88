// What a run tells while it goes, and where: the progress line, its log, TensorBoard's files, previews. The rate that it tells is training's,
// without the time that checkpoints, measurements and previews take.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { gib } from '../io/byte_sizes.ts';
import type { Position } from './checkpoint.ts';
import type { Update } from './data/order.ts';
import { appendLog, type LogEntry, logFile } from './log/log.ts';
import { hasPreviews, writePreviews, writeSheet } from './log/preview_files.ts';
import { openEventFile } from './log/tensorboard.ts';
import type { Report, Stop } from './passes/task.ts';
import { promptsOf } from './run/preview_prompts.ts';
import type { Session } from './session.ts';
import type { Made } from './update.ts';

export function openJournal({ run, task, averages, device, total }: Session, report: Report) {
  const events = openEventFile(join(run.output, 'tensorboard'));
  let [since, seen, rate] = [performance.now(), 0, Number.NaN];
  const preview = async (step: number, stop: Stop): Promise<void> => {
    const pictures = await task.preview(averages, stop);
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
    `peak ${gib(peak)}`,
  ]
    .filter(Boolean)
    .join(', ');
