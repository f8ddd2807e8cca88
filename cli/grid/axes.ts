// The axes of `sdxl grid`: NAME=VALUES, the values as A1111's X/Y/Z plot reads them, by commas as in CSV, and of numbers ranges. What a
// value means is for the flag of `sdxl sample` to say that has the name. A1111's range of fractions may go past its end; none does here.
import type { Command, Option } from 'commander';
import { didYouMean, UserError } from '../../io/errors.ts';
import { spelledOut } from '../aliases.ts';
import { seedFor } from '../sample/call.ts';
import { listOptions } from '../sample/picture_settings.ts';

export interface Axis {
  /** --x, --y or --z. */
  flag: string;
  /** Empty where the flag was not given: such an axis has one value, which is empty. */
  name: string;
  /** The flag of `sdxl sample` that has the name. */
  option?: Option;
  values: readonly string[];
}

export type Axes = readonly [x: Axis, y: Axis, z: Axis];

/** A1111's "Prompt S/R": the first value is searched, and each stands in its place. */
export const replacing = 'prompt-sr';

/** Flags of `sdxl sample` that say of several pictures, or of other files. */
export const notOfGrids: readonly string[] = [
  ...['saveLatents', 'promptFile', 'batchCount', 'numImages'],
  ...['preview', 'previewInterval', 'previewPath', 'tae'],
];

/** And those that hold for all cells. */
const notOfCells = [...notOfGrids, 'from', 'output', 'json', 'quiet', 'x', 'y', 'z', 'subImages'];

/** So many cells a grid may have: more are looked at by nobody. */
const mostCells = 1000;

/** @throws UserError for what is no axis of a command with the flags of `sdxl sample`, for none, and for two that say the same */
export function readAxes(command: Command, { x, y, z }: { x?: string; y?: string; z?: string }): Axes {
  const axes: Axes = [readAxis('--x', x, command), readAxis('--y', y, command), readAxis('--z', z, command)];
  const named = axes.filter(({ name }) => name);
  if (named.length === 0)
    throw new UserError('no axis given; say what differs with --x guidance-scale=3,5,7');
  for (const [i, { flag, name, option }] of named.entries()) {
    const other = named.slice(0, i).find((each) => each.name === name);
    if (other && option && !listOptions.includes(option.attributeName()))
      throw new UserError(`${other.flag} and ${flag} both say ${name}: leave one out`);
  }
  const cells = axes.reduce((product, { values }) => product * values.length, 1);
  if (cells > mostCells)
    throw new UserError(`${cells} cells are more than the ${mostCells} of a grid; give fewer values`);
  return axes;
}

function readAxis(flag: string, text: string | undefined, { options }: Command): Axis {
  if (text === undefined) return { flag, name: '', values: [''] };
  const [, typed, list = ''] = /^([^=]*)=?(.*)$/s.exec(text) as RegExpExecArray;
  if (list.trim() === '')
    throw new UserError(`${flag} takes NAME=VALUES such as guidance-scale=3,5,7, not "${text}"`);
  const name = spelledOut([`--${typed.trim()}`])[0].slice(2);
  const values = valuesIn(flag, list);
  if (name === replacing) {
    if (values[0]) return { flag, name, values };
    throw new UserError(`${flag} ${name}= begins with the words of the prompt that the others replace`);
  }
  const known = options.filter((each) => !notOfCells.includes(each.attributeName()));
  const option = known.find(({ long }) => long === `--${name}`);
  if (!option) {
    const names = [...known.map(({ long }) => String(long).slice(2)), replacing];
    throw new UserError(
      `${flag} takes the name of a flag of sdxl sample that cells may differ in, or ${replacing}, not "${typed}"${didYouMean(name, names)}`,
    );
  }
  const [, kind] = /<([NF])>$/.exec(option.flags) ?? [];
  const all = kind ? values.flatMap((value) => numbersIn(flag, value, kind === 'N')) : values;
  const isSeed = name === 'seed' || name === 'subseed';
  return { flag, name, option, values: all.map((each) => (isSeed && each === '-1' ? `${seedFor()}` : each)) };
}

/** Values by commas, one with commas in quotes, and its quotes twice. */
function valuesIn(flag: string, text: string): string[] {
  const field = /\s*(?:"((?:[^"]|"")*)"|([^",][^,]*|))\s*(,|$)/y;
  const values: string[] = [];
  for (let more = true; more; ) {
    const found = field.exec(text);
    if (!found)
      throw new UserError(`${flag} ${text}: a quote stands alone; quote a value from its start to its end`);
    const [, quoted, plain, end] = found;
    values.push((quoted?.replaceAll('""', '"') ?? plain).trim());
    more = end === ',';
  }
  return values;
}

/** `1-5`, `1-5 (+2)` by steps, `10-20 [3]` so many; what is no range as it is. */
function numbersIn(flag: string, text: string, whole: boolean): string[] {
  const number = String.raw`[+-]?\d+${whole ? '' : String.raw`(?:\.\d*)?`}`;
  const range = new RegExp(
    `^(${number})\\s*-\\s*(${number})\\s*(?:\\((${number})\\s*\\)|\\[(\\d+)\\s*\\])?$`,
  );
  const found = range.exec(text);
  if (!found) return [text];
  const [from, to] = found.slice(1, 3).map(Number);
  const by = found[3] === undefined ? Math.sign(to - from) || 1 : Number(found[3]);
  // A sum of fractions may end a little below where it should.
  const count = found[4] === undefined ? Math.floor((to - from) / by + 1e-9) + 1 : Number(found[4]);
  if (!(count >= 1 && count <= mostCells))
    throw new UserError(
      `${flag}: ${text} is a range of ${count >= 1 ? `more than ${mostCells}` : 'no'} values`,
    );
  const step = found[4] === undefined ? by : (to - from) / Math.max(1, count - 1);
  return Array.from({ length: count }, (_, i) => {
    const value = Number((from + i * step).toFixed(8));
    return String(whole ? Math.trunc(value) : value);
  });
}

/** What stands beside a row or over a column: of files without the folders that all are in. */
export function labelsOf({ name, option, values }: Axis): string[] {
  if (!option) return [...values];
  const folders = values
    .filter((each) => each !== '')
    .map((each) => each.slice(0, each.lastIndexOf('/') + 1));
  const shared = folders.reduce((a, b) => {
    let folder = a;
    while (!b.startsWith(folder)) folder = folder.slice(0, folder.slice(0, -1).lastIndexOf('/') + 1);
    return folder;
  }, folders[0] ?? '');
  const cut = /FILE|DIR/.test(option.flags) ? shared.length : 0;
  return values.map((value) => (value === '' ? `no ${name}` : `${name}: ${value.slice(cut)}`));
}

/** As it may be typed. */
export const typedAs = ({ values }: Axis): string =>
  values.map((each) => (/[",]/.test(each) ? `"${each.replaceAll('"', '""')}"` : each)).join(',');
