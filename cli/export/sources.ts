// The model that `sdxl export` writes: what is named, with what is merged into it: first models, then LoRAs.
import { existsSync } from 'node:fs';
import { basename, join } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { hubPath } from '../../io/hub.ts';
import type { Json, ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { type Ingredient, type MergedModels, mergedModels } from '../../models/formats/merge_models.ts';
import type { LocateOptions } from '../../models/locate/locate.ts';
import { locateLora } from '../../models/locate/locate_lora.ts';
import { locateUNet, locateWithUNet, withUNet } from '../../models/locate/locate_unet.ts';
import type { AdapterFile } from '../../models/lora/lora.ts';
import { type MergedOptions, mergedModel } from '../../models/lora/merged.ts';
import { openCheckpoint } from '../../train/checkpoint_source.ts';
import { locatorOf } from '../model.ts';
import { loraOf } from '../sample/options.ts';
import type { ExportOptions } from './options.ts';

export const isCheckpoint = (path: string): boolean => existsSync(join(path, 'state.json'));

/** What is exported: a model or a checkpoint of training, perhaps with another UNet. */
export async function openSource(
  from: string,
  { ema = false, unet }: Pick<ExportOptions, 'ema' | 'unet'>,
  where: LocateOptions,
): Promise<ModelSource> {
  if (!isCheckpoint(from)) return locateWithUNet(from, unet, where);
  const trained = await openCheckpoint(from, { ema, locate: locatorOf(where) });
  return unet ? withUNet(trained, unet, where) : trained;
}

/** The model with what --merge and --lora name merged into it, to be closed when all is written. */
export interface Changed extends ModelSource {
  /** Whether what a flag names is merged into a component, by the flags that are given. */
  changes: Readonly<Record<string, (component: string) => boolean>>;
  close(): void;
}

/** @throws UserError for what does not fit the model */
export async function withMerges(
  source: ModelSource,
  options: ExportOptions,
  where: LocateOptions,
  how: MergedOptions,
): Promise<Changed> {
  const models = await mergedWith(source, options, where, how);
  const files: AdapterFile[] = [];
  for (const { file, scale } of (options.lora ?? []).map(loraOf))
    files.push({ path: await locateLora(file, where), scale });
  const loras = files.length > 0 ? mergedModel(models ?? source, files, how) : undefined;
  const made = loras ?? models ?? source;
  return {
    ...made,
    changes: { ...(models && { '--merge': models.merges }), ...(loras && { '--lora': loras.changes }) },
    close: () => loras?.close(),
  };
}

/** With what --merge names, where it names something. */
async function mergedWith(
  source: ModelSource,
  { merge = [], mergeBase, ema }: ExportOptions,
  where: LocateOptions,
  how: MergedOptions,
): Promise<MergedModels | undefined> {
  if (merge.length === 0) return undefined;
  // A single file is as the model says that it is merged into.
  const there = { ...where, configs: where.configs ?? source };
  const opened = async (path: string): Promise<ModelSource> => {
    try {
      return await openSource(path, { ema }, there);
    } catch (error) {
      if (!(error instanceof UserError)) throw error;
      return loneUNet(path, source, there).catch(() => {
        throw error;
      });
    }
  };
  const ingredients: Ingredient[] = [];
  for (const { path, ratios } of merge) ingredients.push({ model: await opened(path), ratios });
  const base = mergeBase === undefined ? undefined : await opened(mergeBase);
  return mergedModels(source, ingredients, { ...how, base });
}

/** A UNet alone, which says nothing of other parts. */
async function loneUNet(path: string, model: ModelSource, where: LocateOptions): Promise<ModelSource> {
  const unet = await locateUNet(path, model, where);
  return {
    ...unet,
    has: (component) => component === 'unet',
    config(component) {
      if (component !== 'unet') throw new UserError(`${path} has no ${component}, but a UNet alone`);
      return unet.config(component);
    },
  };
}

/** What a file says of how it was made, as A1111 has it: of models their names. */
export function mergeRecipe(from: string, { merge, mergeBase }: ExportOptions): Json | undefined {
  const name = (path: string): string => (hubPath(path) ? path : basename(path));
  return (
    merge && {
      type: 'sdxl',
      interp_method: mergeBase === undefined ? 'Weighted sum' : 'Add difference',
      primary_model: name(from),
      secondary_models: merge.map(({ path, ratios }) => ({ model: name(path), ratios })),
      ...(mergeBase !== undefined && { tertiary_model: name(mergeBase) }),
    }
  );
}
