// The log of a run as JSON lines, one for every log_every updates, and for those that were skipped or measured. A resumed run drops the
// lines past its checkpoint, so that the log reads as if the run had never stopped.
import { appendFileSync, existsSync } from 'node:fs';
import { join } from 'node:path';
import { asUserError, readBytes, writeFileAtomic } from '../../io/files.ts';
import { isRecord } from '../../io/json.ts';

/** The log of a run that writes to `output`. */
export const logFile = (output: string): string => join(output, 'log.jsonl');

export interface LogEntry {
  step: number;
  epoch: number;
  loss: number;
  lr: number;
  /** What Prodigy's d makes of it. */
  'd*lr'?: number;
  grad_norm: number;
  /** Pictures per second since the last entry. */
  images_per_second: number;
  /** After the update, where it was measured. */
  validation_loss?: number;
  /** Why the update was not made. */
  skipped?: string;
}

/** The entries of a log; a line cut short by a kill, or that is none, is passed over. */
export function readLog(path: string): LogEntry[] {
  if (!existsSync(path)) return [];
  return readBytes(path)
    .toString()
    .split('\n')
    .flatMap((line) => {
      try {
        const entry: unknown = JSON.parse(line);
        return isRecord(entry) ? [entry as unknown as LogEntry] : [];
      } catch {
        return [];
      }
    });
}

/** Keeps the entries up to `step`. */
export function rewindLog(path: string, step: number): void {
  const kept = readLog(path).filter((entry) => entry.step <= step);
  if (existsSync(path)) writeFileAtomic(path, kept.map((entry) => `${JSON.stringify(entry)}\n`).join(''));
}

export function appendLog(path: string, entry: LogEntry): void {
  try {
    appendFileSync(path, `${JSON.stringify(entry)}\n`);
  } catch (error) {
    throw asUserError(error, path);
  }
}
