// The frozen models that a cache asks, read only where an entry is missing. Entries are named by the hash of every weight (cache_entries.ts),
// which takes reading them all; so that hash is kept in the cache, too, under a name that hangs on the stamps of the model's files.
import { existsSync } from 'node:fs';
import { dirname } from 'node:path';
import type { Device } from '../../engine/device.ts';
import { holding } from '../../engine/memory.ts';
import { type AnyModule, unload } from '../../engine/module.ts';
import { built } from '../../engine/scope.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { makeFolder, readText, writeFileAtomic } from '../../io/files.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { entryPath, modelHash } from './cache_entries.ts';

/** One that entries come from. */
export interface Frozen {
  /** Of its parts, in their order. */
  hashes: readonly string[];
  /** Has the weights where its modules take them. */
  load(): void;
}

/** A part, whose module is built and not loaded. */
export interface FrozenPart {
  source: ModelSource;
  name: string;
  module: AnyModule;
  /** What its entries depend on beside the weights. */
  config: unknown;
}

/** Modules that are loaded on `device` when they are first asked for, or where their hash is not known in `folder` yet. */
export function frozen(
  folder: string,
  parts: readonly FrozenPart[],
  device: Device,
  dtype: FloatDType,
): Frozen & { release(): void } {
  const waiting = new Set(parts);
  const load = (part: FrozenPart): void => {
    if (!waiting.delete(part)) return;
    const { source, name, module } = part;
    holding(name, () => source.load(name, module, device, dtype));
  };
  const hashOf = (part: FrozenPart): string => {
    const { source, name, module, config } = part;
    const stamp = source.stamp?.(name);
    const kept = stamp && entryPath(folder, 'models', { name, config, dtype, stamp }, 'sha256');
    const known = kept && existsSync(kept) ? readText(kept) : '';
    if (/^[0-9a-f]{64}$/.test(known)) return known;
    load(part);
    const hash = modelHash(module, config);
    if (kept) {
      makeFolder(dirname(kept));
      writeFileAtomic(kept, hash);
    }
    return hash;
  };
  return built(() => ({
    hashes: parts.map(hashOf),
    load: () => parts.forEach(load),
    release() {
      for (const { module } of parts) unload(module);
    },
  }));
}
