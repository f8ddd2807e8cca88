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

export function progressBar(terminal: Terminal, label: string, quiet: boolean): Bar {
  const started = Date.now();
  let lastShare = -1;
  let lastLine = started;
  let first: number | undefined;
  const line = (done: number, total: number, note: string): string => {
    const elapsed = (Date.now() - started) / 1000;
    // What was done before the bar began (a resumed run) says nothing about the speed.
    first ??= done - 1;
    const head = `${label} ${done}/${total}${note && `  ${note}`}`;
    // A bar that has just begun, perhaps with this very update, knows no speed yet.
    if (elapsed < 0.1) return head;
    const rate = (done - first) / elapsed;
    const speed = rate >= 1 ? `${rate.toFixed(1)} it/s` : `${(1 / rate).toFixed(1)} s/it`;
    return `${head}  ${speed}  ${clock((total - done) / rate)} left`;
  };
  return {
    update(done, total, note = '') {
      if (quiet) return;
      const share = Math.floor((4 * done) / total);
      const text = line(done, total, note);
      if (terminal.live) {
        const filled = Math.round((24 * done) / total);
        terminal.err(`\r\x1b[K[${'#'.repeat(filled)}${'.'.repeat(24 - filled)}] ${text}`);
      } else if (share !== lastShare || Date.now() - lastLine > 60_000) {
        terminal.err(`${text}\n`);
        lastLine = Date.now();
      }
      lastShare = share;
    },
    end() {
      if (!quiet && terminal.live) terminal.err('\r\x1b[K');
    },
  };
}
