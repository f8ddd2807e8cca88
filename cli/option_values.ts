// Reading option values: each reader takes the text after a flag and returns a value, or says in one sentence what the
// flag takes. Checked before any weight is loaded.
import { existsSync } from 'node:fs';
import { didYouMean, UserError } from '../io/errors.ts';
import type { Size } from '../models/text/conditioning.ts';

/** What --device takes, for the help. */
export const devices = 'auto, cpu, cuda[:N] or reference';

/** Other programs' short words for types. */
const shortTypes = new Map([
  ['fp16', 'float16'],
  ['bf16', 'bfloat16'],
  ['fp32', 'float32'],
]);

/** One of a few words. */
export const oneOf =
  <T extends string>(flag: string, choices: readonly T[]) =>
  (text: string): T => {
    const found = choices.find((choice) => choice === text);
    if (found) return found;
    const hint = didYouMean(shortTypes.get(text.toLowerCase()) ?? text, choices);
    throw new UserError(`${flag} takes ${choices.join(', ')}, not "${text}"${hint}`);
  };

interface Bounds {
  min?: number;
  max?: number;
  whole?: boolean;
}

/** A finite number within bounds. */
export const number =
  (
    flag: string,
    { min = Number.NEGATIVE_INFINITY, max = Number.POSITIVE_INFINITY, whole = false }: Bounds = {},
  ) =>
  (text: string): number => {
    const value = Number(text);
    if (
      text.trim() === '' ||
      !Number.isFinite(value) ||
      value < min ||
      value > max ||
      (whole && !Number.isInteger(value))
    ) {
      const kind = whole ? 'a whole number' : 'a number';
      const from = Number.isFinite(min) ? ` from ${min}` : '';
      const to = Number.isFinite(max) ? ` to ${max}` : '';
      throw new UserError(`${flag} takes ${kind}${from}${to}, not "${text}"`);
    }
    return value;
  };

/** A part of a whole. */
export const fraction = (flag: string) => number(flag, { min: 0, max: 1 });

/** Numbers with commas between. */
export const numbers =
  (flag: string) =>
  (text: string): number[] =>
    text.split(',').map(number(flag));

/** Pixels of a side: latents are an eighth of it. */
export const side =
  (flag: string) =>
  (text: string): number => {
    const value = number(flag, { min: 8, whole: true })(text);
    if (value % 8)
      throw new UserError(
        `${flag} ${value} is not divisible by 8; ${value - (value % 8)} or ${value + 8 - (value % 8)} is`,
      );
    return value;
  };

/** `WxH`, as people write sizes, to [height, width], as the model wants them. */
export const size =
  (flag: string) =>
  (text: string): Size => {
    const match = /^(\d+)x(\d+)$/i.exec(text);
    if (!match) throw new UserError(`${flag} takes WIDTHxHEIGHT such as 1024x768, not "${text}"`);
    return [Number(match[2]), Number(match[1])];
  };

/** What `read` gives of a file; an error names the `flag` that named it. @throws UserError */
export function readFor<R>(flag: string, read: () => R): R {
  const named = (error: unknown): never => {
    throw error instanceof UserError ? new UserError(`${flag}: ${error.message}`) : error;
  };
  try {
    const result = read();
    return result instanceof Promise ? (result.catch(named) as R) : result;
  } catch (error) {
    return named(error);
  }
}

/** Two whole numbers with a comma between. */
export type Pair = [number, number];

/** `what` is how people write them. */
export const pair =
  (flag: string, what: string) =>
  (text: string): Pair => {
    const match = /^(\d+),(\d+)$/.exec(text);
    if (!match) throw new UserError(`${flag} takes ${what}, not "${text}"`);
    return [Number(match[1]), Number(match[2])];
  };

/** A file size such as 10GB (powers of ten, as diffusers' max_shard_size) or 10GiB. */
export const bytes =
  (flag: string) =>
  (text: string): number => {
    const match = /^(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?$/i.exec(text);
    if (!match || Number(match[1]) === 0)
      throw new UserError(`${flag} takes a size such as 10GB, not "${text}"`);
    const power = ' KMGT'.indexOf(match[2].toUpperCase() || ' ');
    return Math.floor(Number(match[1]) * (match[3] ? 1024 : 1000) ** power);
  };

/** A flag that may be given more than once: a list of what it is given. */
export const repeated =
  <T>(read: (text: string) => T) =>
  (text: string, all: readonly T[] = []): T[] => [...all, read(text)];

/** A list of texts, of a flag that may be given more than once. */
export const texts = repeated((text) => text);

/** `FILE:SCALE` as typed after `flag`. What is there by the whole name is no file with a scale. */
export function scaledFile(flag: string, text: string): { file: string; scale?: number } {
  if (existsSync(text)) return { file: text };
  const [, file, scale] = /^(.*?)(?::([-+]?[\d.]+(?:e[-+]?\d+)?))?$/is.exec(text) as RegExpExecArray;
  return { file, scale: scale === undefined ? undefined : number(`${flag} FILE:SCALE`)(scale) };
}
