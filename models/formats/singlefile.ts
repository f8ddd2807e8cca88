// Checkpoints in one file, .safetensors or .gguf, under the original keys (sgm_keys.ts). Each diffusers key is spelled in the original's
// words and looked up, so whatever else the file holds is passed over. The file has no configs: the published models' are taken,
// or those of a folder.
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { AnyModule } from '../../engine/module.ts';
import { bytesPerElement, type DType, decodeFloats } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { readJsonObject } from '../../io/files.ts';
import type { Room, TensorFile } from '../../io/tensor_file.ts';
import {
  type Json,
  loadAndClose,
  type ModelSource,
  noFolder,
  openModel,
  sourceOf,
  type WeightSource,
} from '../checkpoint/checkpoint.ts';
import { openWeightsFile } from '../checkpoint/weights_file.ts';
import { componentConfigs, modelIndex, vaeJson } from './diffusers_config.ts';
import { markedIn } from './marks.ts';
import { presets, sdxlVae } from './presets.ts';
import { layoutOf, loneUNet, type Origin, sgmOrigin, vaeKeyInSgm } from './sgm_keys.ts';
import { openTinyFile, tinyPart } from './taesd_file.ts';
import { toldIn } from './unet_told.ts';

/**
 * Opens base or refiner. `configs` is a diffusers folder (or a model) that lends configs, where it is of the same kind, and tokenizers
 * in any case; `tokenizers` is a folder that lends tokenizer/ and tokenizer_2/ alone, as the file has none.
 * @throws UserError for another kind of file
 */
export function openSingleFile(
  path: string,
  { configs, tokenizers }: { configs?: string | ModelSource; tokenizers?: string } = {},
): ModelSource {
  const file = openWeightsFile(path);
  const layout = layoutOf(file.tensors);
  const convIn = file.tensors.get('model.diffusion_model.input_blocks.0.0.weight');
  if (!layout || !convIn) {
    file.close();
    if (loneUNet(file.tensors))
      throw new UserError(
        `${path} holds a UNet alone: give a whole model as --model, and this beside it as --unet of sdxl sample or export`,
      );
    throw new UserError(
      `${path} is not an SDXL checkpoint in one file (no UNet or no OpenCLIP under the original keys); ` +
        'give an SDXL base or refiner file, or a diffusers folder',
    );
  }
  const marked = orClosed(file, markedIn);
  const { refiner, prefixes } = layout;
  const preset = presets[refiner ? 'sdxl-refiner' : 'sdxl-base'];
  const [width] = preset.unet.block_out_channels;
  const lender = typeof configs === 'string' ? openModel(configs) : configs;
  // Base and refiner are named in one call, and only the tokenizer is the same in both.
  const folder =
    lender && (lender.modelIndex.requires_aesthetics_score === true) === refiner ? lender : undefined;
  if (!folder && convIn.shape[0] !== width) {
    file.close();
    throw new UserError(
      `${path}: its UNet begins with ${convIn.shape[0]} channels, SDXL's with ${width}; ` +
        'name a diffusers folder with its configs',
    );
  }
  const published = componentConfigs(preset);
  const told = (found: Json) => toldIn(file.tensors, { prefix: prefixes.unet, original: true }, found);
  const has = (component: string): boolean =>
    component in prefixes && [...file.tensors.keys()].some((name) => name.startsWith(prefixes[component]));
  const config = (component: string): Json => {
    if (component === 'vae' && !has(component))
      throw new UserError(
        `${path} has no VAE in it: give one with --vae, such as madebyollin/sdxl-vae-fp16-fix`,
      );
    const found = folder?.config(component) ?? published[component];
    if (!found) throw new UserError(`${path} has no ${component}`);
    // An inpainting model's, a distilled one's, or one that is told its guidance, whoever lends the rest.
    if (component === 'unet') return { ...found, in_channels: convIn.shape[1], ...told(found) };
    if (component === 'vae') return { ...found, ...marked.vae };
    if (component !== 'scheduler') return found;
    return { ...(!marked.scheduler._class_name && found), ...marked.scheduler };
  };
  const source: ModelSource = {
    path,
    modelIndex: {
      ...(folder?.modelIndex ?? modelIndex(preset)),
      ...(marked.scheduler._class_name ? { scheduler: ['diffusers', marked.scheduler._class_name] } : {}),
    },
    has,
    config,
    folder(component) {
      // Who lends a tokenizer has text encoders, too, which are others.
      if (!component.startsWith('tokenizer')) return noFolder(path)(component);
      if (lender) return lender.folder(component);
      if (tokenizers) return join(tokenizers, component);
      throw new UserError(
        `${path} holds weights only, no ${component}: name a diffusers folder that has one`,
      );
    },
    weights: (component) => translated(openWeightsFile(path), sgmOrigin(component, config, layout)),
    load: (component, module: AnyModule, device, dtype) =>
      loadAndClose(module, source.weights(component), device, dtype),
  };
  file.close();
  return source;
}

/** What the original keys of a lone VAE may begin with: some are cut out of a whole model as they stand there. */
const vaePrefixes = ['', 'first_stage_model.', 'vae.'];

/**
 * Opens a VAE in one file, under the original keys (`encoder.down.0.block.0…`) or diffusers' own, or a tiny autoencoder. Its
 * config is the config.json beside it, else the published one's.
 */
export function openVaeFile(path: string): ModelSource {
  const file = openWeightsFile(path);
  const part = tinyPart(file);
  if (part) {
    file.close();
    return openTinyFile(path, part);
  }
  const prefix = vaePrefixes.find((each) => file.tensors.has(`${each}decoder.up.0.block.0.conv1.weight`));
  if (prefix === undefined && !file.tensors.has('decoder.up_blocks.0.resnets.0.conv1.weight')) {
    file.close();
    throw new UserError(`${path} is not a VAE in one file; give a VAE's folder or file, or a whole model`);
  }
  const beside = join(dirname(path), 'config.json');
  const config = (): Json => (existsSync(beside) ? readJsonObject(beside) : vaeJson(sdxlVae));
  const levels = () => (config().block_out_channels as number[]).length;
  const weights = (): WeightSource =>
    prefix === undefined
      ? sourceOf(path, [openWeightsFile(path)])
      : translated(openWeightsFile(path), (key) => ({ name: prefix + vaeKeyInSgm(key, levels()) }));
  file.close();
  return {
    path,
    modelIndex: {},
    has: (component) => component === 'vae',
    config,
    folder: noFolder(path),
    weights,
    load: (_, module, device, dtype) => loadAndClose(module, weights(), device, dtype),
  };
}

function orClosed<R>(file: TensorFile, read: (file: TensorFile) => R): R {
  try {
    return read(file);
  } catch (error) {
    file.close();
    throw error;
  }
}

/** The file under diffusers' names and shapes. It lists no names: what nobody asks for is passed over. */
export function translated(file: TensorFile, origin: (key: string) => Origin): WeightSource {
  const find = (key: string) => {
    const from = origin(key);
    const stored = file.tensors.get(from.name);
    return stored && { from, stored, shape: shapeOf(from, stored.shape) };
  };
  const bytes = (key: string, room?: Room): Uint8Array => {
    const found = find(key);
    if (!found) throw new UserError(`${file.path} has no tensor ${origin(key).name}`);
    const { from, stored } = found;
    const raw = file.read(from.name, room);
    if (from.third !== undefined) {
      const length = raw.byteLength / 3;
      return raw.slice(from.third * length, (from.third + 1) * length);
    }
    return from.transposed ? transposed(raw, stored.shape, stored.dtype) : raw;
  };
  return {
    where: file.path,
    names: [],
    info(key) {
      const found = find(key);
      return found && { dtype: found.stored.dtype, shape: found.shape };
    },
    bytes,
    floats: (key) => decodeFloats(bytes(key), find(key)?.stored.dtype ?? 'float32'),
    close: () => file.close(),
  };
}

/** Linear layers that the original's VAE and stable-diffusion.cpp have as 1x1 convolutions. */
const pointwise = /\.(attn_1\.[qkv]|proj_in|proj_out)\.weight$/;

/** The diffusers shape of a stored tensor. */
function shapeOf({ name, third, transposed }: Origin, shape: readonly number[]): readonly number[] {
  if (third !== undefined) return [shape[0] / 3, ...shape.slice(1)];
  if (transposed) return shape.toReversed();
  const isPointwise = pointwise.test(name) && shape.slice(2).every((size) => size === 1);
  return isPointwise ? shape.slice(0, 2) : shape;
}

/** [rows, columns] → [columns, rows], on raw elements. */
export function transposed(raw: Uint8Array, [rows, columns]: readonly number[], dtype: DType): Uint8Array {
  const size = bytesPerElement[dtype];
  const out = new Uint8Array(raw.byteLength);
  for (let i = 0; i < rows; i++)
    for (let j = 0; j < columns; j++) {
      const at = (i * columns + j) * size;
      out.set(raw.subarray(at, at + size), (j * rows + i) * size);
    }
  return out;
}
