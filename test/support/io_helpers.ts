// What the tests of the io folder share: a folder of their own, refusals in one sentence, numbers that repeat.
import { existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { UserError } from '../../io/errors.ts';

export const folder = mkdtempSync(join(tmpdir(), 'sdxl-io-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
export const at = (name: string) => join(folder, name);

/** How many files this process has open, where the system tells. */
export const filesOpen = (): number =>
  existsSync('/proc/self/fd') ? readdirSync('/proc/self/fd').length : 0;

export const sameBytes = (a: Uint8Array, b: Uint8Array) => Buffer.compare(a, b) === 0;

export function messageOf(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    return error instanceof UserError ? error.message : `not a UserError: ${error}`;
  }
  return 'no error';
}

/** Passes when `action` throws a UserError of one line that matches. */
export function refuses(
  t: { ok(value: unknown, message: string): unknown },
  pattern: RegExp,
  action: () => unknown,
): void {
  const message = messageOf(action);
  t.ok(pattern.test(message) && !message.includes('\n'), `${pattern}: ${message}`);
}

export const exact = { atol: 0, rtol: 0 };

/** A small generator so that failures repeat (mulberry32). */
export function randomNumbers(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}
