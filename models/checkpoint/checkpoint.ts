// Reading a diffusers folder: one config.json and one or more .safetensors files per component; and what a model is that is read from
// anywhere else.
import { existsSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { Device } from '../../engine/device.ts';
import type { AnyModule } from '../../engine/module.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { listFolder } from '../../io/files.ts';
import { readJsonObject } from '../../io/json.ts';
import { loadAndClose, sourceOf, type WeightSource } from './weights.ts';
import { openWeightsFile, openWeightsFiles, refusePickle } from './weights_file.ts';

/** @throws UserError for the folder of a run, which has what it made in a folder of its own */
export function refuseRun(path: string): void {
  const final = join(path, 'final');
  if (existsSync(final))
    throw new UserError(`${path} is the folder of a run; give what it has made, ${final}`);
}

export type Json = Record<string, unknown>;

export interface ModelSource {
  readonly path: string;
  readonly modelIndex: Json;
  has(component: string): boolean;
  /** The component's config (`scheduler` included). */
  config(component: string): Json;
  /** Where a component's files lie, all of them its own; a tokenizer's may be another model's. @throws UserError where it has no folder */
  folder(component: string): string;
  weights(component: string): WeightSource;
  /** Changes whenever `load` may give other weights, and reads none; undefined where nobody can tell, as of a UNet. */
  stamp?(component: string): string | undefined;
  load(component: string, module: AnyModule, device: Device, dtype: FloatDType): void;
}

/**
 * Opens a diffusers folder, reading no weights yet; `variant` picks files such as diffusion_pytorch_model.fp16.safetensors.
 * @throws UserError where there is none
 */
export function openModel(path: string, { variant }: { variant?: string } = {}): ModelSource {
  if (!existsSync(path))
    throw new UserError(
      `no model at ${path}; give a diffusers folder, a .safetensors or .gguf file or a hub id`,
    );
  if (!statSync(path).isDirectory()) throw new UserError(`${path} is not a folder`);
  const index = join(path, 'model_index.json');
  if (!existsSync(index)) {
    throw new UserError(
      `${path} has no model_index.json; give the folder that holds unet/, vae/ and the rest`,
    );
  }
  const folderOf = (component: string) => join(path, component);
  if (variant)
    refuseUnknownVariant(path, ['unet', 'vae', 'text_encoder', 'text_encoder_2'].map(folderOf), variant);
  return folderSource(path, readJsonObject(index), folderOf, variant);
}

/** A component that has no such weights brings its plain ones; a model of which none has them was not what was meant. */
function refuseUnknownVariant(path: string, folders: readonly string[], variant: string): void {
  const files = folders.filter((folder) => existsSync(folder)).flatMap(weightFiles);
  const found = new Set(files.map(variantOf));
  if (files.length === 0 || found.has(variant)) return;
  throw new UserError(
    `${path} has no weights of the variant ${variant}, only ${variantNames(found)}; name another or none`,
  );
}

/** The variant in a weight file's name: fp16 in x.fp16.safetensors and x.fp16-00001-of-00002.safetensors. */
export const variantOf = (name: string): string | undefined =>
  /\.([a-z0-9_]+)(-\d{5}-of-\d{5})?\.safetensors$/i.exec(name)?.[1];

/** What there is instead, for a sentence. */
export const variantNames = (found: Iterable<string | undefined>): string =>
  [...new Set(found)].map((name) => name ?? 'plain ones').join(' and ');

/** A lone component's folder (config.json beside its weights, as a VAE is published), seen as a model that has only it. */
export const openComponent = (path: string, { variant }: { variant?: string } = {}): ModelSource =>
  folderSource(path, {}, () => path, variant);

/** The folders of a model that is one file: what lies beside it is not its own. */
export const noFolder =
  (path: string) =>
  (component: string): never => {
    throw new UserError(`${path} is one file, and no folder is its ${component}'s`);
  };

/** A lone component in one file under diffusers' names, with its config.json beside it or a given `config`, seen as such a model. */
export function openComponentFile(path: string, config?: Json): ModelSource {
  const folder = dirname(path);
  if (!config && !existsSync(join(folder, 'config.json')))
    throw new UserError(`${path} holds weights only: put the config.json that belongs to it into ${folder}`);
  return loneSource(path, {
    has: () => true,
    config: () => config ?? readJsonObject(join(folder, 'config.json')),
    weights: () => sourceOf(path, [openWeightsFile(path)]),
  });
}

/** A lone component in one file, seen as a model that has only it. */
export const loneSource = (
  path: string,
  component: Pick<ModelSource, 'has' | 'config' | 'weights'>,
): ModelSource => loading({ path, modelIndex: {}, folder: noFolder(path), ...component });

/** A source whose components are loaded from what `weights` gives. */
export const loading = <S extends Omit<ModelSource, 'load'>>(source: S): S & ModelSource => ({
  ...source,
  stamp(component) {
    if (component === 'unet') return undefined; // training begins with others in its place
    const weights = source.weights(component);
    weights.close();
    return weights.stamp;
  },
  load: (component, module, device, dtype) => loadAndClose(module, source.weights(component), device, dtype),
});

function folderSource(
  path: string,
  modelIndex: Json,
  folderOf: (component: string) => string,
  variant?: string,
): ModelSource {
  return loading({
    path,
    modelIndex,
    has: (component) => existsSync(folderOf(component)),
    config(component) {
      const folder = folderOf(component);
      const names = ['config.json', 'scheduler_config.json'].map((name) => join(folder, name));
      const found = names.find((name) => existsSync(name));
      if (!found) {
        const missing =
          component === 'scheduler' ? 'scheduler/scheduler_config.json' : `${component}/config.json`;
        throw new UserError(`${path} has no ${missing}; the model is incomplete, download it again`);
      }
      return readJsonObject(found);
    },
    folder: folderOf,
    weights: (component) => openWeights(folderOf(component), variant),
  });
}

/** The weight files of a component folder: one file, or shards named by an index. */
export function openWeights(folder: string, variant?: string): WeightSource {
  if (!existsSync(folder))
    throw new UserError(`no folder ${folder}; the model is incomplete, download it again`);
  const names = pickFiles(folder, weightFiles(folder), variant);
  return sourceOf(folder, openWeightsFiles(names.map((name) => join(folder, name))));
}

const weightFiles = (folder: string): string[] =>
  listFolder(folder).filter((name) => name.endsWith('.safetensors'));

/** The variant's files where there are some, else the plain ones, else what there is. */
function pickFiles(folder: string, present: readonly string[], variant: string | undefined): string[] {
  const choices = [variant, undefined].map((each) => present.filter((name) => variantOf(name) === each));
  const wanted = choices.find((names) => names.length > 0) ?? present;
  if (wanted.length === 0) {
    for (const name of listFolder(folder))
      refusePickle(join(folder, name), "use the model's .safetensors files");
    throw new UserError(`${folder} has no .safetensors file; the model is incomplete, download it again`);
  }
  const whole = wanted.filter((name) => !/-\d{5}-of-\d{5}\./.test(name));
  const shards = wanted.filter((name) => !whole.includes(name)).sort();
  if (whole.length > 0) return [whole.sort()[0]];
  const [count, other] = new Set(shards.map((name) => Number(/-of-(\d{5})\./.exec(name)?.[1])));
  if (other !== undefined)
    throw new UserError(`${folder} has shards of ${count} and of ${other}; remove what is not its own`);
  if (shards.length !== count) {
    throw new UserError(`${folder} has ${shards.length} of ${count} shards; download the missing ones`);
  }
  return shards;
}
