// What a pipeline is loaded with, and whether a model's parts fit each other. TypeScript holds a program to the options; of JavaScript each
// key is held here, as of a request (request.ts).
import type { Device } from '../engine/device.ts';
import { type FloatDType, isFloat } from '../io/dtype.ts';
import { didYouMean, UserError } from '../io/errors.ts';
import { isRecord } from '../io/json.ts';
import type { ModelSource } from './checkpoint/checkpoint.ts';
import { flag, listOf, type Rule } from './checkpoint/config_values.ts';
import { latentChannelsOf } from './control/inpainting.ts';
import type { IPAdapterSource } from './ip_adapter/ip_adapter.ts';
import type { AdapterFile } from './lora/lora.ts';
import { shown } from './request.ts';
import type { TextConfig } from './text/clip.ts';
import type { UNetConfig } from './unet/unet.ts';
import { pooledTaken } from './unet/unet_encoder.ts';
import type { Autoencoder } from './vae/autoencoder.ts';

/** What a model's weights are of; a refiner has no text_encoder. */
export const parts = ['text_encoder', 'text_encoder_2', 'unet', 'vae'] as const;
export type Part = (typeof parts)[number];

/** The text encoders of a model, in their order. */
export const textParts = (source: ModelSource): ('text_encoder' | 'text_encoder_2')[] =>
  (['text_encoder', 'text_encoder_2'] as const).filter((name) => source.has(name));

/** How a pipeline is loaded, and with what beside its model. */
export interface LoadOptions {
  device: Device;
  /** Of weights and activations: 'bfloat16' for full-size models, 'float32' for small ones. */
  dtype: FloatDType;
  /** The parts whose weights are read, all where absent. The others are built without, and only what needs none of theirs can be done. */
  only?: readonly Part[];
  /** Another VAE than the model's. */
  vaeSource?: ModelSource;
  /** The VAE's own type; `dtype` where it is not given, but float32 for one that overflows in float16 (force_upcast). */
  vaeDtype?: FloatDType;
  /** What controls the UNet, in the order of a request's control_image. */
  controlnet?: readonly ModelSource[];
  /** T2I-Adapters, in the order of a request's adapter_image. */
  adapter?: readonly ModelSource[];
  /** What pictures are drawn by, in the order of a request's ip_adapter_image. */
  ipAdapter?: readonly IPAdapterSource[];
  /** Adapters that are merged while weights are read, `scale` times; 1 where it is not told. */
  lora?: readonly AdapterFile[];
  /** Keeps the matrices of the UNet and of ControlNets in 8-bit integers: half the memory, a little less exact, a little slower. */
  q8?: boolean;
  /** Keeps the UNet's feed-forward layers in 8-bit floats: faster on Hopper, less exact anywhere. For sampling. */
  fp8?: boolean;
  /** For training: the UNet runs its blocks again in backward instead of keeping their activations. */
  gradientCheckpointing?: boolean;
}

const isSource = (value: unknown): boolean => isRecord(value) && typeof value.load === 'function';
const dtype: Rule = ['float32, bfloat16 or float16', (value) => isFloat(value as FloatDType)];

const rules: Readonly<Record<keyof LoadOptions, Rule>> = {
  device: [
    "what openDevice('auto') gives",
    (value) => typeof (value as Device | undefined)?.memory === 'object',
  ],
  dtype,
  only: listOf(`${parts.slice(0, -1).join(', ')} and ${parts.at(-1)}`, (value) =>
    parts.some((part) => part === value),
  ),
  vaeSource: ['what await locateVae(PATH) gives', isSource],
  vaeDtype: dtype,
  controlnet: listOf('what await locateControlNet(PATH) gives', isSource),
  adapter: listOf('what await locateT2IAdapter(PATH) gives', isSource),
  ipAdapter: listOf(
    'what await locateIPAdapter(PATH) gives',
    (value) => isRecord(value) && isSource(value.imageEncoder),
  ),
  lora: listOf(
    '{ path, scale }, path by await locateLora(PATH)',
    (value) => isRecord(value) && typeof value.path === 'string',
  ),
  q8: flag,
  fp8: flag,
  gradientCheckpointing: flag,
};

/** What is typed for our keys by habit. */
const foreign: Readonly<Record<string, string>> = {
  torch_dtype: 'dtype',
  vae: 'vaeSource, by await locateVae(PATH)',
  variant: "locateModel's: await locateModel(PATH, { variant })",
};

/** What is given, where null is what is left out. @throws UserError for what TypeScript would tell a program of */
export function checkedLoad(source: ModelSource, given: Partial<LoadOptions> = {}): LoadOptions {
  if (!isSource(source))
    throw new UserError('loadPipeline takes an opened model first: what await locateModel(PATH) gives');
  const { device, dtype, ...optional } = given;
  const told = Object.entries(optional).filter(([, value]) => (value ?? null) !== null);
  const options = { ...Object.fromEntries(told), device, dtype };
  for (const [key, value] of Object.entries(options)) {
    if (!Object.hasOwn(rules, key))
      throw new UserError(
        `loadPipeline takes no ${key}${Object.hasOwn(foreign, key) ? `; here it is ${foreign[key]}` : didYouMean(key, Object.keys(rules))}`,
      );
    const [want, holds] = rules[key as keyof LoadOptions];
    if (!holds(value)) throw new UserError(`loadPipeline's ${key} is ${shown(value)}: give ${want}`);
  }
  return options as LoadOptions;
}

/**
 * The UNet reads the text encoders' features side by side, a refiner's are of text_encoder_2 alone, and that one's pooled vector.
 * @throws UserError where it takes others than they give
 */
export function checkTexts(
  source: ModelSource,
  unet: UNetConfig,
  configs: readonly TextConfig[],
  aesthetic: boolean,
): void {
  const { path } = source;
  const taken = unet.cross_attention_dim;
  const given = configs.reduce((sum, { hidden_size }) => sum + hidden_size, 0);
  if (given !== taken)
    throw new UserError(
      source.has('text_encoder')
        ? `the UNet of ${path} takes ${taken} features of text and its text encoders give ${given}; take all of them from one model`
        : `${path} has no text_encoder, and its UNet takes ${taken} features of text, of which text_encoder_2 gives ${given}; the model is incomplete, download it again`,
    );
  const [wanted, pooled] = [pooledTaken(unet, aesthetic), configs.at(-1)?.projection_dim];
  if (pooled !== undefined && pooled !== wanted)
    throw new UserError(
      `the UNet of ${path} takes a pooled prompt of ${wanted} numbers, by "projection_class_embeddings_input_dim" and "addition_time_embed_dim" in its config.json, and text_encoder_2 gives ${pooled}; take config and weights from one model`,
    );
}

/** @throws UserError for a VAE whose latents the UNet does not take */
export function checkChannels(path: string, unetConfig: UNetConfig, { config }: Autoencoder): void {
  const taken = latentChannelsOf(unetConfig);
  if (taken !== config.latent_channels)
    throw new UserError(
      `the UNet of ${path} takes latents of ${taken} channels and the VAE gives ${config.latent_channels}; use the VAE that the model was made for`,
    );
}
