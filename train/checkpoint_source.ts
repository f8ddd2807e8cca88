// A training checkpoint seen as a model: what was trained comes from it, everything else from the model that the run began
// with, as in the run's own final folder. Reading needs no knowledge of the optimizer.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { UserError } from '../io/errors.ts';
import { type Json, type ModelSource, openComponent } from '../models/checkpoint/checkpoint.ts';
import { llliteFile } from '../models/control/lllite.ts';
import { randomModel } from '../models/formats/random_weights.ts';
import { readState, tokenizersOf } from './checkpoint.ts';
import { ipAdapterFile } from './controls/ip_adapter.ts';
import type { Locate } from './materials.ts';
import { trainedScheduler } from './objective/objective.ts';
import type { Run } from './run/run.ts';

export interface CheckpointOptions {
  /** The moving averages where the checkpoint has them, instead of the last weights. */
  ema: boolean;
  locate: Locate;
}

/** @throws UserError when the folder is no checkpoint or has no moving averages */
export async function openCheckpoint(path: string, { ema, locate }: CheckpointOptions): Promise<ModelSource> {
  const { run } = readState(path);
  refuseAdded(path, run);
  if (ema && !existsSync(join(path, 'ema')))
    throw new UserError(`${path} has no moving averages, as its run kept none; leave out --ema`);
  const preset = typeof run.model !== 'string';
  const tokenizers = tokenizersOf(path);
  const origin =
    typeof run.model === 'string'
      ? await locate.model(run.model, run.unet)
      : randomModel(run.model, { seed: run.seed, tokenizers });
  const ownVae = run.vae ? await locate.vae(run.vae) : undefined;
  const sourceOf = (component: string): ModelSource => {
    const folders = [...(ema ? [join(path, 'ema', component)] : []), join(path, component)];
    const found = folders.find((folder) => existsSync(folder));
    if (found !== undefined) return openComponent(found);
    return component === 'vae' && ownVae ? ownVae : origin;
  };
  const has = (component: string): boolean => {
    const from = sourceOf(component);
    if (from !== origin || !preset) return from.has(component);
    // Random weights are no part of what was trained.
    return component === 'scheduler' || existsSync(join(tokenizers, component));
  };
  return {
    path,
    modelIndex: origin.modelIndex,
    has,
    config(component): Json {
      const config = sourceOf(component).config(component);
      return component === 'scheduler' ? trainedScheduler(config, run.objective) : config;
    },
    folder: (component) => sourceOf(component).folder(component),
    weights: (component) => sourceOf(component).weights(component),
    load: (component, module, device, dtype) => sourceOf(component).load(component, module, device, dtype),
  };
}

/** What is trained beside the model or into it is read as it lies in the checkpoint. @throws UserError that tells where */
function refuseAdded(path: string, { train: { target } }: Run): void {
  const lite = join('controlnet', llliteFile);
  if (target === 'controlnet' && existsSync(join(path, lite)))
    throw new UserError(
      `${path} is a ControlNet-LLLite's, which ComfyUI, A1111 and sdxl sample --controlnet read as it is: take ${join(path, lite)}, or its averages in ${join(path, 'ema', lite)}`,
    );
  if (target === 'controlnet' || target === 't2i_adapter') {
    const [name, kind] = target === 'controlnet' ? ['controlnet', 'ControlNet'] : ['adapter', 'T2I-Adapter'];
    throw new UserError(
      `${path} is a ${kind}'s, which diffusers and sdxl sample --${name} read as it is: take ${join(path, name)}, or its averages in ${join(path, 'ema', name)}`,
    );
  }
  if (target === 'ip_adapter')
    throw new UserError(
      `${path} is an IP-Adapter's, which diffusers and sdxl sample --ip-adapter read as it is: take ${join(path, 'ip_adapter', ipAdapterFile)}, or its averages in ${join(path, 'ema', 'ip_adapter')}, and put the image_encoder of the finished one beside it`,
    );
  if (target === 'textual_inversion')
    throw new UserError(
      `${path} is a textual inversion's, which A1111, ComfyUI and sdxl sample --textual-inversion read as it is: take the file in ${join(path, 'textual_inversion')}, or its averages in ${join(path, 'ema', 'textual_inversion')}`,
    );
}
