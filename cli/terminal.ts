// What every command has of the program around it: where it writes, and how it says that a signal ended it.
import { constants } from 'node:os';
import { asUserError } from '../io/files.ts';

/** Where a command writes: the result on `out`, everything else on `err`. */
export interface Terminal {
  out(text: string): void;
  err(text: string): void;
  /** Whether `err` is a screen that can redraw a line. */
  live: boolean;
  /** Letters that fit into a line of that screen, where it tells. */
  readonly columns?: number;
}

/**
 * The process's own streams. A reader who has left (`sdxl ... | head -1`) ends nothing: the rest goes nowhere, and training
 * goes on. So it does where a result cannot be written for another reason, which is an error, though: the status says so in the end.
 */
export function ownTerminal(): Terminal {
  let told = false;
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE' || told) return;
    told = true;
    const { message } = asUserError(error, 'the standard output') as Error;
    process.stderr.write(`error: ${message}\n`);
    process.exitCode = 2;
  });
  process.stderr.on('error', () => {});
  return {
    out: (text) => void process.stdout.write(text),
    err: (text) => void process.stderr.write(text),
    live: process.stderr.isTTY === true,
    get columns() {
      return process.stderr.columns;
    },
  };
}

/** A text that may be a stranger's, as names in a file are, without what would steer a screen. */
export const printable = (text: string): string => text.replace(/[^\P{Cc}\n\t]/gu, '\ufffd');

/** What is read of a text that may be a value of a damaged file, such as a list of a thousand numbers. */
const shortened = (text: string, most: number): string =>
  text.length > most ? `${text.slice(0, most)}...` : text;

/** Such a text in a line that others follow, such as a log's: one line of it, and not all where it is long. */
export const inOneLine = (text: string): string => printable(shortened(text, 500).replace(/\s+/g, ' '));

/** An error in one line, with all that a person may have use for. */
export const errorLine = (message: string): string =>
  printable(shortened(message.replace(/\s*[\r\n]\s*/g, ' '), 5000));

/** A signal has ended the work in good order; `status` is the program's, as shells count. */
export class Stopped extends Error {
  readonly status: number;

  constructor(signal: NodeJS.Signals) {
    super(`stopped by ${signal}`);
    this.status = 128 + constants.signals[signal];
  }
}

/** Ctrl-C, a service manager, and a terminal that is closed. */
const stops = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

/** Tells `onSignal` of the first signal that comes during `work`. The second finds no handler of ours and ends the program. */
export async function heedingSignals<R>(
  onSignal: (signal: NodeJS.Signals) => void,
  work: () => Promise<R>,
): Promise<R> {
  const heed = (signal: NodeJS.Signals) => {
    release();
    onSignal(signal);
  };
  const release = () => {
    for (const name of stops) process.off(name, heed);
  };
  for (const name of stops) process.on(name, heed);
  try {
    return await work();
  } finally {
    release();
  }
}
