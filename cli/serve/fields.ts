// A request's keys, read one by one into options of `sdxl sample`, whatever other program's words they are in. Each value goes through
// the reader of the flag, so that a number is bounded alike wherever it comes from.
import { UserError } from '../../io/errors.ts';
import { number, oneOf } from '../option_values.ts';
import type { Settings } from './messages.ts';

/** A request's keys. */
export type Body = Readonly<Record<string, unknown>>;

/** What a key's value comes to, or a sentence's error. */
export type Field = (value: unknown, key: string) => Settings;

/** Of a text, ten times what 225 tokens hold: no signal reaches the process that draws while it takes one apart. */
const mostLetters = 10_000;

/** @throws UserError for what is no text, or a very long one */
export function textOf(value: unknown, key: string): string {
  if (typeof value !== 'string') throw new UserError(`${key} takes a text, not ${JSON.stringify(value)}`);
  if (value.length > mostLetters)
    throw new UserError(`${key} has ${value.length} letters, and ${mostLetters} is the most`);
  return value;
}

export const text =
  (option: keyof Settings): Field =>
  (value, key) => ({ [option]: textOf(value, key) });

export const prompt: Field = (value, key) => ({ prompt: [textOf(value, key)] });

/** A text, or nothing where it is empty. */
export const said = (body: Body, key: string): string | undefined =>
  body[key] === null || body[key] === undefined ? undefined : textOf(body[key], key) || undefined;

/** Names and labels of one thing: `sgm_uniform` is "SGM Uniform". */
export const plain = (name: string): string => name.toLowerCase().replace(/[^a-z0-9+]/g, '');
export const labelled = <T extends string>(key: string, value: string, labels: readonly T[]): T =>
  labels.find((label) => plain(label) === plain(value)) ?? oneOf(key, labels)(value);

type Bounds = Parameters<typeof number>[1];

/** A number or a text as a text; anything else as JSON, as which errors show it: not every object has another. */
export const spelled = (value: unknown): string =>
  typeof value === 'number' || typeof value === 'string' ? `${value}` : JSON.stringify(value);

/** A number, or a text that is one. @throws UserError */
export const numberOf = (value: unknown, key: string, bounds?: Bounds): number =>
  number(key, bounds)(spelled(value));

/** Python's clients have numbers for it, too. @throws UserError, also for a text: "false" would hold */
export function booleanOf(value: unknown, key: string): boolean {
  if (value === true || value === 1) return true;
  if (value === false || value === 0) return false;
  throw new UserError(`${key} takes true or false, not ${JSON.stringify(value)}`);
}

export const numeric =
  (option: keyof Settings, bounds: Bounds): Field =>
  (value, key) => ({ [option]: numberOf(value, key, bounds) });

/** Says nothing of the picture, or only what holds here anyway. */
export const unheeded: Field = () => ({});

/** Someone wants what is not there. */
class NotThere extends UserError {
  /** The key with its value. */
  readonly wanted: string;

  constructor(wanted: string, key: string) {
    super(`${wanted} is not there; leave ${key} out`);
    this.wanted = wanted;
  }
}

/** Something that is not there: only what means that it is not wanted is taken. */
export const only =
  (...neutral: readonly unknown[]): Field =>
  (value, key) => {
    if (neutral.some((each) => JSON.stringify(each) === JSON.stringify(value))) return {};
    throw new NotThere(`${key} ${JSON.stringify(value)?.slice(0, 60)}`, key);
  };

/**
 * The keys of `body` by a table; null is what is left out. `unknown` hears of keys that are in no table, which change nothing. All that is
 * not there is told of at once: a body may be an example that has every key.
 */
export function readFields(
  body: Body,
  fields: Readonly<Record<string, Field>>,
  unknown: (key: string) => void,
): Settings {
  const absent: NotThere[] = [];
  const read = Object.entries(body).map(([key, value]): Settings => {
    if (value === null || value === undefined) return {};
    try {
      if (Object.hasOwn(fields, key)) return fields[key](value, key);
    } catch (error) {
      if (!(error instanceof NotThere)) throw error;
      absent.push(error);
      return {};
    }
    unknown(key);
    return {};
  });
  if (absent.length === 1) throw absent[0];
  if (absent.length > 1)
    throw new UserError(`${absent.map(({ wanted }) => wanted).join(', ')} are not there; leave them out`);
  return Object.assign({}, ...read);
}

/** The bytes of a picture in base64, or in a data URL. @throws UserError */
export function pictureBytes(value: unknown, key: string): Buffer {
  const encoded = typeof value === 'string' ? value.replace(/^data:image\/[\w.+-]+;base64,/, '') : '';
  const compact = encoded.replace(/\s+/g, '');
  if (compact === '' || !/^[A-Za-z0-9+/_-]*={0,2}$/.test(compact))
    throw new UserError(`${key} takes a picture's file in base64`);
  return Buffer.from(compact, 'base64');
}

export const base64 = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64');
