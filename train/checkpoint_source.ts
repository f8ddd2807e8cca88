// A training checkpoint seen as a model: what was trained comes from it, everything else from the model that the run began
// with. Reading needs no knowledge of the optimizer.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { UserError } from '../io/errors.ts';
import { readJson } from '../io/files.ts';
import { type ModelSource, openComponent } from '../models/checkpoint.ts';

export interface CheckpointOptions {
  /** The moving averages where the checkpoint has them, instead of the last weights. */
  ema: boolean;
  /** Opens the model that the run names: a path or a hub id. */
  base: (model: string) => Promise<ModelSource>;
}

/** @throws UserError when the folder is no checkpoint or has no moving averages */
export async function openCheckpoint(path: string, { ema, base }: CheckpointOptions): Promise<ModelSource> {
  const { run } = readJson(join(path, 'state.json')) as { run?: { model?: unknown } };
  if (ema && !existsSync(join(path, 'ema')))
    throw new UserError(`${path} has no moving averages, as its run kept none; leave out --ema`);
  const trained = (component: string): ModelSource | undefined => {
    const folders = [...(ema ? [join(path, 'ema', component)] : []), join(path, component)];
    const found = folders.find((folder) => existsSync(folder));
    return found === undefined ? undefined : openComponent(found);
  };
  const origin = typeof run?.model === 'string' ? await base(run.model) : undefined;
  const of = (component: string): ModelSource => {
    const found = trained(component) ?? origin;
    if (!found) throw new UserError(`${path} has no ${component}, and its run began from random weights`);
    return found;
  };
  return {
    kind: 'folder',
    path,
    modelIndex: origin?.modelIndex ?? {},
    has: (component) => trained(component) !== undefined || (origin?.has(component) ?? false),
    config: (component) => of(component).config(component),
    folder: (component) => of(component).folder(component),
    weights: (component) => of(component).weights(component),
    load: (component, module, device, dtype) => of(component).load(component, module, device, dtype),
  };
}
