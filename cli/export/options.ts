// What `sdxl export` is told, and what of it cannot be or would change nothing: refused before anything is read.
import { existsSync, realpathSync, statSync } from 'node:fs';
import { dirname, extname, join } from 'node:path';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { assertWritable, listFolder } from '../../io/files.ts';
import type { GgufType } from '../../models/formats/export_gguf.ts';
import type { LoraFormat } from '../../models/lora/export_lora.ts';
import { isFolderOrId } from '../model.ts';
import { numbers } from '../option_values.ts';

export interface ExportOptions {
  saveKeys?: string;
  format: Format;
  dtype?: FloatDType;
  type?: GgufType;
  maxShardSize: number;
  ema?: boolean;
  unet?: string;
  configs?: string;
  merge?: Share[];
  mergeBase?: string;
  lora?: string[];
  base?: string;
  rank?: number;
  convRank?: number;
  device: string;
  json?: boolean;
  quiet?: boolean;
}

/** Of an extracted LoRA. */
export const usualRank = 64;

/** A model to be merged, and how much of it. */
export interface Share {
  path: string;
  ratios: readonly number[];
}

export const formats = ['diffusers', 'single-file', 'gguf', 'lora-peft', 'lora-kohya'] as const;
export type Format = (typeof formats)[number];

/** What is written under a name: as typed, or else as its ending says. @throws UserError for a folder with the name of a file */
export function formatFor(out: string, typed?: Format): Format {
  const ending = extname(out).toLowerCase();
  const meant = typed ?? byEnding[ending] ?? 'diffusers';
  if (meant === 'diffusers' && [...Object.keys(byEnding), ...pickles].includes(ending))
    throw new UserError(
      `${out} is the name of a file, and diffusers is a folder; give a name without ${ending}, or ${byEnding[ending] ? `--format ${byEnding[ending]}` : 'one that ends in .safetensors or .gguf'}`,
    );
  return meant;
}

const byEnding: Readonly<Record<string, Format>> = { '.safetensors': 'single-file', '.gguf': 'gguf' };

/** Endings of weights that PyTorch pickles, which nothing here writes. */
const pickles = ['.ckpt', '.pt', '.pth', '.bin'];

/** `FILE:RATIO` or `FILE:RATIO,RATIO,...` as typed after --merge. */
export function shareOf(text: string): Share {
  const [, path, ratios] = /^(.+):([^:/\\]*)$/s.exec(text) ?? [];
  if (path === undefined || existsSync(text))
    throw new UserError(`--merge takes a model and how much of it, such as ${text}:0.3`);
  return { path, ratios: numbers('--merge FILE:RATIO')(ratios) };
}

export function refuseFurther([further]: readonly string[], { saveKeys }: ExportOptions): void {
  if (further === undefined) return;
  const mend = saveKeys
    ? `put commas between names: --save-keys ${saveKeys},...`
    : 'put names with spaces in quotes';
  throw new UserError(`sdxl export takes two places, and "${further}" is a third; ${mend}`);
}

/** What changes parts, none of which is saved. */
export function refuseUnsaved(
  keys: readonly string[],
  changes: Readonly<Record<string, ((name: string) => boolean) | undefined>>,
): void {
  if (keys.length === 0 || keys.includes('all')) return;
  for (const [flag, isChanged] of Object.entries(changes))
    if (isChanged && !keys.some(isChanged))
      throw new UserError(
        `${flag} changes nothing of what --save-keys names (${keys.join(', ')}); leave it out`,
      );
}

/** What is asked for and would change nothing. */
export function refuseIdle(options: ExportOptions, sharded: boolean): void {
  const { format, type, saveKeys, unet, merge, lora, base } = options;
  if (type && format !== 'gguf')
    throw new UserError(
      `--type is of GGUF, and this is ${format}; give --format gguf, or --dtype for the type`,
    );
  if (base !== undefined && !isOfLora(format))
    throw new UserError(
      `--base is for a LoRA that is extracted, and this is ${format}; give --format lora-kohya or lora-peft`,
    );
  for (const [flag, given] of [['--rank', options.rank] as const, ['--conv-rank', options.convRank] as const])
    if (given !== undefined && base === undefined)
      throw new UserError(
        `${flag} is of a LoRA that is extracted; name the model it was tuned from with --base`,
      );
  if (options.mergeBase !== undefined && !merge)
    throw new UserError(
      '--merge-base is the model whose difference from others is added; name these with --merge FILE:RATIO',
    );
  const isAdapter = isOfLora(format) && base === undefined;
  const idle = [
    ['--max-shard-size', sharded && format !== 'diffusers'],
    ['--save-keys', saveKeys !== undefined && isAdapter],
    ['--unet', unet !== undefined && isAdapter],
    ['--merge', merge !== undefined && isAdapter],
  ] as const;
  if (lora && isAdapter)
    throw new UserError(
      '--lora is merged into a model, and without --base a LoRA is exported as it is; give the model that it is for, in its place and as --base',
    );
  for (const [flag, given] of idle)
    if (given) throw new UserError(`${flag} is for a model's parts, and ${format} is one file; leave it out`);
}

/** Configs that nothing is lent: only a single file, and a LoRA of its model's shapes, have none. @throws UserError */
export function refuseIdleConfigs(from: string, options: ExportOptions, isAdapter: boolean): void {
  const { configs, merge = [], mergeBase, base } = options;
  const places = [from, mergeBase, base, ...merge.map(({ path }) => path)];
  if (configs === undefined || isAdapter || !places.every((path) => path === undefined || isFolderOrId(path)))
    return;
  throw new UserError(
    `--configs ${configs} is for a model that is a single file, or for a LoRA, and a folder has its own; leave it out`,
  );
}

export const isOfLora = (format: Format): format is LoraFormat => format.startsWith('lora');

export function namesOf(text: string): string[] {
  const names = text.split(',').map((name) => name.trim());
  if (names.includes(''))
    throw new UserError(`--save-keys takes names with commas between, such as unet,vae, not "${text}"`);
  return names;
}

/** Nothing that exists is written over: an export is new, and a folder of somebody's may be large. */
export function refuseOccupied(out: string, format: Format): void {
  if (format !== 'diffusers') {
    // Programs know such a file, and this one a model in it, by its name.
    const ending = format === 'gguf' ? '.gguf' : '.safetensors';
    if (!out.endsWith(ending))
      throw new UserError(`${format} is one file; give a name that ends in ${ending}, not ${out}`);
    assertWritable(out);
  }
  if (!existsSync(out)) return;
  if (!statSync(out).isDirectory() || listFolder(out).length > 0)
    throw new UserError(`${out} exists; remove it, or name another place`);
  // An empty folder gives way to the finished one.
  const folder = realpathSync(out);
  const isHere = folder === process.cwd();
  if (isHere || statSync(folder).dev !== statSync(dirname(folder)).dev)
    throw new UserError(
      `${out} is ${isHere ? 'the folder you are in' : 'a mount point'}, and another folder cannot take its place; name a new one in it, such as ${join(out, 'model')}`,
    );
}
