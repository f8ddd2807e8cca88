// What a user's mistake is, as tap's `throws` and `rejects` compare it.
import type { Test } from 'tap';

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
