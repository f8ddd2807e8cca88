// Errors a user can mend: one sentence with what is wrong, where, and what to do. The command line prints the
// message alone and exits with status 2; any other error that reaches it is a bug and keeps its stack.

/** A mistake in what the user gave us (a file, a flag, a prompt), told in one sentence. */
export class UserError extends Error {
  override readonly name: string = 'UserError';
  /** The sentence up to its mend, where that was given apart: who has a better mend puts it behind this. */
  readonly problem: string;

  constructor(problem: string, mend?: string) {
    super(mend === undefined ? problem : `${problem}; ${mend}`);
    this.problem = problem;
  }
}

/** The nearest of `candidates` to `word` by edit distance, or undefined when nothing is near enough to suggest. */
function nearest(word: string, candidates: readonly string[]): string | undefined {
  const limit = Math.max(2, Math.floor(word.length / 3));
  let best: string | undefined;
  let bestDistance = limit + 1;
  for (const candidate of candidates) {
    const distance = editDistance(word.toLowerCase(), candidate.toLowerCase());
    if (distance < bestDistance) [best, bestDistance] = [candidate, distance];
  }
  return best;
}

/** `; did you mean "x"?` for error messages, or an empty string. */
export function didYouMean(word: string, candidates: readonly string[]): string {
  const near = nearest(word, candidates);
  return near === undefined ? '' : `; did you mean "${near}"?`;
}

function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      const substitution = row[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1);
      next.push(Math.min(substitution, row[j] + 1, next[j - 1] + 1));
    }
    row = next;
  }
  return row[b.length];
}
