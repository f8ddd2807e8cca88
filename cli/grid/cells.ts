// The cells of `sdxl grid`: each is a call of `sdxl sample` with a value of each axis among its flags, read by these flags and planned
// before the first is drawn. A mistake is told with the values that make it.
import { Command } from 'commander';
import { UserError } from '../../io/errors.ts';
import { readPicture } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import { shippedModel } from '../model.ts';
import { oneOf, readFor } from '../option_values.ts';
import { adapterOf } from '../sample/adapter_options.ts';
import { planCall, type SampleCall, seedFor } from '../sample/call.ts';
import { controlnetOf } from '../sample/control_options.ts';
import { addSampleFlags } from '../sample/flags.ts';
import { refuseHalfDone, unreadWeights } from '../sample/idle_flags.ts';
import { ipAdapterOf } from '../sample/ip_adapter_options.ts';
import { openingOptions } from '../sample/models.ts';
import {
  checkSample,
  checkSizes,
  checkTexts,
  promptsOf,
  type SampleOptions,
  textsOf,
} from '../sample/options.ts';
import { applySettings } from '../sample/picture_settings.ts';
import { readInputs } from '../sample/request.ts';
import { locateSources, namingOptions, type Sources } from '../sample/sources.ts';
import { withStyles } from '../sample/styles.ts';
import type { Terminal } from '../terminal.ts';
import { type Axes, type Axis, replacing } from './axes.ts';

export interface Cell {
  /** Places on the axes x, y and z. */
  at: readonly [x: number, y: number, z: number];
  options: SampleOptions & { model: string };
  sources: Sources;
  call: SampleCall;
  /** The same call anew: to draw one uses its seed's numbers up. */
  again(): SampleCall;
}

/** A value of an axis. */
interface Choice {
  axis: Axis;
  value: string;
}

const said = ({ axis: { flag, name }, value }: Choice): string => `${flag} ${name}=${value}`;

/** All cells, row by row, grid by grid. `typed` has what they share. @throws UserError for the first that cannot be drawn */
export async function planCells(typed: Command, axes: Axes, terminal: Terminal): Promise<Cell[]> {
  const plan = planner(typed, terminal);
  const [xs, ys, zs] = axes.map((axis) => axis.values.map((value) => ({ axis, value })));
  const cells: Cell[] = [];
  for (const [iz, z] of zs.entries())
    for (const [iy, y] of ys.entries())
      for (const [ix, x] of xs.entries()) {
        const chosen = [x, y, z].filter(({ axis }) => axis.name);
        try {
          cells.push({ at: [ix, iy, iz], ...(await plan(chosen)) });
        } catch (error) {
          throw error instanceof UserError ? await named(error, chosen, plan) : error;
        }
      }
  return cells;
}

/** A mistake with the fewest values that make it: none where it is in what all cells share. */
async function named(
  { message }: UserError,
  chosen: readonly Choice[],
  plan: (chosen: readonly Choice[]) => Promise<unknown>,
): Promise<UserError> {
  const isOf = (some: readonly Choice[]) =>
    plan(some).then(
      () => false,
      (error: Error) => error.message === message,
    );
  for (const some of [[], ...chosen.map((each) => [each])])
    if (await isOf(some)) return new UserError([...some.map(said), message].join(': '));
  return new UserError(`${chosen.map(said).join(', ')}: ${message}`);
}

/** Makes what a key is of at its first call. */
function once<R>() {
  const known = new Map<string, R>();
  return (key: string, make: () => R): R => {
    if (!known.has(key)) known.set(key, make());
    return known.get(key) as R;
  };
}

/** What plans a cell, with all that cells may share found and read once, and told once. */
function planner(typed: Command, terminal: Terminal) {
  const [told, read, found] = [once<void>(), once<Promise<Picture>>(), once<Promise<Sources>>()];
  const tell = (line: string) => told(line, () => terminal.err(`${line}\n`));
  const shared = { seed: seedFor(), subseed: seedFor() };
  return async (chosen: readonly Choice[]): Promise<Omit<Cell, 'at'>> => {
    const { notes, given, meansWords } = optionsOf(typed, chosen);
    const { model = shippedModel, subseedStrength, quiet = false } = given;
    const fixed = (name: 'seed' | 'subseed') => ((given[name] ?? -1) < 0 ? shared[name] : given[name]);
    const seeds = { seed: fixed('seed'), subseed: subseedStrength ? fixed('subseed') : given.subseed };
    const options = withStyles({ ...given, ...seeds, model, numImages: 1 });
    checkSample(options);
    refuseHalfDone(options);
    if (!given.model && !quiet)
      tell('using the emoji model that comes with sdxl (64x64 pixels); name another with --model');
    const prompts = promptsOf(options);
    if (prompts.length > 1)
      throw new UserError(
        `a cell shows one picture, and there are ${prompts.length} prompts: give one --prompt, and none where an axis has them`,
      );
    const unread = unreadWeights(meansWords ? [] : textsOf(options, prompts));
    for (const line of [...notes, ...checkTexts(options, prompts), ...checkSizes(options), ...unread])
      tell(`warning: ${line}`);
    const inputs = await readInputs(options, (path, flag) =>
      read(path, () => readFor(flag, () => readPicture(path))),
    );
    const naming = JSON.stringify(namingOptions.map((name) => options[name]));
    const sources = await found(naming, () => locateSources(options, terminal));
    const again = () => planCall(options, sources, inputs, prompts);
    return { options, sources, call: again(), again };
  };
}

/** What `sdxl sample` would have been told. */
interface Told {
  given: SampleOptions;
  notes: string[];
  /** Whether it is said that brackets in prompts are no weights. */
  meansWords: boolean;
}

function optionsOf(typed: Command, chosen: readonly Choice[]): Told {
  const cell = addSampleFlags(new Command('sample'));
  for (const option of cell.options) {
    const name = option.attributeName();
    if (typed.getOptionValueSource(name) === 'cli')
      cell.setOptionValueWithSource(name, typed.getOptionValue(name), 'cli');
  }
  const replaced = chosen.filter(({ axis }) => axis.name === replacing);
  for (const { axis, value } of chosen) {
    if (!axis.option || value === '') continue;
    const { option } = axis;
    const name = option.attributeName();
    const read = option.isBoolean()
      ? (text: string) => oneOf(`--${axis.name}`, ['on', 'off'])(text) === 'on' || undefined
      : (option.parseArg ?? ((text: string) => text));
    cell.setOptionValueWithSource(name, read(value, cell.getOptionValue(name)), 'cli');
  }
  const { from } = cell.opts<SampleOptions>();
  const notes = from ? applySettings(cell, from) : [];
  const meansWords = cell.getOptionValueSource('emphasis') !== 'default';
  return { notes, meansWords, given: replaced.reduce(replacedIn, cell.opts<SampleOptions>()) };
}

/** As A1111, in the prompt and the negative prompt. */
function replacedIn(options: SampleOptions, { axis, value }: Choice): SampleOptions {
  const [old] = axis.values;
  const { prompt, negativePrompt } = options;
  if (![...(prompt ?? []), negativePrompt].some((text) => text?.includes(old)))
    throw new UserError(`neither --prompt nor --negative-prompt has "${old}", which is to be replaced`);
  return {
    ...options,
    prompt: prompt?.map((text) => text.replaceAll(old, value)),
    negativePrompt: negativePrompt?.replaceAll(old, value),
  };
}

/** What may differ between cells that one opened model draws: LoRAs are put into it, and of what is beside it scales may change. */
const ofOpenModel: readonly string[] = [
  ...['lora', 'upscaleModel', 'hiresUpscaler', 'aestheticScore', 'negativeAestheticScore'],
  ...['controlnet', 'adapter', 'ipAdapter'],
];

const openedBy = ({ options }: Cell): string =>
  JSON.stringify([
    ...[...namingOptions, ...openingOptions]
      .filter((name) => !ofOpenModel.includes(name))
      .map((name) => options[name]),
    options.controlnet?.map((text) => controlnetOf(text).file),
    options.adapter?.map((text) => adapterOf(text).file),
    options.ipAdapter?.map((text) => ipAdapterOf(text).file),
  ]);

/** Cells that one opened model draws together, and of these one after the other what has the same LoRAs. */
export function groupsOf(cells: readonly Cell[]): Cell[][] {
  const by = (some: readonly Cell[], keyOf: (cell: Cell) => string): Cell[][] => {
    const groups = new Map<string, Cell[]>();
    for (const cell of some) groups.set(keyOf(cell), [...(groups.get(keyOf(cell)) ?? []), cell]);
    return [...groups.values()];
  };
  return by(cells, openedBy).map((group) => by(group, ({ call }) => JSON.stringify(call.adapters)).flat());
}
