// Checkpoints in one file, .safetensors or .gguf, under the original keys (sgm_keys.ts). Each diffusers key is spelled in the original's
// words and looked up, so whatever else the file holds is passed over. The file has no configs: the published models' are taken,
// or those of a folder.
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { bytesPerElement, type DType, decodeFloats } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { readJsonObject } from '../../io/json.ts';
import type { Room, TensorFile } from '../../io/tensor_file.ts';
import {
  type Json,
  loading,
  loneSource,
  type ModelSource,
  noFolder,
  openModel,
} from '../checkpoint/checkpoint.ts';
import { sourceOf, type WeightSource } from '../checkpoint/weights.ts';
import { openWeightsFile } from '../checkpoint/weights_file.ts';
import { componentConfigs, modelIndex, vaeJson } from './diffusers_config.ts';
import { type Marked, markedIn } from './marks.ts';
import { type ModelPreset, presets, sdxlVae } from './presets.ts';
import { type Layout, layoutOf, loneUNet, type Origin, sgmOrigin, vaeKeyInSgm } from './sgm_keys.ts';
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
  const table = tableOf(path);
  const { layout, scheduler } = table;
  const lender = typeof configs === 'string' ? openModel(configs) : configs;
  // Base and refiner are named in one call, and only the tokenizer is the same in both.
  const isAlike = lender && (lender.modelIndex.requires_aesthetics_score === true) === layout.refiner;
  const alike = isAlike ? lender : undefined;
  const config = configsOf(path, table, alike);
  return loading({
    path,
    modelIndex: {
      ...(alike?.modelIndex ?? modelIndex(presetOf(layout))),
      ...(scheduler._class_name ? { scheduler: ['diffusers', scheduler._class_name] } : {}),
    },
    has: (component) => hasComponent(table, component),
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
    weights(component) {
      const origin = sgmOrigin(component, config, layout);
      return translated(openWeightsFile(path), origin);
    },
  });
}

/** What is read of such a file as it is opened: its header, and its marks of the noise. */
interface Table extends Marked {
  tensors: TensorFile['tensors'];
  layout: Layout;
  /** Of the UNet's first layer. */
  width: number;
  in_channels: number;
}

function tableOf(path: string): Table {
  const file = openWeightsFile(path);
  try {
    const { tensors } = file;
    const layout = layoutOf(tensors);
    const [width, in_channels] = tensors.get('model.diffusion_model.input_blocks.0.0.weight')?.shape ?? [];
    if (layout && width !== undefined) return { tensors, layout, width, in_channels, ...markedIn(file) };
    throw new UserError(
      loneUNet(tensors)
        ? `${path} holds a UNet alone: give a whole model as --model, and this beside it as --unet of sdxl sample or export`
        : `${path} is not an SDXL checkpoint in one file (no UNet or no OpenCLIP under the original keys); give an SDXL base or refiner file, or a diffusers folder`,
    );
  } finally {
    file.close();
  }
}

const presetOf = ({ refiner }: Layout): ModelPreset => presets[refiner ? 'sdxl-refiner' : 'sdxl-base'];

const hasComponent = ({ tensors, layout: { prefixes } }: Table, component: string): boolean =>
  component in prefixes && [...tensors.keys()].some((name) => name.startsWith(prefixes[component]));

/** The configs of `alike`, or else the published ones, with what the file itself tells. @throws UserError for a UNet of neither */
function configsOf(path: string, table: Table, alike: ModelSource | undefined): ModelSource['config'] {
  const { tensors, layout, width, in_channels, vae, scheduler } = table;
  const preset = presetOf(layout);
  const [usual] = preset.unet.block_out_channels;
  if (!alike && width !== usual)
    throw new UserError(
      `${path}: its UNet begins with ${width} channels, SDXL's with ${usual}; name a diffusers folder with its configs (--configs)`,
    );
  const published = componentConfigs(preset);
  const told = (found: Json) => toldIn(tensors, { prefix: layout.prefixes.unet, original: true }, found);
  return (component) => {
    if (component === 'vae' && !hasComponent(table, component))
      throw new UserError(
        `${path} has no VAE in it: give one with --vae, such as madebyollin/sdxl-vae-fp16-fix`,
      );
    const found = alike?.config(component) ?? published[component];
    if (!found) throw new UserError(`${path} has no ${component}`);
    // An inpainting model's, a distilled one's, or one that is told its guidance, whoever lends the rest.
    if (component === 'unet') return { ...found, in_channels, ...told(found) };
    if (component === 'vae') return { ...found, ...vae };
    if (component !== 'scheduler') return found;
    return { ...(!scheduler._class_name && found), ...scheduler };
  };
}

/** What the original keys of a lone VAE may begin with: some are cut out of a whole model as they stand there. */
const vaePrefixes = ['', 'first_stage_model.', 'vae.'];

/**
 * Opens a VAE in one file, under the original keys (`encoder.down.0.block.0…`) or diffusers' own, or a tiny autoencoder. Its
 * config is the config.json beside it, else the published one's.
 */
export function openVaeFile(path: string): ModelSource {
  const file = openWeightsFile(path);
  file.close();
  const part = tinyPart(file);
  if (part) return openTinyFile(path, part);
  const prefix = vaePrefixes.find((each) => file.tensors.has(`${each}decoder.up.0.block.0.conv1.weight`));
  if (prefix === undefined && !file.tensors.has('decoder.up_blocks.0.resnets.0.conv1.weight'))
    throw new UserError(`${path} is not a VAE in one file; give a VAE's folder or file, or a whole model`);
  const beside = join(dirname(path), 'config.json');
  const config = (): Json => (existsSync(beside) ? readJsonObject(beside) : vaeJson(sdxlVae));
  const levels = () => (config().block_out_channels as number[]).length;
  const weights = (): WeightSource =>
    prefix === undefined
      ? sourceOf(path, [openWeightsFile(path)])
      : translated(openWeightsFile(path), (key) => ({ name: prefix + vaeKeyInSgm(key, levels()) }));
  return loneSource(path, { has: (component) => component === 'vae', config, weights });
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
    stamp: file.stamp,
    info(key) {
      const found = find(key);
      return found && { ...found.stored, shape: found.shape };
    },
    bytes,
    inFile(key) {
      const { name, third = 0, transposed } = origin(key);
      const whole = transposed ? undefined : file.inFile?.(name);
      const length = (file.tensors.get(name)?.bytes ?? 0) / 3;
      return whole && { ...whole, offset: whole.offset + third * length };
    },
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
