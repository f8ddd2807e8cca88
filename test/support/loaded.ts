// A model that is loaded already, as the cache of what frozen models say asks one.
import type { AnyModule } from '../../engine/module.ts';
import { modelHash } from '../../train/pictures/cache_entries.ts';
import type { Frozen } from '../../train/pictures/frozen.ts';

/** Of modules with what their entries depend on beside the weights, as these are now. */
export const loaded = (...parts: readonly (readonly [module: AnyModule, config: unknown])[]): Frozen => ({
  hashes: parts.map(([module, config]) => modelHash(module, config)),
  load() {},
});
