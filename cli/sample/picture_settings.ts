// The settings that a picture carries: A1111's `parameters` text (a1111.ts), and our own JSON under the keyword `sdxl`,
// which says everything. `--from` reads either back; the file comes from a stranger, so each value goes through the same
// reader as if it had been typed.
import type { Command } from 'commander';
import { UserError } from '../../io/errors.ts';
import { readPngText } from '../../io/png.ts';
import type { Request } from '../../models/request.ts';
import type { Sampler } from '../../models/samplers/sampler.ts';
import { readFor } from '../option_values.ts';
import { type Parameters, readParameters } from './a1111_read.ts';
import { writeParameters } from './a1111_write.ts';
import type { SampleOptions } from './options.ts';
import { loraTagsIn } from './prompt_loras.ts';

/** What of a request depends on this machine or this call rather than on the picture. */
const local = [
  ...['from', 'promptFile', 'batchCount', 'output', 'saveLatents', 'json', 'quiet', 'device'],
  ...['preview', 'previewInterval', 'previewPath', 'tae', 'style', 'stylesFile'],
];

/** Options that may be given more than once and are kept as lists. */
export const listOptions = [
  'style',
  'lora',
  'textualInversion',
  'adapter',
  'adapterImage',
  'ipAdapter',
  'ipAdapterImage',
  'ipAdapterMask',
  'controlnet',
  'controlImage',
  'controlMode',
  'controlGuidanceStart',
  'controlGuidanceEnd',
  'controlBalance',
  'pagAppliedLayers',
];

/** Ways to say one thing, how the steps lie and how large a second pass is: typed, one of them stands for all. */
const ways = [
  ['steps', 'timesteps', 'sigmas'],
  ['hiresScale', 'hiresWidth', 'hiresHeight'],
];

/** The texts to put into the PNG. `sampler` is the one that ran, and `hiresSampler` that of a second pass, where it was another. */
export function pictureText(
  options: SampleOptions,
  request: Request,
  seed: number,
  sampler: Sampler,
  hiresSampler?: Sampler,
): Record<string, string> {
  const { prompt: [prompt] = [''], width, height } = request;
  // A folder that no prompt asks for need not be there when the picture is drawn again.
  const loraModelDir = loraTagsIn(prompt).length > 0 ? options.loraModelDir : undefined;
  const settings = Object.entries({ ...options, loraModelDir, prompt, width, height, seed })
    .filter(([name, value]) => value !== undefined && !local.includes(name))
    .map(([name, value]): [string, unknown] => [name, typed(name, value)])
    // In one order, so that settings read back with --from give the same file.
    .sort(([a], [b]) => (a < b ? -1 : 1));
  return {
    parameters: writeParameters(options, request, seed, sampler, hiresSampler),
    sdxl: JSON.stringify(Object.fromEntries(settings)),
  };
}

/** A value as it is typed after its flag: sizes are kept as [height, width] and typed as WIDTHxHEIGHT. */
function typed(name: string, value: unknown): unknown {
  if (!Array.isArray(value) || listOptions.includes(name)) return value;
  return name.endsWith('Size') ? `${value[1]}x${value[0]}` : value.join(',');
}

/**
 * Sets every option that was not typed to what the picture at `path` says. Prompts of a file stand for its own. Returns what
 * made the picture besides, and is neither taken nor typed.
 */
export function applySettings(command: Command, path: string): string[] {
  const isTyped = (name: string): boolean =>
    ![undefined, 'default'].includes(command.getOptionValueSource(name)) ||
    (name === 'prompt' && isTyped('promptFile'));
  const { settings, further } = readFor('--from', () => readSettings(path, isTyped('loraModelDir')));
  // Asked now, as what is set below counts as typed.
  const said = ways.filter((names) => names.some(isTyped)).flat();
  const untaken = further.filter(({ option }) => option === undefined || !isTyped(option));
  for (const option of command.options) {
    const name = option.attributeName();
    const value = settings[name];
    if (value === undefined || local.includes(name) || isTyped(name)) continue;
    if ((typeof value === 'boolean') !== option.isBoolean()) throw damaged(path);
    if (said.includes(name)) continue;
    const all: unknown[] = Array.isArray(value) ? value : [value];
    if (!all.every((each) => ['string', 'number', 'boolean'].includes(typeof each))) throw damaged(path);
    const texts = all.map(String);
    const read = (text: string, before: unknown): unknown =>
      option.parseArg ? option.parseArg(text, before) : text;
    const first: unknown = listOptions.includes(name) ? [] : undefined;
    const result =
      typeof value === 'boolean' ? value : texts.reduce((before, text) => read(text, before), first);
    command.setOptionValueWithSource(name, result, 'config');
  }
  return untaken.map(({ text, option }) => {
    const flag = command.options.find((each) => each.attributeName() === option)?.long;
    return `${path} was made with ${text}, which --from does not take${flag ? `; there is ${flag}` : ''}`;
  });
}

const damaged = (path: string): UserError =>
  new UserError(`the settings in ${path} are damaged; type them, or use another picture`);

function readSettings(
  path: string,
  keepsLoras: boolean,
): Omit<Parameters, 'settings'> & { settings: Record<string, unknown> } {
  const text = readPngText(path);
  if (text.sdxl !== undefined) {
    try {
      const settings: unknown = JSON.parse(text.sdxl);
      if (typeof settings === 'object' && settings !== null)
        return { settings: { ...settings }, further: [] };
    } catch {
      // Told below, as for a list or a number in its place.
    }
    throw damaged(path);
  }
  if (text.parameters !== undefined) return readParameters(text.parameters, keepsLoras);
  throw new UserError(`${path} carries no settings; --from takes a PNG as sdxl or A1111 wrote it`);
}
