// The finished model, in OUTPUT/final: the trained components with their averaged weights where there are any, as a folder that
// diffusers and `sdxl sample` open. What was not trained is copied from the model's folder, or read and written where there is none: a
// preset's random weights, or an original single file. A VAE, a LoRA, a ControlNet, a T2I-Adapter or a textual inversion stands alone, an
// IP-Adapter with its vision encoder. The state of the checkpoint that it is of lies beside, in run.json: by it `sdxl train --resume`
// knows whether there is more to do.
import { copyFileSync, existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { openDevice } from '../engine/device.ts';
import { type AnyModule, unload } from '../engine/module.ts';
import type { FloatDType } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { copyFolder, removeFolder, replaceFolderAtomically } from '../io/folders.ts';
import { readJsonObject } from '../io/json.ts';
import type { ModelSource } from '../models/checkpoint/checkpoint.ts';
import { saveComponent, writeJson } from '../models/checkpoint/save.ts';
import { pipelineIndex } from '../models/control/inpainting.ts';
import { buildComponent } from '../models/formats/components.ts';
import { textParts } from '../models/load_options.ts';
import { listCheckpoints, type State, stateFile } from './checkpoint.ts';
import { trainedScheduler } from './objective/objective.ts';
import { component, saved } from './passes/task.ts';
import type { Run } from './run/run.ts';
import type { Session } from './session.ts';

const tokenizers = ['tokenizer', 'tokenizer_2'];

/** Where diffusers looks for them, and `sdxl sample` with --lora, --controlnet, --adapter, --ip-adapter and --textual-inversion. */
const lieAtTop = ['lora', 'controlnet', 'adapter', 'ip_adapter', 'textual_inversion'];

export const finalOf = (output: string): string => join(output, 'final');

/** Writes the finished model, which is that of `checkpoint`, and returns its folder. @throws UserError */
export async function writeFinal(session: Session, checkpoint: string): Promise<string> {
  const { run, task, averages, source, vaeSource, ipAdapter } = session;
  await task.finish?.(averages);
  const folder = finalOf(run.output);
  replaceFolderAtomically(folder, (temporary) => {
    for (const component of task.components) {
      const { name } = component;
      saveComponent(lieAtTop.includes(name) ? temporary : join(temporary, name), saved(component, averages));
    }
    copyFileSync(stateFile(checkpoint), join(temporary, 'run.json'));
    if (ipAdapter)
      copyFolder(ipAdapter.imageEncoder.folder('image_encoder'), join(temporary, 'image_encoder'));
    if (run.train.target !== 'unet') return;
    for (const name of [...textParts(source), 'vae']) {
      if (task.components.some((component) => component.name === name)) continue;
      const owner = name === 'vae' ? vaeSource : source;
      const from = folderOf(owner, name);
      if (from) copyFolder(from, join(temporary, name));
      else writeFrozen(owner, name, join(temporary, name), name === 'vae' ? 'float32' : run.dtype);
    }
    for (const name of tokenizers) {
      const from = folderOf(source, name);
      if (from) copyFolder(from, join(temporary, name));
    }
    writeJson(
      join(temporary, 'scheduler', 'scheduler_config.json'),
      trainedScheduler(source.config('scheduler'), run.objective),
    );
    writeJson(join(temporary, 'model_index.json'), pipelineIndex(source));
  });
  return folder;
}

/** Whether a run's finished model is that of its newest checkpoint, and has the updates that are asked for. */
export function isFinished({ output, steps, epochs }: Run): boolean {
  const made = join(finalOf(output), 'run.json');
  if (!existsSync(made)) return false;
  const newest = listCheckpoints(output).at(-1);
  if (newest && !readFileSync(made).equals(readFileSync(stateFile(newest)))) return false;
  const { step, epoch, update } = readJsonObject(made) as unknown as State;
  return steps > 0 ? step === steps : epoch === epochs && update === 0;
}

/** Removes the finished model where it is of a later step. */
export function removeLaterFinal(output: string, step: number): void {
  const made = join(finalOf(output), 'run.json');
  if (existsSync(made) && (readJsonObject(made) as unknown as State).step > step)
    removeFolder(finalOf(output));
}

/** Writes what is on no device any more: of a preset's random weights, or from an original single file. */
function writeFrozen(source: ModelSource, name: string, folder: string, dtype: FloatDType): void {
  const config = source.config(name);
  const { module } = buildComponent(config) as { module: AnyModule };
  try {
    // In the host's memory: the device may have no room beside what was trained.
    source.load(name, module, openDevice('reference'), dtype);
    saveComponent(folder, saved(component(name, config, module)));
  } finally {
    unload(module);
  }
}

/** Where a source keeps a component's files, if it does. */
function folderOf(source: ModelSource, component: string): string | undefined {
  try {
    const folder = source.folder(component);
    return existsSync(folder) ? folder : undefined;
  } catch (error) {
    if (error instanceof UserError) return undefined;
    throw error;
  }
}
