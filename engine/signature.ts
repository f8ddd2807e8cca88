// A kernel's signature says what its parameters are: p a pointer, i an int, f a float, d a double. A call is checked against it, because
// neither C nor a GPU would notice a wrong one.

/** Throws where arguments do not fit a signature. */
export function checkArguments(symbol: string, signature: string, args: readonly (bigint | number)[]): void {
  let fit = signature.length === args.length;
  for (let i = 0; fit && i < args.length; i++) fit = (typeof args[i] === 'bigint') === (signature[i] === 'p');
  if (!fit) throw mismatch(symbol, signature, args);
}

/** The error of a call whose arguments do not fit, naming both sides. */
export function mismatch(symbol: string, signature: string, args: readonly unknown[]): Error {
  const letters: Record<string, string> = { bigint: 'p', number: 'n' };
  const given = args.map((argument) => letters[typeof argument] ?? 'b').join('');
  return new Error(
    `${symbol} takes (${signature}), got (${given}): p pointer, i int, f float, d double, n number, b bytes`,
  );
}
