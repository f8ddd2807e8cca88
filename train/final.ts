// The finished model, in OUTPUT/final: the trained components with their averaged weights where there are any, as a folder
// that diffusers and `sdxl sample` open. What was not trained is copied from the model's folder, or written from memory where
// there is none: a preset's random weights, or an original single file. A VAE or a LoRA stands alone.
import { cpSync, existsSync } from 'node:fs';
import { join } from 'node:path';
import { UserError } from '../io/errors.ts';
import { replaceFolderAtomically } from '../io/folders.ts';
import type { ModelSource } from '../models/checkpoint.ts';
import { saveComponent, writeJson } from '../models/save.ts';
import { trainedScheduler } from './objective.ts';
import type { Session } from './session.ts';
import { saved } from './task.ts';

const tokenizers = ['tokenizer', 'tokenizer_2'];

/** Writes the finished model and returns its folder. @throws UserError */
export async function writeFinal(session: Session): Promise<string> {
  const { run, task, ema, source, vaeSource } = session;
  await task.finish?.(ema?.weights);
  const folder = join(run.output, 'final');
  replaceFolderAtomically(folder, (temporary) => {
    for (const component of task.components) {
      const { name } = component;
      // Adapters lie at the top, where diffusers and `sdxl sample --lora` look for them.
      saveComponent(name === 'lora' ? temporary : join(temporary, name), saved(component, ema?.weights));
    }
    if (run.train.target !== 'unet') return;
    for (const component of task.frozen) {
      const { name } = component;
      const from = folderOf(name === 'vae' ? vaeSource : source, name);
      if (from) cpSync(from, join(temporary, name), { recursive: true, dereference: true });
      else saveComponent(join(temporary, name), saved(component));
    }
    for (const name of tokenizers) {
      const from = folderOf(source, name);
      if (from) cpSync(from, join(temporary, name), { recursive: true, dereference: true });
    }
    writeJson(
      join(temporary, 'scheduler', 'scheduler_config.json'),
      trainedScheduler(source.config('scheduler'), run.objective),
    );
    writeJson(join(temporary, 'model_index.json'), source.modelIndex);
  });
  return folder;
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
