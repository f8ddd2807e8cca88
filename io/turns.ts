// Long work cut into pieces: a generator yields between them, and whoever drives it says what happens there.

/** Does all of the work in one go. */
export function atOnce<R>(work: Generator<unknown, R>): R {
  for (;;) {
    const piece = work.next();
    if (piece.done) return piece.value;
  }
}

/**
 * Does the work to its end. Between the pieces others have their turn: signals are heard, a server answers. `onPiece` is waited for
 * where it gives a promise, and may leave by throwing; the work then clears away what it holds.
 */
export async function inTurns<T, R>(
  work: Generator<T, R>,
  onPiece: (told: T) => unknown = () => {},
): Promise<R> {
  for (;;) {
    const piece = work.next();
    if (piece.done) return piece.value;
    await new Promise((resolve) => setImmediate(resolve));
    try {
      await onPiece(piece.value);
    } catch (error) {
      work.throw(error); // frees what the work holds, and throws on
    }
  }
}
