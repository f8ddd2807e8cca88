// The kinds of ControlNets that a UNet may have beside it, and how each is loaded: one of diffusers' for one kind of pictures, a union for
// many, and kohya's LLLite, which is no copy of the UNet. One that is given more than once is loaded once.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import type { Device } from '../../engine/device.ts';
import { holding } from '../../engine/memory.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { type ModelSource, openComponent, openComponentFile } from '../checkpoint/checkpoint.ts';
import { openWeightsFile } from '../checkpoint/weights_file.ts';
import { keepInQ8 } from '../unet/q8.ts';
import type { UNetConfig } from '../unet/unet.ts';
import {
  type ControlNet,
  type ControlNetConfig,
  controlnet,
  controlRatio,
  parseControlNetConfig,
} from './controlnet.ts';
import {
  type ControlNetUnion,
  controlnetUnion,
  parseControlNetUnionConfig,
  unionConfigOf,
} from './controlnet_union.ts';
import { latentChannelsOf } from './inpainting.ts';
import {
  checkLLLite,
  isLLLiteFile,
  isLLLiteSource,
  type LLLite,
  lllite,
  llliteConfig,
  llliteFile,
  openLLLite,
} from './lllite.ts';

/** A ControlNet that adds to the UNet's features. */
export type FeatureControlNet = ControlNet | ControlNetUnion;

/** A ControlNet of any kind. */
export type AnyControlNet = FeatureControlNet | LLLite;

export const isUnion = (net: AnyControlNet): net is ControlNetUnion => 'task_embedding' in net.children;

/** Whether it adds to what the UNet's attentions read, where the others add to its features. */
export const isLLLite = (net: AnyControlNet): net is LLLite => !('controlnet_down_blocks' in net.children);

/** One that is known to be of diffusers' plain kind. */
export function ofOneKind(net: AnyControlNet): ControlNet {
  if (isUnion(net) || isLLLite(net)) throw new Error('another ControlNet where one of one kind belongs');
  return net;
}

/** Opens a ControlNet's file: of an LLLite as it is, of another with the config.json beside it. @throws UserError */
export function openControlNetFile(path: string): ModelSource {
  const file = openWeightsFile(path);
  const names = [...file.tensors.keys()];
  file.close();
  return isLLLiteFile(names) ? openLLLite(path) : openComponentFile(path);
}

/** Opens the folder of one, which for an LLLite is that of a training. @throws UserError */
export function openControlNetFolder(folder: string, variant?: string): ModelSource {
  const file = join(folder, llliteFile);
  return existsSync(file) ? openLLLite(file) : openComponent(folder, { variant });
}

/** What is beside a UNet has to fit. */
export interface Fitting {
  unet: UNetConfig;
  /** Pixels per latent of the VAE. */
  ratio: number;
}

/** Loads ControlNets onto a device, each once. @throws UserError where one does not fit its config, or the UNet and the VAE */
export function loadControlNets(
  sources: readonly ModelSource[],
  fitting: Fitting,
  device: Device,
  dtype: FloatDType,
  { q8 = false } = {},
): AnyControlNet[] {
  const loaded = new Map<string, AnyControlNet>();
  return sources.map((source) => {
    const net = loaded.get(source.path) ?? loadAny(source, fitting, device, dtype, q8);
    loaded.set(source.path, net);
    return net;
  });
}

function loadAny(
  source: ModelSource,
  fitting: Fitting,
  device: Device,
  dtype: FloatDType,
  q8: boolean,
): AnyControlNet {
  if (isLLLiteSource(source)) return loadLLLite(source, fitting, device, dtype);
  const union = unionConfigOf(source);
  if (!union) return loadControlNet(source, fitting, device, dtype, { q8 });
  const config = parseControlNetUnionConfig(union, `the config.json of ${source.path}`);
  checkFits(source, config, fitting);
  return filled(controlnetUnion(config), source, device, dtype, q8);
}

/** Loads an LLLite. @throws UserError where it does not fit the UNet and the VAE */
export function loadLLLite(source: ModelSource, fitting: Fitting, device: Device, dtype: FloatDType): LLLite {
  const config = llliteConfig(source);
  checkLLLite(config, fitting, source.path);
  return filled(lllite(config), source, device, dtype, false);
}

/** Loads one of diffusers' plain kind. @throws UserError where it does not fit its config, or the UNet and the VAE */
export function loadControlNet(
  source: ModelSource,
  fitting: Fitting,
  device: Device,
  dtype: FloatDType,
  { gradientCheckpointing = false, q8 = false }: { gradientCheckpointing?: boolean; q8?: boolean } = {},
): ControlNet {
  if (unionConfigOf(source))
    throw new UserError(
      `${source.path} is a ControlNet union, which sdxl sample draws with and sdxl train does not train: give a ControlNet of one kind`,
    );
  const config = parseControlNetConfig(source.config('controlnet'), `the config.json of ${source.path}`);
  checkFits(source, config, fitting);
  return filled(controlnet(config, { gradientCheckpointing }), source, device, dtype, q8);
}

/** With its weights read. */
function filled<N extends AnyControlNet>(
  net: N,
  source: ModelSource,
  device: Device,
  dtype: FloatDType,
  q8: boolean,
): N {
  if (q8) keepInQ8(net);
  holding('controlnet', () => source.load('controlnet', net, device, dtype));
  return net;
}

function checkFits(source: ModelSource, config: ControlNetConfig, { unet, ratio }: Fitting): void {
  const wanted = { ...unet, in_channels: latentChannelsOf(unet) };
  for (const key of sharedKeys) {
    const [own, other] = [config[key], wanted[key]].map((value) => JSON.stringify(value));
    if (own !== other)
      throw new UserError(
        `the ControlNet of ${source.path} has "${key}" ${own} and the UNet ${other}${key === 'in_channels' ? ' of latents' : ''}: take one that was made for this model`,
      );
  }
  if (controlRatio(config) !== ratio)
    throw new UserError(
      `the ControlNet of ${source.path} takes ${controlRatio(config)} pixels to a latent and the VAE ${ratio}: take one that was made for this model`,
    );
}

/** What decides the shapes of inputs and features, in which a ControlNet cannot differ from its UNet. */
const sharedKeys = [
  'in_channels',
  'block_out_channels',
  'layers_per_block',
  'cross_attention_dim',
  'addition_time_embed_dim',
  'projection_class_embeddings_input_dim',
] as const;
