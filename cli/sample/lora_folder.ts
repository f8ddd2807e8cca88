// The folder of --lora-model-dir: the adapters in it and in its folders, by what prompts (prompt_loras.ts) and clients call them. A name is
// looked up among the files that are there, so that none leads out of the folder; it is listed anew each time, as people put files into it
// while a server runs.
import { statSync } from 'node:fs';
import { join, posix } from 'node:path';
import { didYouMean, UserError } from '../../io/errors.ts';
import { filesUnder } from '../../io/files.ts';
import { isWeightsFile, openWeightsFile } from '../../models/checkpoint/weights_file.ts';

const withoutEnd = (path: string): string => path.replace(/\.(safetensors|gguf)$/i, '');

/** What a file is called by, its path in the folder or less: the first by which a name is anyone's says whose it is. */
const ways: readonly ((path: string) => string)[] = [
  (path) => path,
  withoutEnd, // stable-diffusion.cpp
  // A1111; but the folder's, where peft, diffusers and our runs leave one in a folder of its own.
  (path) =>
    /^(.+)\/(adapter_model|pytorch_lora_weights)\.safetensors$/.exec(path)?.[1] ??
    withoutEnd(posix.basename(path)),
];

export interface LoraFolder {
  /** The file that a name is of. @throws UserError for a name that none has, or several */
  fileOf(name: string): string;
  /** All files, with the shortest name of each. */
  all(): { name: string; path: string }[];
}

/** @throws UserError where the folder cannot be read */
export function openLoraFolder(folder: string): LoraFolder {
  const files = filesUnder(folder).filter(isWeightsFile);
  const byName = ways.map((way) => {
    const found = new Map<string, string[]>();
    for (const file of files) found.set(way(file), [...(found.get(way(file)) ?? []), file]);
    return found;
  });
  const called = (name: string): readonly string[] =>
    byName.find((found) => found.has(name))?.get(name) ?? [];
  const shortest = (file: string): string =>
    ways.map((way) => way(file)).findLast((name) => called(name).join() === file) ?? file;
  return {
    fileOf(name) {
      const [found, ...others] = called(name);
      if (others.length > 0)
        throw new UserError(
          `"${name}" may be ${[found, ...others].join(' or ')} in ${folder} (--lora-model-dir): give it with its folder and ending`,
        );
      if (found !== undefined) return join(folder, found);
      const names = files.map(shortest);
      throw new UserError(`no LoRA "${name}" in ${folder} (--lora-model-dir)${instead(name, names)}`);
    },
    all: () => files.map((file) => ({ name: shortest(file), path: join(folder, file) })),
  };
}

/** What there is of nearly that name, or else at all. */
function instead(name: string, names: readonly string[]): string {
  if (names.length === 0) return ': it has no .safetensors or .gguf file';
  const more = names.length > 8 ? ` and ${names.length - 8} more` : '';
  return didYouMean(name, names) || `; it has ${names.slice(0, 8).join(', ')}${more}`;
}

const read = new Map<string, { written: number; metadata: Record<string, unknown> }>();

/**
 * What trainers write into a file, as A1111 tells it: an object where a text is one's, but without cover images, which are megabytes. None
 * of a file that cannot be read.
 */
export function metadataOf(path: string): Record<string, unknown> {
  const written = statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0;
  const known = read.get(path);
  if (known?.written === written) return known.metadata;
  const { ssmd_cover_images: _, ...texts } = textsIn(path);
  const metadata = Object.fromEntries(Object.entries(texts).map(([key, text]) => [key, parsed(text)]));
  read.set(path, { written, metadata });
  return metadata;
}

function textsIn(path: string): Record<string, string> {
  try {
    const file = openWeightsFile(path);
    file.close();
    return file.metadata;
  } catch (error) {
    if (error instanceof UserError) return {};
    throw error;
  }
}

function parsed(text: string): unknown {
  if (!text.startsWith('{')) return text;
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
