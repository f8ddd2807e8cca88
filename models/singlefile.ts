// Checkpoints in one .safetensors file under the original (generative-models, "SGM") keys, as sd_xl_base_1.0
// and sd_xl_refiner_1.0 are published. Each diffusers key is spelled in the original's words and looked up,
// so whatever else the file holds is passed over. The file has no configs: the published models' are taken,
// or those of a folder.
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { AnyModule } from '../engine/module.ts';
import { bytesPerElement, type DType, decodeFloats } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { readJsonObject } from '../io/files.ts';
import { openSafetensors, type SafetensorsFile } from '../io/safetensors.ts';
import {
  type Json,
  loadAndClose,
  type ModelSource,
  openModel,
  sourceOf,
  type WeightSource,
} from './checkpoint.ts';
import { textJson, unetJson, vaeJson } from './diffusers_config.ts';
import { clipBigG, clipL, sdxlBase, sdxlRefiner, sdxlScheduler, sdxlVae } from './presets.ts';
import type { UNetConfig } from './unet.ts';

/** Where a diffusers tensor lies: under `name`, perhaps as one third of a fused matrix, or transposed. */
export interface Origin {
  name: string;
  third?: number;
  transposed?: boolean;
}

const resnetWords: Record<string, string> = {
  norm1: 'in_layers.0',
  conv1: 'in_layers.2',
  time_emb_proj: 'emb_layers.1',
  norm2: 'out_layers.0',
  conv2: 'out_layers.3',
  conv_shortcut: 'skip_connection',
};

const unetWords: Record<string, string> = {
  'conv_in.': 'input_blocks.0.0.',
  'time_embedding.linear_1.': 'time_embed.0.',
  'time_embedding.linear_2.': 'time_embed.2.',
  'add_embedding.linear_1.': 'label_emb.0.0.',
  'add_embedding.linear_2.': 'label_emb.0.2.',
  'mid_block.resnets.0.': 'middle_block.0.',
  'mid_block.attentions.0.': 'middle_block.1.',
  'mid_block.resnets.1.': 'middle_block.2.',
  'conv_norm_out.': 'out.0.',
  'conv_out.': 'out.2.',
};

type BlockLayout = Pick<UNetConfig, 'layers_per_block' | 'up_block_types'>;

/**
 * A UNet key in the original's words (without its `model.diffusion_model.`), where blocks are numbered in one
 * row.
 */
export function unetKeyInSgm(key: string, { layers_per_block: layers, up_block_types }: BlockLayout): string {
  const resnetPart = (rest: string) => rest.replace(/^\w+/, (word) => resnetWords[word] ?? word);
  const found = /^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)$/.exec(
    key,
  );
  if (!found) {
    const prefix = Object.keys(unetWords).find((word) => key.startsWith(word)) ?? '';
    const rest = key.slice(prefix.length);
    return (unetWords[prefix] ?? '') + (prefix.includes('resnets') ? resnetPart(rest) : rest);
  }
  const [, way, level, part, layer, rest] = found;
  const [i, j] = [Number(level), Number(layer)];
  const row =
    way === 'down'
      ? `input_blocks.${1 + i * (layers + 1) + (part === 'downsamplers' ? layers : j)}`
      : `output_blocks.${i * (layers + 1) + (part === 'upsamplers' ? layers : j)}`;
  if (part === 'resnets') return `${row}.0.${resnetPart(rest)}`;
  if (part === 'attentions') return `${row}.1.${rest}`;
  if (part === 'downsamplers') return `${row}.0.${rest.replace(/^conv/, 'op')}`;
  return `${row}.${up_block_types[i].startsWith('CrossAttn') ? 2 : 1}.${rest}`;
}

const vaeWords: readonly (readonly [RegExp, string])[] = [
  [/mid_block\.resnets\.0\./, 'mid.block_1.'],
  [/mid_block\.resnets\.1\./, 'mid.block_2.'],
  [/mid_block\.attentions\.0\./, 'mid.attn_1.'],
  [/group_norm\./, 'norm.'],
  [/to_out\.0\./, 'proj_out.'],
  [/to_([qkv])\./, '$1.'],
  [/down_blocks\.(\d+)\./, 'down.$1.'],
  [/\.resnets\.(\d+)\./, '.block.$1.'],
  [/downsamplers\.0\./, 'downsample.'],
  [/upsamplers\.0\./, 'upsample.'],
  [/conv_shortcut\./, 'nin_shortcut.'],
  [/conv_norm_out\./, 'norm_out.'],
];

/**
 * A VAE key in the original's words (without `first_stage_model.`); decoder levels count from the picture
 * there.
 */
function vaeKeyInSgm(key: string, levels: number): string {
  const reversed = key.replace(/up_blocks\.(\d+)\./, (_, i) => `up.${levels - 1 - Number(i)}.`);
  return vaeWords.reduce((name, [pattern, word]) => name.replace(pattern, word), reversed);
}

const openClipWords: readonly (readonly [RegExp, string])[] = [
  [/^embeddings\.token_embedding\./, 'token_embedding.'],
  [/^embeddings\.position_embedding\.weight$/, 'positional_embedding'],
  [/^final_layer_norm\./, 'ln_final.'],
  [/^encoder\.layers\.(\d+)\./, 'transformer.resblocks.$1.'],
  [/layer_norm([12])\./, 'ln_$1.'],
  [/self_attn\.out_proj\./, 'attn.out_proj.'],
  [/mlp\.fc1\./, 'mlp.c_fc.'],
  [/mlp\.fc2\./, 'mlp.c_proj.'],
];

/**
 * A CLIPTextModelWithProjection key in OpenCLIP's words: q, k and v fused, and a bare projection the other
 * way round.
 */
function openClipOrigin(key: string): Origin {
  if (key === 'text_projection.weight') return { name: 'text_projection', transposed: true };
  const name = openClipWords.reduce(
    (n, [pattern, word]) => n.replace(pattern, word),
    key.replace(/^text_model\./, ''),
  );
  const fused = /^(.+)\.self_attn\.([qkv])_proj\.(weight|bias)$/.exec(name);
  return fused ? { name: `${fused[1]}.attn.in_proj_${fused[3]}`, third: 'qkv'.indexOf(fused[2]) } : { name };
}

const unetPrefix = 'model.diffusion_model.';
const vaePrefix = 'first_stage_model.';
const clipLPrefix = 'conditioner.embedders.0.transformer.';

interface Layout {
  unet: UNetConfig;
  modelIndex: Json;
  /** Before OpenCLIP's own names. */
  openClip: string;
}

const layouts: readonly Layout[] = [
  {
    unet: sdxlBase,
    openClip: 'conditioner.embedders.1.model.',
    modelIndex: { _class_name: 'StableDiffusionXLPipeline', force_zeros_for_empty_prompt: true },
  },
  {
    unet: sdxlRefiner,
    openClip: 'conditioner.embedders.0.model.',
    modelIndex: {
      _class_name: 'StableDiffusionXLImg2ImgPipeline',
      force_zeros_for_empty_prompt: false,
      requires_aesthetics_score: true,
    },
  },
];

/** Base or refiner, told apart by where OpenCLIP stands; undefined for anything else. */
const layoutOf = (file: SafetensorsFile): Layout | undefined =>
  layouts.find(({ openClip }) => file.tensors.has(`${openClip}ln_final.weight`));

/** Which of a single file's tensors belong to which component, by the prefix of their names; none for another file. */
export function singleFilePrefixes(file: SafetensorsFile): Record<string, string> | undefined {
  const layout = layoutOf(file);
  return (
    layout && {
      unet: unetPrefix,
      vae: vaePrefix,
      text_encoder: clipLPrefix,
      text_encoder_2: layout.openClip,
    }
  );
}

/**
 * Opens base or refiner. `configs` is a diffusers folder (or a model) for sizes other than SDXL's; `tokenizers` is a folder
 * that lends tokenizer/ and tokenizer_2/ alone, as the file has none.
 */
export function openSingleFile(
  path: string,
  { configs, tokenizers }: { configs?: string | ModelSource; tokenizers?: string } = {},
): ModelSource {
  const file = openSafetensors(path);
  const layout = layoutOf(file);
  const convIn = file.tensors.get('model.diffusion_model.input_blocks.0.0.weight');
  if (!layout || !convIn) {
    file.close();
    throw new UserError(
      `${path} is not an SDXL checkpoint in one file (no UNet or no OpenCLIP under the original keys); ` +
        'give an SDXL base or refiner file, or a diffusers folder',
    );
  }
  const width = layout.unet.block_out_channels[0];
  if (!configs && convIn.shape[0] !== width) {
    file.close();
    throw new UserError(
      `${path}: its UNet begins with ${convIn.shape[0]} channels, SDXL's with ${width}; ` +
        'name a diffusers folder with its configs',
    );
  }
  const folder = typeof configs === 'string' ? openModel(configs) : configs;
  const config = (component: string): Json => {
    const found = folder?.config(component) ?? publishedConfig(component, layout, file);
    return component === 'scheduler' ? { ...found, ...markedSchedule(file) } : found;
  };
  const source: ModelSource = {
    path,
    modelIndex: folder?.modelIndex ?? layout.modelIndex,
    has: (component) => {
      const { prefix } = componentKeys(component, layout, config);
      return prefix !== '' && [...file.tensors.keys()].some((name) => name.startsWith(prefix));
    },
    config,
    folder(component) {
      if (folder) return folder.folder(component);
      if (tokenizers) return join(tokenizers, component);
      throw new UserError(
        `${path} holds weights only, no ${component}: name a diffusers folder that has one`,
      );
    },
    weights: (component) =>
      translated(openSafetensors(path), componentKeys(component, layout, config).origin),
    load: (component, module: AnyModule, device, dtype) =>
      loadAndClose(module, source.weights(component), device, dtype),
  };
  file.close();
  return source;
}

/**
 * Opens a VAE in one file, under the original keys (`encoder.down.0.block.0…`) or diffusers' own. Its config is the
 * config.json beside it, else the published VAE's.
 */
export function openVaeFile(path: string): ModelSource {
  const file = openSafetensors(path);
  const [original, diffusers] = [
    'decoder.up.0.block.0.conv1.weight',
    'decoder.up_blocks.0.resnets.0.conv1.weight',
  ];
  const spelling = [original, diffusers].find((name) => file.tensors.has(name));
  if (!spelling) {
    file.close();
    throw new UserError(`${path} is not a VAE in one file; give a VAE's folder or file, or a whole model`);
  }
  const beside = join(dirname(path), 'config.json');
  const config = (): Json => (existsSync(beside) ? readJsonObject(beside) : vaeJson(sdxlVae));
  const levels = () => (config().block_out_channels as number[]).length;
  const weights = (): WeightSource =>
    spelling === diffusers
      ? sourceOf(path, [openSafetensors(path)])
      : translated(openSafetensors(path), (key) => ({ name: vaeKeyInSgm(key, levels()) }));
  file.close();
  return {
    path,
    modelIndex: {},
    has: (component) => component === 'vae',
    config,
    folder: () => dirname(path),
    weights,
    load: (_, module, device, dtype) => loadAndClose(module, weights(), device, dtype),
  };
}

/** Two empty tensors by which fine-tunes say how they were trained: a file has no scheduler's config. */
const marks: Readonly<Record<string, Json>> = {
  v_pred: { prediction_type: 'v_prediction' },
  ztsnr: { rescale_betas_zero_snr: true },
};

const markedSchedule = (file: SafetensorsFile): Json =>
  Object.assign({}, ...Object.keys(marks).map((name) => (file.tensors.has(name) ? marks[name] : {})));

/** The marks that a file needs for this scheduler's config. */
export const scheduleMarks = (scheduler: Json): string[] =>
  Object.keys(marks).filter((name) =>
    Object.entries(marks[name]).every(([key, value]) => scheduler[key] === value),
  );

/** What the published model's folder says, as far as the file's shapes do not say otherwise. */
function publishedConfig(component: string, layout: Layout, file: SafetensorsFile): Json {
  const channels = file.tensors.get('model.diffusion_model.input_blocks.0.0.weight')?.shape[1];
  const published: Record<string, Json> = {
    unet: { ...unetJson(layout.unet), in_channels: channels },
    vae: vaeJson(sdxlVae),
    text_encoder: textJson(clipL),
    text_encoder_2: textJson(clipBigG),
    scheduler: { ...sdxlScheduler },
  };
  const found = published[component];
  if (!found) throw new UserError(`${file.path} has no ${component}`);
  return found;
}

export interface ComponentKeys {
  /** What all of the component's names begin with. */
  prefix: string;
  /** Where a diffusers key of the component lies. */
  origin(key: string): Origin;
}

/** How a whole model's components are spelled in one file: base, or the refiner with its one text encoder. */
export const singleFileKeys = (
  component: string,
  config: (component: string) => Json,
  { refiner }: { refiner: boolean },
): ComponentKeys => componentKeys(component, layouts[refiner ? 1 : 0], config);

function componentKeys(
  component: string,
  { openClip }: Pick<Layout, 'openClip'>,
  config: (component: string) => Json,
): ComponentKeys {
  const named = (prefix: string, spell: (key: string) => string): ComponentKeys => ({
    prefix,
    origin: (key) => ({ name: prefix + spell(key) }),
  });
  if (component === 'unet') {
    const layout = config('unet') as unknown as UNetConfig;
    return named(unetPrefix, (key) => unetKeyInSgm(key, layout));
  }
  if (component === 'vae') {
    const levels = (config('vae').block_out_channels as number[]).length;
    return named(vaePrefix, (key) => vaeKeyInSgm(key, levels));
  }
  if (component === 'text_encoder') return named(clipLPrefix, (key) => key);
  if (component !== 'text_encoder_2') return { prefix: '', origin: (key) => ({ name: key }) };
  return {
    prefix: openClip,
    origin(key) {
      const origin = openClipOrigin(key);
      return { ...origin, name: openClip + origin.name };
    },
  };
}

/** The file under diffusers' names and shapes. It lists no names: what nobody asks for is passed over. */
function translated(file: SafetensorsFile, origin: (key: string) => Origin): WeightSource {
  const find = (key: string) => {
    const from = origin(key);
    const stored = file.tensors.get(from.name);
    return stored && { from, stored, shape: shapeOf(from, stored.shape) };
  };
  const bytes = (key: string): Uint8Array => {
    const found = find(key);
    if (!found) throw new UserError(`${file.path} has no tensor ${origin(key).name}`);
    const { from, stored } = found;
    const raw = file.read(from.name);
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

/** The original's VAE keeps the linear layers of its attention as 1x1 convolutions. */
export const isVaeAttention = (name: string): boolean => /\.attn_1\.(q|k|v|proj_out)\.weight$/.test(name);

/**
 * The diffusers shape of a stored tensor; the original's attention in the VAE is written as 1x1 convolutions.
 */
function shapeOf({ name, third, transposed }: Origin, shape: readonly number[]): readonly number[] {
  if (third !== undefined) return [shape[0] / 3, ...shape.slice(1)];
  if (transposed) return shape.toReversed();
  return isVaeAttention(name) ? shape.slice(0, 2) : shape;
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
