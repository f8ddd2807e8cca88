// One line of progress with the time left: redrawn in place on a screen, a plain line now and then when piped.
import type { Terminal } from './main.ts';

export interface Bar {
  update(done: number, total: number): void;
  end(): void;
}

const clock = (seconds: number): string => {
  const whole = Math.max(0, Math.round(seconds));
  return whole >= 60 ? `${Math.floor(whole / 60)}m${String(whole % 60).padStart(2, '0')}s` : `${whole}s`;
};

export function progressBar(terminal: Terminal, label: string, quiet: boolean): Bar {
  const started = Date.now();
  let lastShare = -1;
  const line = (done: number, total: number): string => {
    const elapsed = (Date.now() - started) / 1000;
    const rate = elapsed > 0 ? done / elapsed : 0;
    const left = rate > 0 ? clock((total - done) / rate) : '?';
    const speed = rate >= 1 ? `${rate.toFixed(1)} it/s` : `${(1 / (rate || 1)).toFixed(1)} s/it`;
    return `${label} ${done}/${total}  ${speed}  ${left} left`;
  };
  return {
    update(done, total) {
      if (quiet) return;
      const share = Math.floor((4 * done) / total);
      if (terminal.live) {
        const filled = Math.round((24 * done) / total);
        terminal.err(`\r\x1b[K[${'#'.repeat(filled)}${'.'.repeat(24 - filled)}] ${line(done, total)}`);
      } else if (share !== lastShare) terminal.err(`${line(done, total)}\n`);
      lastShare = share;
    },
    end() {
      if (!quiet && terminal.live) terminal.err('\r\x1b[K');
    },
  };
}
