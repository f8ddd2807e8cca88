// What a user's mistake is, as tap's `throws` and `rejects` compare it.
import type { Test } from 'tap';
import { UserError } from '../../io/errors.ts';

export const says = (message: RegExp) => ({ name: 'UserError', message });

/** Passes when `run` throws one whose sentence has each of these in it. */
export function refuses(
  t: Pick<Test, 'throws'>,
  label: string,
  run: () => unknown,
  ...words: readonly [RegExp, ...RegExp[]]
): void {
  t.throws(run, says(new RegExp(words.map(({ source }) => `(?=[^]*(?:${source}))`).join(''))), label);
}

/** Passes when `promise` fails by one, of one line, that the pattern matches. */
export async function refused(
  t: Pick<Test, 'ok'>,
  promise: Promise<unknown>,
  pattern: RegExp,
): Promise<void> {
  const error = await promise.then(
    () => new Error('nothing was thrown'),
    (reason: unknown) => reason,
  );
  const sentence = error instanceof UserError && !error.message.includes('\n');
  t.ok(sentence && pattern.test(error.message), `${pattern}: ${error}`);
}
