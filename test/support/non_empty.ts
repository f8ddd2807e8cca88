// What a test goes through where it is found and not written there: a loop over nothing would hold nothing, and pass.

/** All of it, and an error where there is none. */
export function nonEmpty<T>(found: Iterable<T>): T[] {
  const all = [...found];
  if (all.length === 0) throw new Error('there is nothing to go through');
  return all;
}
