// The checks behind a run file: a field is a default and a test of what may stand there, and a table of fields has the
// same nesting as the run it describes. Filling a table from a user's object names every unknown key with the one that is
// meant, as far as that can be known, and every value of the wrong kind with its place.
import { inspect } from 'node:util';
import { didYouMean, UserError } from '../../io/errors.ts';
import { isRecord } from '../../io/json.ts';
import { foreignKeys } from './foreign_keys.ts';

export interface Field<T> {
  readonly kind: 'field';
  readonly fallback: T;
  /** What may stand here, in words, where `value` may not. */
  readonly wants: string;
  /** The words it takes, where it takes a few. */
  readonly choices?: readonly string[];
  accepts(value: unknown): boolean;
  /** Looks into what is accepted, which stands at `path`. @throws UserError for a key in it that is unknown or unfit */
  check?(value: unknown, where: string, path: string): void;
}

/** A table with a field for every key of T; plain objects nest, anything else is one field. */
export type Fields<T> = {
  readonly [K in keyof T]-?: Field<T[K]> | (T[K] extends object ? Fields<T[K]> : never);
};

const field = <T>(fallback: T, wants: string, accepts: (value: unknown) => boolean): Field<T> => ({
  kind: 'field',
  fallback,
  wants,
  accepts,
});

interface Bounds {
  min?: number;
  max?: number;
  below?: number;
}

const within = (value: unknown, { min = -Infinity, max = Infinity, below = Infinity }: Bounds): boolean =>
  typeof value === 'number' && Number.isFinite(value) && value >= min && value <= max && value < below;

const range = ({ min, max, below }: Bounds): string =>
  [
    min === undefined ? '' : ` from ${min}`,
    max === undefined ? '' : ` to ${max}`,
    below === undefined ? '' : ` to below ${below}`,
  ].join('');

export const number = (fallback: number, bounds: Bounds = {}): Field<number> =>
  field(fallback, `a number${range(bounds)}`, (value) => within(value, bounds));

export const whole = (fallback: number, bounds: Bounds = { min: 0 }): Field<number> =>
  field(
    fallback,
    `a whole number${range(bounds)}`,
    (value) => Number.isInteger(value) && within(value, bounds),
  );

/** Where random numbers begin: what is larger is no longer told from its neighbours, and begins as one of them. */
export const seed = (): Field<number> => whole(0, { min: 0, max: Number.MAX_SAFE_INTEGER });

/** How many of something, or below 1 a share of all. */
export const countOrShare = (fallback: number): Field<number> =>
  field(
    fallback,
    'a whole number, or a share below 1',
    (value) => within(value, { min: 0 }) && (Number.isInteger(value) || (value as number) < 1),
  );

export const text = (fallback: string): Field<string> =>
  field(fallback, 'a text', (value) => typeof value === 'string');

/** A text that something stands in. */
export const filled = (fallback: string): Field<string> =>
  field(fallback, 'a text that is not empty', (value) => typeof value === 'string' && value !== '');

export const flag = (fallback: boolean): Field<boolean> =>
  field(fallback, 'true or false', (value) => typeof value === 'boolean');

export const choice = <T extends string>(fallback: T, ...choices: readonly T[]): Field<T> => ({
  ...field(fallback, choices.map((c) => `"${c}"`).join(' or '), (value) => choices.includes(value as T)),
  choices,
});

/** The entries, and undefined where a comma too many leaves a hole, which `every` would pass over. */
const entriesOf = (value: readonly unknown[]): unknown[] => Array.from(value);

/** A list whose entries all pass `entry`. */
export const list = <T>(fallback: readonly T[], entry: Field<T>): Field<readonly T[]> => ({
  ...field(
    fallback,
    `a list, each entry ${entry.wants}`,
    (value) => Array.isArray(value) && entriesOf(value).every(entry.accepts),
  ),
  check: (value, where, path) =>
    (value as readonly T[]).forEach((each, i) => {
      entry.check?.(each, where, `${path}[${i}]`);
    }),
});

/** What passes `entry`, or a list of `most` such at the most, which is not empty. */
export const oneOrMore = <T>(fallback: T, entry: Field<T>, most = Infinity): Field<T | readonly T[]> =>
  field<T | readonly T[]>(
    fallback,
    `${entry.wants}, or a list of ${most === Infinity ? '' : `up to ${most} `}such`,
    (value) => {
      const entries = entriesOf([value].flat());
      return entries.length > 0 && entries.length <= most && entries.every(entry.accepts);
    },
  );

/** Two entries that both pass `entry`. */
export const pair = <T>(fallback: readonly [T, T], entry: Field<T>): Field<readonly [T, T]> =>
  field(
    fallback,
    `a list of two, each ${entry.wants}`,
    (value) => Array.isArray(value) && value.length === 2 && entriesOf(value).every(entry.accepts),
  );

/** A text, or an object that is taken as it stands; whoever uses it checks it. */
export const textOrObject = <T extends object>(wants: string): Field<string | T> =>
  field<string | T>('', wants, (value) => typeof value === 'string' || isRecord(value));

/** A text, or an object of these keys, of which `needed` is there. What else is absent stays so. */
export const textOrRecord = <T extends object>(
  keys: Fields<T>,
  needed: keyof T & string,
): Field<string | T> => ({
  ...textOrObject<T>(`a text, or an object such as { ${needed}: "..." }`),
  check(value, where, path) {
    if (typeof value === 'string') return;
    fill(keys, value, where, `${path}.`);
    if ((value as Partial<T>)[needed] === undefined)
      throw new UserError(
        `${where}: "${path}" has no "${needed}"; its keys are ${Object.keys(keys).join(', ')}`,
      );
  },
});

const isField = (entry: unknown): entry is Field<unknown> => isRecord(entry) && entry.kind === 'field';

/** `given` with every absent key at its default. @throws UserError naming the first key that is unknown or unfit */
export function fill<T>(
  fields: Fields<T>,
  given: unknown,
  where: string,
  path = '',
  root: object = fields,
): T {
  if (!isRecord(given))
    throw new UserError(
      `${where}: ${path ? `"${path.slice(0, -1)}"` : 'the run'} is ${show(given)}; write an object { ... }`,
    );
  for (const key of Object.keys(given)) {
    if (!Object.hasOwn(fields, key)) {
      throw new UserError(
        `${where}: unknown key "${path}${key}"${suggestion(root, fields, path, key) || `; the keys here are ${Object.keys(fields).join(', ')}`}`,
      );
    }
  }
  const entries = Object.entries(fields as Record<string, unknown>).map(([key, entry]) => {
    const value = given[key];
    if (!isField(entry))
      return [key, fill(entry as Fields<unknown>, value ?? {}, where, `${path}${key}.`, root)] as const;
    if (value === undefined) return [key, entry.fallback] as const;
    if (!entry.accepts(value))
      throw new UserError(
        `${where}: "${path}${key}" is ${show(value)}; it takes ${entry.wants}${nearChoice(entry, value)}`,
      );
    entry.check?.(value, where, `${path}${key}`);
    return [key, value] as const;
  });
  return Object.fromEntries(entries) as T;
}

const show = (value: unknown): string => {
  if (typeof value === 'function') return 'a function';
  // JSON has no NaN and no Infinity.
  if (typeof value === 'number') return String(value);
  return (asJson(value) ?? inspect(value, { compact: true, breakLength: Infinity })).slice(0, 80);
};

/** Undefined for what JSON cannot say: nothing, a bigint, an object that holds itself. */
function asJson(value: unknown): string | undefined {
  try {
    return JSON.stringify(value);
  } catch {
    return undefined;
  }
}

/** Where an unknown key belongs, or the nearest one; with `; ` before it, or nothing. `path` ends with a dot. */
function suggestion(root: object, table: object, path: string, key: string): string {
  const places = [...placesOf(root, key)];
  const foreign = Object.hasOwn(foreignKeys, key) ? [foreignKeys[key]].flat() : undefined;
  const meant = (foreign ?? (places.length === 1 ? places : [])).map((place) => {
    const own = place.split('.').at(-1) as string;
    return `"${Object.hasOwn(table, own) ? `${path}${own}` : place}"`;
  });
  if (meant.length > 0) return `; here it is ${meant.join(' or ')}`;
  return didYouMean(key, Object.keys(table)).replace('"', `"${path}`);
}

/** Every path of a table of fields that ends in `key`. */
function* placesOf(table: object, key: string, path = ''): Generator<string> {
  for (const [name, entry] of Object.entries(table)) {
    if (name === key && isField(entry)) yield `${path}${name}`;
    else if (!isField(entry)) yield* placesOf(entry, key, `${path}${name}.`);
  }
}

const nearChoice = ({ choices = [] }: Field<unknown>, value: unknown): string =>
  typeof value === 'string' ? didYouMean(value, choices) : '';

/**
 * Applies `key.key=value` over a filled run, in place. The value keeps the type of what stands there: a number stays a number, a list
 * is written as JSON or with commas, and nothing is an empty one.
 * @throws UserError for a key that is not there or a value that does not fit
 */
export function override<T>(fields: Fields<T>, run: T, assignment: string): void {
  const at = assignment.indexOf('=');
  if (at < 1) throw new UserError(`--set takes KEY=VALUE such as optimizer.lr=5e-6, not "${assignment}"`);
  const [path, written] = [assignment.slice(0, at), assignment.slice(at + 1)];
  let table: unknown = fields;
  let target: unknown = run;
  const keys = path.split('.');
  keys.forEach((key, i) => {
    if (isField(table) || !isRecord(table) || !Object.hasOwn(table, key)) {
      const known = isField(table) ? [] : Object.keys(table as object);
      const prefix = keys.slice(0, i).join('.');
      const near = isField(table) ? '' : suggestion(fields, table as object, prefix && `${prefix}.`, key);
      throw new UserError(
        `--set ${assignment}: no key "${path}"${near || (known.length ? `; the keys ${prefix ? `of ${prefix}` : 'here'} are ${known.join(', ')}` : '')}`,
      );
    }
    table = table[key];
    if (i < keys.length - 1) target = (target as Record<string, unknown>)[key];
  });
  if (!isField(table)) {
    throw new UserError(
      `--set ${assignment}: "${path}" is a group; name one of its keys: ${Object.keys(table as object).join(', ')}`,
    );
  }
  const value = parse(written, table);
  if (value === undefined)
    throw new UserError(`--set ${assignment}: "${path}" takes ${table.wants}${nearChoice(table, written)}`);
  table.check?.(value, `--set ${assignment}`, path);
  (target as Record<string, unknown>)[keys[keys.length - 1]] = value;
}

/** The readings of a written value that the field may accept, the plainest first. */
function parse(written: string, entry: Field<unknown>): unknown {
  const readings: unknown[] = [];
  if (written.trim() !== '' && !Number.isNaN(Number(written))) readings.push(Number(written));
  try {
    readings.push(JSON.parse(written));
  } catch {
    // Not JSON: a bare text or a list with commas.
  }
  const parts = written.trim() === '' ? [] : written.split(',').map((part) => part.trim());
  const numbers = parts.map((part) => (part === '' ? Number.NaN : Number(part)));
  readings.push(numbers, parts, written);
  const fitting = readings.filter((reading) => entry.accepts(reading));
  // A key that holds a text takes "12" as that text.
  return typeof entry.fallback === 'string' && entry.accepts(written) ? written : fitting[0];
}
