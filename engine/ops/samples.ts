// The sizes at which kernels go wrong, for the `samples` of op records: one, primes, the text's 77 tokens, and both sides of
// the widths of vectors and tiles. There are nineteen, a prime number, so that stepping through them by 1, 2, 3, … takes
// each axis of an op through every size, in other company each time, without chance and without a table.
const sizes = [1, 2, 3, 5, 7, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 77, 127, 128, 129];

/** Nineteen rows; a record takes as many sizes from each as it has axes. */
export const awkwardSizes: readonly (readonly number[])[] = sizes.map((_, i) =>
  sizes.map((_, axis) => sizes[(i * (axis + 1) + axis) % sizes.length]),
);

/** Their first two: shapes for ops that see rows. */
export const awkwardShapes: readonly (readonly number[])[] = awkwardSizes.map((row) => row.slice(0, 2));
