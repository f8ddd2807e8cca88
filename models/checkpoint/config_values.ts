// What the values of a component's config.json may be, and rules that tell it in words, for requests too.

/** What a key must hold, in words, and whether a value is that. */
export type Rule = readonly [want: string, holds: (value: unknown) => boolean];

export const whole = (from: number, to = Number.POSITIVE_INFINITY): Rule => [
  `a whole number from ${from}${Number.isFinite(to) ? ` to ${to}` : ''}`,
  (value) => Number.isInteger(value) && (value as number) >= from && (value as number) <= to,
];

export const flag: Rule = ['true or false', (value) => typeof value === 'boolean'];

/** A list of at least so many. */
export const listOf = (what: string, holds: (each: unknown) => boolean, least = 0): Rule => [
  `a list of ${what}`,
  (value) => Array.isArray(value) && value.length >= least && value.every(holds),
];

/** A width, or a number of heads or groups. */
export const isCount = (value: unknown): boolean => Number.isInteger(value) && (value as number) > 0;

/** Layers that follow each other: more than any model has. The descriptions of a million would fill all memory. */
export const mostLayers = 100;

export const isLayerCount = (value: unknown): boolean => isCount(value) && (value as number) <= mostLayers;

export const isPositive = (value: unknown): boolean => Number.isFinite(value) && (value as number) > 0;

/** A list of `length` values, or of any number but none. */
export const isListOf = (is: (value: unknown) => boolean, value: unknown, length?: number): boolean =>
  Array.isArray(value) && value.length > 0 && value.length === (length ?? value.length) && value.every(is);
