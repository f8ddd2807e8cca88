// What the numbers in a component's config.json may be.

/** A width, or a number of layers, heads or groups. */
export const isCount = (value: unknown): boolean => Number.isInteger(value) && (value as number) > 0;

export const isPositive = (value: unknown): boolean => Number.isFinite(value) && (value as number) > 0;

/** A list of `length` values, or of any number but none. */
export const isListOf = (is: (value: unknown) => boolean, value: unknown, length?: number): boolean =>
  Array.isArray(value) && value.length > 0 && value.length === (length ?? value.length) && value.every(is);
