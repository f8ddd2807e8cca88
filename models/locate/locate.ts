// Finding a model, VAE, ControlNet or T2I-Adapter by what the user names: a diffusers folder, an original file (.safetensors or .gguf), or
// a Hugging Face hub id, of which only the files that are read are downloaded.
import { existsSync, statSync } from 'node:fs';
import { dirname, join, posix } from 'node:path';
import { UserError } from '../../io/errors.ts';
import { type HubProgress, hubPath, looksLikeHubId, NothingWantedError, resolveHub } from '../../io/hub.ts';
import { readJsonObject } from '../../io/json.ts';
import {
  type ModelSource,
  openComponent,
  openModel,
  refuseRun,
  variantNames,
  variantOf,
} from '../checkpoint/checkpoint.ts';
import { isWeightsFile, openWeightsFile, refusePickle } from '../checkpoint/weights_file.ts';
import { openControlNetFile, openControlNetFolder } from '../control/controlnet_kinds.ts';
import { asItsWeightsTell } from '../control/controlnet_union.ts';
import { LLLITE, llliteFile } from '../control/lllite.ts';
import { openT2IAdapterFile, t2iAdapterConfig } from '../control/t2i_adapter.ts';
import { classOf } from '../formats/components.ts';
import { layoutOf } from '../formats/sgm_keys.ts';
import { openSingleFile, openVaeFile } from '../formats/singlefile.ts';
import { adapterAt } from '../lora/lora_file.ts';
import { inversionIn } from '../text/textual_inversion.ts';

/**
 * Of each folder's weights the `wanted` variant, or where it has none of that, or none is named, the plain ones, or fp16 where it has
 * that alone: as in diffusers a component without the variant comes as it is.
 */
export const weightsOf = (weights: readonly string[], wanted?: string): string[] =>
  weights.filter((name) => {
    const mine = weights.filter((other) => dirname(other) === dirname(name)).map(variantOf);
    const own = [wanted, undefined].find((each) => mine.includes(each));
    return variantOf(name) === (mine.includes(own) ? own : 'fp16');
  });

/**
 * The files of a diffusers repository that sampling reads. Of a component's weights these are the `wanted` variant
 * (`x.fp16.safetensors` for fp16) as `weightsOf` says. @throws UserError where none has it
 */
export function neededFiles(all: readonly string[], wanted?: string): string[] {
  const folders = /^(unet|vae|text_encoder|text_encoder_2|tokenizer|tokenizer_2|scheduler)\//;
  const weights = all.filter(
    (name) =>
      /^[^/]+\/[^/]+\.safetensors$/.test(name) && folders.test(name) && !/flax|onnx|openvino/.test(name),
  );
  const found = weights.map(variantOf);
  if (wanted && weights.length > 0 && !found.includes(wanted))
    throw new UserError(
      `--variant ${wanted}: the model has no such weights, only ${variantNames(found)}; name another or leave it out`,
    );
  const chosen = weightsOf(weights, wanted);
  const texts = /^(model_index\.json|[^/]+\/[^/]+\.(json|txt))$/;
  return all.filter(
    (name) =>
      chosen.includes(name) || name === 'model_index.json' || (folders.test(name) && texts.test(name)),
  );
}

export interface LocateOptions {
  /** Told of a download of what `path` names, by bytes. */
  onProgress?: (path: string, progress: HubProgress) => void;
  /** A diffusers folder, or a model, that lends its configs and tokenizers to a single file. */
  configs?: string | ModelSource;
  /** Of a folder's or repository's weights, such as fp16. */
  variant?: string;
  /** A component whose weights are not downloaded, as another's stand in. */
  without?: string;
}

/**
 * Opens the model at `path`: a diffusers folder, an original .safetensors or .gguf file, or a hub id, or OWNER/NAME/FILE of such a file
 * there, which is downloaded first.
 * @throws UserError where it is none of these, or incomplete
 */
export async function locateModel(path: string, where: LocateOptions = {}): Promise<ModelSource> {
  const { configs, variant, without } = where;
  if (existsSync(path)) {
    if (statSync(path).isDirectory()) {
      refuseOtherFolders(path);
      return openModel(path, { variant });
    }
    if (variant)
      throw new UserError(
        `--variant ${variant} chooses among a folder's files, and ${path} is one file; leave it out`,
      );
    if (isWeightsFile(path)) {
      // Opened first, so that a file that is no model is refused before anything is downloaded for it.
      const source = openSingleFile(path, { configs });
      return configs ? source : openSingleFile(path, { tokenizers: await publishedTokenizers(path) });
    }
    refusePickle(path, 'use a .safetensors or .gguf file');
    throw new UserError(
      `${path} is not a model: give a diffusers folder, a .safetensors or .gguf file or a hub id`,
    );
  }
  const inner = await hubFile(path, where);
  if (inner !== undefined) return locateModel(inner, where);
  if (!looksLikeHubId(path))
    throw new UserError(
      `no model at ${path}; give a diffusers folder, a .safetensors or .gguf file or a hub id`,
    );
  // Of a single file's model the cache has tokenizers alone, which are no model to be opened offline.
  const files = (all: readonly string[]) =>
    all.includes('model_index.json') ? withoutWeights(neededFiles(all, variant), without) : [];
  return openModel(await download(path, files, where), { variant });
}

const withoutWeights = (files: readonly string[], component: string | undefined): string[] =>
  files.filter((name) => !(name.startsWith(`${component}/`) && name.endsWith('.safetensors')));

/** What training leaves is no model yet, or has it deeper. @throws UserError that tells how to come by one */
function refuseOtherFolders(path: string): void {
  if (existsSync(join(path, 'model_index.json'))) return;
  refuseRun(path);
  if (adapterAt(path))
    throw new UserError(
      `${path} holds a LoRA, which sdxl sample takes as --lora ${path}; give the model that it was made for`,
    );
  const config = join(path, 'config.json');
  if (existsSync(config) && controlNetClasses.includes(classOf(readJsonObject(config)) ?? ''))
    throw new UserError(
      `${path} holds a ControlNet, which sdxl sample takes as --controlnet ${path}; give the model that it was made for`,
    );
  if (!existsSync(config) && inversionIn(path))
    throw new UserError(
      `${path} holds a textual inversion, which sdxl sample takes as --textual-inversion ${path}; give the model that it was made for`,
    );
  if (existsSync(join(path, 'state.json')))
    throw new UserError(
      `${path} is a checkpoint of training; make a model of it with sdxl export ${path} FOLDER, and give that`,
    );
}

/** A single file has no tokenizers: SDXL's own, two megabytes, come from the hub's cache or the hub. */
async function publishedTokenizers(path: string): Promise<string> {
  const names = ['vocab.json', 'merges.txt', 'tokenizer_config.json', 'special_tokens_map.json'];
  const files = ['tokenizer', 'tokenizer_2'].flatMap((folder) => names.map((name) => `${folder}/${name}`));
  try {
    return await resolveHub('stabilityai/stable-diffusion-xl-base-1.0', { files });
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    throw new UserError(
      `${path} holds weights only, and SDXL's tokenizers could not be had (${error.message}); name a diffusers folder that has them with --configs`,
    );
  }
}

/** A VAE's own folder (config.json beside its weights, as fp16-fix is published), or a model or a run's `final` that has one. */
export async function locateVae(path: string, options: LocateOptions = {}): Promise<ModelSource> {
  if (existsSync(path) && !statSync(path).isDirectory() && isWeightsFile(path))
    return vaeOfFile(path, options);
  const inner = await hubFile(path, options);
  if (inner !== undefined) return vaeOfFile(inner, options);
  if (!existsSync(path) && !looksLikeHubId(path))
    throw new UserError(`no VAE at ${path}; give its folder, its file or a hub id`);
  const { variant } = options;
  const folder = existsSync(path) ? path : await download(path, partFiles('VAE', 'vae', variant), options);
  const own = [folder, join(folder, 'vae')].find((each) => existsSync(join(each, 'config.json')));
  if (!own && existsSync(path)) return locateModel(path, { ...options, variant: undefined });
  if (!own) throw new UserError(`${path} has no VAE in it; give its folder, its file or a hub id`);
  return ofClass(openComponent(own, { variant }), autoencoders, "SDXL's VAE", "a VAE's folder or file");
}

const autoencoders = ['AutoencoderKL', 'AutoencoderTiny'];

/** A tiny autoencoder, wherever a VAE may be. @throws UserError for another */
export async function locateTae(path: string, options: LocateOptions = {}): Promise<ModelSource> {
  const source = await locateVae(path, options);
  if (classOf(source.config('vae')) !== 'AutoencoderTiny')
    throw new UserError(
      `${path} holds a VAE, not a tiny autoencoder (AutoencoderTiny); give one such as madebyollin/taesdxl`,
    );
  return source;
}

/** Those of one kind, of several (models/control/controlnet_union.ts), which their author calls otherwise, and kohya's. */
const controlNetClasses: readonly string[] = [
  'ControlNetModel',
  'ControlNetUnionModel',
  'ControlNetModel_Union',
  LLLITE,
];

/** @throws UserError where a lone component's config names another class */
export function ofClass(
  source: ModelSource,
  wanted: readonly string[],
  what: string,
  mend: string,
): ModelSource {
  const name = classOf(source.config(wanted[0]));
  if (name !== undefined && !wanted.includes(name))
    throw new UserError(`${source.path} holds a ${name}, not ${what} (${wanted.join(' or ')}); give ${mend}`);
  return source;
}

/**
 * A ControlNet's folder (or a checkpoint of diffusers' script, which has one), its file with its config.json beside it, or a hub id,
 * perhaps with such a file there.
 * Of several variants --variant's is taken.
 */
export async function locateControlNet(path: string, options: LocateOptions = {}): Promise<ModelSource> {
  const mend =
    "a ControlNet's folder, its .safetensors or .gguf file or a hub id, perhaps with a file such as xinsir/controlnet-union-sdxl-1.0/diffusion_pytorch_model_promax.safetensors";
  const kind = {
    ...{ what: 'ControlNet', subfolder: 'controlnet', mend, file: llliteFile },
    ...{ openFile: openControlNetFile, openFolder: openControlNetFolder },
  };
  const source = await locateComponent(path, kind, options);
  return asItsWeightsTell(ofClass(source, controlNetClasses, 'a ControlNet that sdxl runs', mend));
}

/** The same of a T2I-Adapter, whose file may be without a config.json. */
export async function locateT2IAdapter(path: string, options: LocateOptions = {}): Promise<ModelSource> {
  const mend =
    "a T2I-Adapter's folder, its .safetensors or .gguf file or a hub id such as TencentARC/t2i-adapter-canny-sdxl-1.0";
  const kind = { what: 'T2I-Adapter', subfolder: 'adapter', mend, openFile: openT2IAdapterFile };
  const source = ofClass(await locateComponent(path, kind, options), ['T2IAdapter'], 'a T2I-Adapter', mend);
  t2iAdapterConfig(source);
  return source;
}

/** A kind of component that is published alone. */
interface Lone {
  what: string;
  /** Where a checkpoint of training has it. */
  subfolder: string;
  mend: string;
  openFile(path: string): ModelSource;
  /** What its folder may have in the place of a config.json, and how such a folder is opened. */
  file?: string;
  openFolder?(path: string, variant?: string): ModelSource;
}

async function locateComponent(
  path: string,
  { what, subfolder, mend, openFile, file = 'config.json', openFolder }: Lone,
  options: LocateOptions,
): Promise<ModelSource> {
  if (existsSync(path) && !statSync(path).isDirectory()) {
    if (!isWeightsFile(path)) throw new UserError(`${path} is not a ${what}: give ${mend}`);
    return openFile(path);
  }
  const inner = await hubFile(path, options, ['config.json']);
  if (inner !== undefined) return openFile(inner);
  if (!existsSync(path) && !looksLikeHubId(path)) throw new UserError(`no ${what} at ${path}; give ${mend}`);
  const folder = existsSync(path)
    ? path
    : await download(path, (all) => componentFiles(all, what, options.variant), options);
  const own = [folder, join(folder, subfolder)].find((each) =>
    ['config.json', file].some((name) => existsSync(join(each, name))),
  );
  if (!own) {
    refuseRun(path);
    throw new UserError(`${path} has no config.json; give ${mend}`);
  }
  return openFolder?.(own, options.variant) ?? openComponent(own, { variant: options.variant });
}

/** The files of a lone component's repository: its config, and its weights as diffusers names them. @throws UserError for none */
export function componentFiles(all: readonly string[], what: string, variant?: string): string[] {
  const weights = all.filter((name) => /^diffusion_pytorch_model[.-].*safetensors$/.test(name));
  if (weights.length === 0)
    throw new UserError(
      `the ${what} has no diffusion_pytorch_model.safetensors on the hub; download what it has, and give a .safetensors file with its config.json beside it`,
    );
  return ['config.json', ...weightsOf(weights, variant)];
}

/** Of a repository those of one part: of a whole model what is in its folder, else a lone component's. */
export const partFiles =
  (what: string, folder: string, variant: string | undefined) =>
  (all: readonly string[]): string[] =>
    all.includes('model_index.json')
      ? neededFiles(all, variant).filter(
          (name) => name.startsWith(`${folder}/`) || name === 'model_index.json',
        )
      : componentFiles(all, what, variant);

/** Downloads the chosen files of a hub id; gives the folder that they are in. @throws UserError */
export const download = (
  path: string,
  files: (all: readonly string[]) => readonly string[],
  { onProgress }: LocateOptions,
): Promise<string> => resolveHub(path, { files, onProgress: (progress) => onProgress?.(path, progress) });

/**
 * A file of weights in a repository, OWNER/NAME/FILE, downloaded with those that lie `beside` it there; undefined where `path` reads
 * otherwise or is there.
 * @throws UserError where it cannot be had
 */
export async function hubFile(
  path: string,
  options: LocateOptions,
  beside: readonly string[] = [],
): Promise<string | undefined> {
  const { id = '', inner } = hubPath(path) ?? {};
  if (inner === undefined || !isWeightsFile(inner)) return undefined;
  const names = [inner, ...beside.map((name) => posix.join(posix.dirname(inner), name))];
  const wanted = (all: readonly string[]) =>
    all.includes(inner) ? names.filter((name) => all.includes(name)) : [];
  try {
    return join(await download(id, wanted, options), inner);
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    const why = error instanceof NothingWantedError ? `${id} on the hub has no ${inner}` : error.message;
    throw new UserError(`there is no file ${path}, and ${why}`);
  }
}

/** A VAE alone in its file, or the one inside a whole model's file. */
function vaeOfFile(path: string, { configs }: LocateOptions): ModelSource {
  const file = openWeightsFile(path);
  const whole = layoutOf(file.tensors) !== undefined;
  file.close();
  return whole ? openSingleFile(path, { configs }) : openVaeFile(path);
}
