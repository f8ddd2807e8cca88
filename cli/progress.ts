// One line of progress with the time left: redrawn in place on a screen; when piped, a plain line at each quarter and
// after every minute.
import type { Terminal } from './terminal.ts';

export interface Bar {
  /** `note` is what else there is to say, such as the loss. */
  update(done: number, total: number, note?: string): void;
  end(): void;
}

const clock = (seconds: number): string => {
  const whole = Math.max(0, Math.round(seconds));
  return whole >= 60 ? `${Math.floor(whole / 60)}m${String(whole % 60).padStart(2, '0')}s` : `${whole}s`;
};

/** What is done, a note, and the time. */
type Parts = [head: string, note: string, time: string];

const joined = (parts: Parts): string => parts.filter(Boolean).join('  ');

/** A line of `room` letters at the most, as a longer one would wrap and could not be redrawn: the bar gives way, then the note's end. */
function fitted([head, note, time]: Parts, share: number, room: number): string {
  const notes = note.split(', ');
  while (notes.length > 0 && joined([head, notes.join(', '), time]).length > room) notes.pop();
  const text = joined([head, notes.join(', '), time]).slice(0, room);
  const width = Math.min(24, room - text.length - 3);
  if (width < 8) return text;
  const filled = Math.round(width * share);
  return `[${'#'.repeat(filled)}${'.'.repeat(width - filled)}] ${text}`;
}

export function progressBar(terminal: Terminal, label: string, quiet: boolean): Bar {
  const started = performance.now();
  let lastShare = -1;
  let lastLine = started;
  let first: number | undefined;
  const timing = (done: number, total: number): string => {
    const elapsed = (performance.now() - started) / 1000;
    // What was done before the bar began (a resumed run) says nothing about the speed.
    first ??= Math.max(0, done - 1);
    // A bar that has just begun, perhaps with this very update, knows no speed yet.
    if (elapsed < 0.1 || done === first) return '';
    const rate = (done - first) / elapsed;
    const speed = rate >= 1 ? `${rate.toFixed(1)} it/s` : `${(1 / rate).toFixed(1)} s/it`;
    return `${speed}  ${clock((total - done) / rate)} left`;
  };
  return {
    update(done, total, note = '') {
      if (quiet) return;
      const share = Math.floor((4 * done) / total);
      const parts: Parts = [`${label} ${done}/${total}`, note, timing(done, total)];
      const text = joined(parts);
      if (terminal.live) {
        terminal.err(`\r\x1b[K${fitted(parts, done / total, (terminal.columns || 80) - 1)}`);
      } else if (share !== lastShare || performance.now() - lastLine > 60_000) {
        terminal.err(`${text}\n`);
        lastLine = performance.now();
      }
      lastShare = share;
    },
    end() {
      if (!quiet && terminal.live) terminal.err('\r\x1b[K');
    },
  };
}

/** Adds up what the parts of a call take. */
export function stopwatch() {
  const seconds = { load: 0, sample: 0, decode: 0 };
  const timed = async <R>(part: keyof typeof seconds, fn: () => R | Promise<R>): Promise<R> => {
    const began = performance.now();
    const result = await fn();
    seconds[part] += (performance.now() - began) / 1000;
    return result;
  };
  return { seconds, timed };
}
