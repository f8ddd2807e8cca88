// Running the program in a test's own process, and what it said.
import type { Test } from 'tap';
import { main } from '../../cli/main.ts';

export interface Said {
  status: number;
  out: string;
  err: string;
}

export async function sdxl(...argv: string[]): Promise<Said> {
  let [out, err] = ['', ''];
  const terminal = {
    out: (text: string) => void (out += text),
    err: (text: string) => void (err += text),
    live: false,
  };
  return { status: await main(argv, terminal), out, err };
}

/** What `call` says to each command line is one sentence, that sentence, and the status that of a user's mistake. */
export async function refusesEach(
  t: Test,
  call: (...argv: string[]) => Promise<Said>,
  cases: readonly (readonly [argv: readonly string[], sentence: RegExp])[],
): Promise<void> {
  for (const [argv, sentence] of cases) {
    const { status, err } = await call(...argv);
    t.equal(status, 2, argv.join(' '));
    t.match(err, sentence);
    t.equal(err.trim().split('\n').length, 1, 'one sentence');
  }
}
