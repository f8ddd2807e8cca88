// A component by its config: the module that diffusers' or transformers' class of that name stands for, and one small
// forward pass on fixed inputs, by which two copies of its weights can be told equal.
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import type { AnyModule } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { sizeOf, type Tensor, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import type { Json } from '../checkpoint/checkpoint.ts';
import { controlnet, controlRatio, parseControlNetConfig } from '../control/controlnet.ts';
import { controlnetUnion, parseControlNetUnionConfig } from '../control/controlnet_union.ts';
import { LLLITE, type LLLiteConfig, lllite } from '../control/lllite.ts';
import { parseT2IAdapterConfig, t2iAdapter } from '../control/t2i_adapter.ts';
import { parseVisionConfig, visionEncoder } from '../ip_adapter/clip_vision.ts';
import { parseTextConfig, placeTokens, textEncoder } from '../text/clip.ts';
import { parseUNetConfig, unet } from '../unet/unet.ts';
import type { EncoderConfig, Question } from '../unet/unet_encoder.ts';
import { autoencoder } from '../vae/autoencoder.ts';
import { joined } from '../vae/latents.ts';

export interface Component {
  module: AnyModule;
  /** Runs the loaded module on inputs that depend on its shapes alone; the outputs, end to end. */
  probe(device: Device, dtype: FloatDType): Float32Array;
}

/** The class that a config names. */
export function classOf({ _class_name, architectures }: Json): string | undefined {
  const name = _class_name ?? (Array.isArray(architectures) ? architectures[0] : undefined);
  return typeof name === 'string' ? name : undefined;
}

/** Undefined for a class that SDXL has not. @throws UserError for a config that asks for what is not built */
export function buildComponent(config: Json): Component | undefined {
  const name = classOf(config);
  if (name === 'UNet2DConditionModel') return unetComponent(config);
  if (name === 'ControlNetModel') return controlnetComponent(config);
  if (name === 'ControlNetUnionModel') return controlnetUnionComponent(config);
  if (name === LLLITE) return llliteComponent(config);
  if (name === 'T2IAdapter') return t2iAdapterComponent(config);
  if (name === 'AutoencoderKL' || name === 'AutoencoderTiny') return autoencoderComponent(config);
  if (name === 'CLIPVisionModelWithProjection') return visionComponent(config);
  return name?.startsWith('CLIPTextModel') ? textComponent(config) : undefined;
}

const wave = (shape: readonly number[], device: Device, dtype: FloatDType): Tensor =>
  tensor(
    Float32Array.from({ length: sizeOf(shape) }, (_, i) => Math.sin(0.7 * i + (i % 13))),
    shape,
    { device, dtype },
  );

/** Downloads what `forward` makes, and frees it. */
function outputs(forward: () => readonly (Tensor | undefined)[]): Float32Array {
  return noGrad(() => scope(() => joined(forward().flatMap((t) => (t ? [t.floats()] : [])))));
}

/** Inputs that a UNet or a ControlNet takes. */
function questionOf(config: EncoderConfig, device: Device, dtype: FloatDType): Question {
  const ids = 6;
  // However the base and the refiner share these channels out, their sum is what the layer takes.
  const pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim;
  const side = 2 ** config.block_out_channels.length;
  return {
    sample: wave([1, side, side, config.in_channels], device, dtype),
    times: tensor([500], [1], { device }),
    conditioning: {
      context: wave([1, 77, config.cross_attention_dim], device, dtype),
      textEmbeds: wave([1, pooled], device, dtype),
      timeIds: wave([1, ids], device, 'float32'),
    },
  };
}

function unetComponent(json: Json): Component {
  const config = parseUNetConfig(json);
  const module = unet(config);
  const probe = (device: Device, dtype: FloatDType) =>
    outputs(() => {
      const { sample, times, conditioning } = questionOf(config, device, dtype);
      return [module(sample, times, conditioning)];
    });
  return { module, probe };
}

function controlnetComponent(json: Json): Component {
  const config = parseControlNetConfig(json, 'config.json');
  const module = controlnet(config);
  const probe = (device: Device, dtype: FloatDType) =>
    outputs(() => {
      const question = questionOf(config, device, dtype);
      const side = question.sample.shape[1] * controlRatio(config);
      return module(question, wave([1, side, side, 3], device, dtype));
    });
  return { module, probe };
}

function controlnetUnionComponent(json: Json): Component {
  const config = parseControlNetUnionConfig(json, 'config.json');
  const module = controlnetUnion(config);
  const probe = (device: Device, dtype: FloatDType) =>
    outputs(() => {
      const question = questionOf(config, device, dtype);
      const side = question.sample.shape[1] * controlRatio(config);
      return module(question, [{ picture: wave([1, side, side, 3], device, dtype), mode: 0, weight: 1 }]);
    });
  return { module, probe };
}

function llliteComponent({ layers }: Json): Component {
  const module = lllite(layers as LLLiteConfig);
  const probe = (device: Device, dtype: FloatDType) =>
    outputs(() => [...module(wave([1, 32, 32, 3], device, dtype)).values()]);
  return { module, probe };
}

function t2iAdapterComponent(json: Json): Component {
  const config = parseT2IAdapterConfig(json, 'config.json');
  const module = t2iAdapter(config);
  const side = 4 * config.downscale_factor;
  const probe = (device: Device, dtype: FloatDType) =>
    outputs(() => module(wave([1, config.in_channels, side, side], device, dtype)));
  return { module, probe };
}

function autoencoderComponent(json: Json): Component {
  const coder = autoencoder(json);
  const pixels = 2 * 2 ** (coder.config.block_out_channels.length - 1);
  const probe = (device: Device, dtype: FloatDType) =>
    outputs(() => {
      const x = wave([1, pixels, pixels, coder.config.in_channels], device, dtype);
      if (!coder.posterior) {
        const { latents } = coder.encode(x);
        return [latents, coder.decode(latents)];
      }
      const { mean, logvar } = coder.encode(x);
      return [mean, logvar, coder.decode(mean)];
    });
  return { module: coder.module, probe };
}

function textComponent(json: Json): Component {
  const config = parseTextConfig(json);
  const module = textEncoder(config);
  const tokens = Int32Array.from({ length: 77 }, (_, i) => (i * 31) % config.vocab_size);
  const probe = (device: Device) =>
    outputs(() => {
      const placed = placeTokens(module, tokens, tokens.length, device);
      const { hidden, pooled } = module(placed, { layer: -2, pooled: true });
      return [hidden, pooled];
    });
  return { module, probe };
}

function visionComponent(json: Json): Component {
  const config = parseVisionConfig(json);
  const module = visionEncoder(config);
  const probe = (device: Device, dtype: FloatDType) =>
    outputs(() => {
      const pixels = wave([1, config.image_size, config.image_size, 3], device, dtype);
      return [module(pixels, 'penultimate'), module(pixels, 'image_embeds')];
    });
  return { module, probe };
}
