// Entries of the cache on disk (cache.ts). An entry's name is the hash of all it depends on, so an entry that is there is right: an edited
// picture or caption has another name, and only its own entry is made. Entries are whole or absent; the folder can be deleted at any time.
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { type AnyModule, namedParameters } from '../../engine/module.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { makeFolder } from '../../io/files.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';

/** Raise when an entry of the same name would hold something else. */
const edition = 1;

/** SHA-256 of a model's config, and its weights' names, types and bytes. Reads every weight: compute it once. */
export function modelHash(module: AnyModule, config: unknown): string {
  const hash = createHash('sha256').update(JSON.stringify(config));
  for (const [name, { shape, tensor: weight }] of namedParameters(module)) {
    hash.update(`${name} ${weight.dtype} ${shape.join()}\n`).update(weight.bytes());
  }
  return hash.digest('hex');
}

export function entryPath(
  folder: string,
  kind: string,
  dependsOn: object,
  extension = 'safetensors',
): string {
  const name = createHash('sha256')
    .update(JSON.stringify({ edition, ...dependsOn }))
    .digest('hex');
  return join(folder, kind, name.slice(0, 2), `${name.slice(2, 40)}.${extension}`);
}

/** Of the subjects those that have no entry, each once, with its path. */
export const withoutEntry = <Subject>(
  subjects: readonly Subject[],
  pathOf: (subject: Subject) => string,
): [path: string, subject: Subject][] =>
  [...new Map(subjects.map((subject) => [pathOf(subject), subject]))].filter(([path]) => !isWhole(path));

/** Whether the entry is there and as long as it says it is; a damaged one is made anew. */
function isWhole(path: string): boolean {
  if (!existsSync(path)) return false;
  try {
    openSafetensors(path).close();
    return true;
  } catch (error) {
    if (error instanceof UserError) return false;
    throw error;
  }
}

/** What an entry holds. @throws UserError that names `what` it was made from, where it is gone */
export function readEntry<N extends string>(
  path: string,
  names: readonly N[],
  what: string,
): Record<N, Float32Array> {
  if (!existsSync(path))
    throw new UserError(
      `${path}, prepared from ${what}, is gone from the cache: start again, to make it anew`,
    );
  const file = openSafetensors(path);
  try {
    const entries = names.map((name) => [name, decodeFloats(file.read(name), 'float32')]);
    return Object.fromEntries(entries) as Record<N, Float32Array>;
  } finally {
    file.close();
  }
}

/** @throws UserError for numbers that are not finite; `what` says whose */
export function writeEntry(path: string, values: object, what: string): void {
  const entries = Object.entries(values as Record<string, Float32Array>);
  for (const [, data] of entries) {
    if (!data.every(Number.isFinite))
      throw new UserError(`${what} are not finite: run that model in float32, or use the fp16-fix VAE`);
  }
  makeFolder(dirname(path));
  writeSafetensors(
    path,
    entries.map(([name, data]) => ({
      name,
      dtype: 'float32',
      shape: [data.length],
      bytes: new Uint8Array(data.buffer, data.byteOffset, data.byteLength),
    })),
    { of: what },
  );
}
