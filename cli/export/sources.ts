// The model that `sdxl export` writes: what is named, with what is merged into it.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import type { LocateOptions } from '../../models/locate/locate.ts';
import { locateLora } from '../../models/locate/locate_lora.ts';
import { locateWithUNet, withUNet } from '../../models/locate/locate_unet.ts';
import type { AdapterFile } from '../../models/lora/lora.ts';
import { type Merged, type MergedOptions, mergedModel } from '../../models/lora/merged.ts';
import { openCheckpoint } from '../../train/checkpoint_source.ts';
import { locatorOf } from '../model.ts';
import { loraOf } from '../sample/options.ts';
import type { ExportOptions } from './options.ts';

export const isCheckpoint = (path: string): boolean => existsSync(join(path, 'state.json'));

/** What is exported: a model or a checkpoint of training, perhaps with another UNet. */
export async function openSource(
  from: string,
  { ema = false, unet }: ExportOptions,
  where: LocateOptions,
): Promise<ModelSource> {
  if (!isCheckpoint(from)) return locateWithUNet(from, unet, where);
  const trained = await openCheckpoint(from, { ema, locate: locatorOf(where) });
  return unet ? withUNet(trained, unet, where) : trained;
}

/** The model with what --lora names merged into it, where it names something. */
export async function withLoras(
  source: ModelSource,
  { lora = [] }: ExportOptions,
  where: LocateOptions,
  how: MergedOptions,
): Promise<Merged | undefined> {
  const files: AdapterFile[] = [];
  for (const { file, scale } of lora.map(loraOf)) files.push({ path: await locateLora(file, where), scale });
  return files.length > 0 ? mergedModel(source, files, how) : undefined;
}
