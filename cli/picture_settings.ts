// The settings that a picture carries: A1111's `parameters` text, which picture sites and other programs read, and our own
// JSON under the keyword `sdxl`, which says everything. `--from` reads either back; the file comes from a stranger, so each
// value goes through the same reader as if it had been typed.
import type { Command } from 'commander';
import { UserError } from '../io/errors.ts';
import { readPngText } from '../io/png.ts';
import type { Request } from '../models/pipeline.ts';
import { version } from './about.ts';
import type { SampleOptions } from './sample_options.ts';

/** What of a request depends on this machine or this call rather than on the picture. */
const local = ['from', 'promptFile', 'output', 'saveLatents', 'json', 'quiet', 'device'];

/** Options that may be given more than once and are kept as lists. */
const lists = [
  'lora',
  'textualInversion',
  'controlnet',
  'controlImage',
  'controlGuidanceStart',
  'controlGuidanceEnd',
];

/** The texts to put into the PNG. `sampler` is the name of the class that ran. */
export function pictureText(
  options: SampleOptions,
  { prompt: [prompt], width, height, num_inference_steps, guidance_scale }: Request,
  seed: number,
  sampler: string,
): Record<string, string> {
  const negative = options.negativePrompt ? `\nNegative prompt: ${options.negativePrompt}` : '';
  const fields = [
    `Steps: ${num_inference_steps}`,
    `Sampler: ${sampler}`,
    `CFG scale: ${guidance_scale}`,
    `Seed: ${seed}`,
    `Size: ${width}x${height}`,
    ...(options.rng === 'cpu' ? ['RNG: CPU'] : []), // A1111's own is a GPU's
    ...emphasisField(options, prompt),
    `Version: sdxl ${version}`,
  ];
  const settings = Object.entries({ ...options, prompt, width, height, seed })
    .filter(([name, value]) => value !== undefined && !local.includes(name))
    .map(([name, value]): [string, unknown] => [name, typed(name, value)])
    // In one order, so that settings read back with --from give the same file.
    .sort(([a], [b]) => (a < b ? -1 : 1));
  return {
    parameters: `${prompt}${negative}\n${fields.join(', ')}`,
    sdxl: JSON.stringify(Object.fromEntries(settings)),
  };
}

/** As A1111 has it: where there is a bracket, and its default does not hold. */
function emphasisField({ emphasis, negativePrompt = '' }: SampleOptions, prompt: string): string[] {
  if (emphasis === 'original' || !/[([]/.test(prompt + negativePrompt)) return [];
  const [first, ...rest] = emphasis.replace('-', ' ');
  return [`Emphasis: ${first.toUpperCase()}${rest.join('')}`];
}

/** A value as it is typed after its flag: sizes are kept as [height, width] and typed as WIDTHxHEIGHT. */
function typed(name: string, value: unknown): unknown {
  if (!Array.isArray(value) || lists.includes(name)) return value;
  return name.endsWith('Size') ? `${value[1]}x${value[0]}` : value.join(',');
}

/** Sets every option that was not typed to what the picture at `path` says. Prompts of a file stand for its own. */
export function applySettings(command: Command, path: string): void {
  const settings = readSettings(path);
  const isTyped = (name: string): boolean =>
    ![undefined, 'default'].includes(command.getOptionValueSource(name)) ||
    (name === 'prompt' && isTyped('promptFile'));
  for (const option of command.options) {
    const name = option.attributeName();
    const value = settings[name];
    if (value === undefined || local.includes(name) || isTyped(name)) continue;
    const texts = (Array.isArray(value) ? value : [value]).map(String);
    const read = (text: string, before: unknown): unknown =>
      option.parseArg ? option.parseArg(text, before) : text;
    const first: unknown = lists.includes(name) ? [] : undefined;
    const result =
      typeof value === 'boolean' ? value : texts.reduce((before, text) => read(text, before), first);
    command.setOptionValueWithSource(name, result, 'config');
  }
}

function readSettings(path: string): Record<string, unknown> {
  const text = readPngText(path);
  if (text.sdxl !== undefined) {
    try {
      const settings: unknown = JSON.parse(text.sdxl);
      if (typeof settings === 'object' && settings !== null) return settings as Record<string, unknown>;
    } catch {
      // Told below, as for a list or a number in its place.
    }
    throw new UserError(`the settings in ${path} are damaged; type them, or use another picture`);
  }
  if (text.parameters !== undefined) return fromA1111(text.parameters);
  throw new UserError(`${path} carries no settings; --from takes a PNG as sdxl or A1111 wrote it`);
}

/** A1111 puts the prompt first, then perhaps `Negative prompt: `, then one line of `Name: value` fields. */
function fromA1111(parameters: string): Record<string, unknown> {
  const [body, last = ''] = splitLast(parameters);
  const [prompt, negative] = body.split(/\n?Negative prompt: /, 2);
  const field = (name: string) => new RegExp(`(?:^|, )${name}: ([^,]+)`).exec(last)?.[1];
  const [width, height] = (field('Size') ?? '').split('x');
  return {
    prompt,
    negativePrompt: negative,
    steps: field('Steps'),
    guidanceScale: field('CFG scale'),
    seed: field('Seed'),
    emphasis: (field('Emphasis') ?? 'Original').toLowerCase().replace(' ', '-'),
    rng: /^cpu/i.test(field('RNG') ?? '') ? 'cpu' : 'cuda',
    scheduler: schedulerOf(field('Sampler'), field('Schedule type')),
    width: width || undefined,
    height,
  };
}

/** Newer A1111 keeps Karras' sigmas in a field of their own. */
const schedulerOf = (sampler: string | undefined, type: string | undefined) =>
  sampler && type === 'Karras' && !/karras/i.test(sampler) ? `${sampler} Karras` : sampler;

function splitLast(text: string): [string, string?] {
  const at = text.lastIndexOf('\nSteps: ');
  if (at < 0) return text.startsWith('Steps: ') ? ['', text] : [text];
  return [text.slice(0, at), text.slice(at + 1)];
}
