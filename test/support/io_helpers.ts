// What the tests of the io folder share: a folder of their own, refusals in one sentence, numbers that repeat.
import { existsSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Test } from 'tap';
import { UserError } from '../../io/errors.ts';
import type { TensorFile } from '../../io/tensor_file.ts';

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

/** Of 2000 copies of a sound file, one to four bytes of each changed and some cut off, each is read whole or refused. */
export function readsDamaged(
  t: Pick<Test, 'ok' | 'same'>,
  sound: Uint8Array,
  path: string,
  { seed, within = Number.POSITIVE_INFINITY }: { seed: number; within?: number },
  open: (path: string) => TensorFile,
): void {
  const random = randomNumbers(seed);
  const below = (count: number) => Math.floor(random() * count);
  const crashes: string[] = [];
  let refused = 0;
  for (let round = 0; round < 2000; round++) {
    const bytes = Uint8Array.from(sound.subarray(0, random() < 0.1 ? below(sound.length) : sound.length));
    for (let left = 1 + below(4); left > 0; left--) bytes[below(Math.min(within, bytes.length))] = below(256);
    writeFileSync(path, bytes);
    try {
      readAll(open(path));
    } catch (error) {
      if (error instanceof UserError) refused++;
      else crashes.push(String(error));
    }
  }
  t.same(crashes.slice(0, 3), [], `${refused} of 2000 refused`);
  t.ok(refused > 500 && refused < 2000, `${refused} refused`);
}

function readAll(file: TensorFile): void {
  try {
    for (const { name, mend } of file.tensors.values()) if (!mend) file.read(name);
  } finally {
    file.close();
  }
}
