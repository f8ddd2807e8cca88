// ControlNet for SDXL (Zhang et al. 2023, figure 3): a copy of the UNet's encoder half and middle block, whose first features get
// the embedded control picture added, and a zero convolution after each feature, named so because training starts it at zero.
// What these give is added to the UNet's own features. The tree spells diffusers' keys.
import { checkpointed } from '../../engine/checkpointing.ts';
import { conv2d } from '../../engine/layers.ts';
import { module } from '../../engine/module.ts';
import { broadcast } from '../../engine/ops/reduce.ts';
import { silu } from '../../engine/ops/unary.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { once } from '../unet/context_cache.ts';
import type { AdditionalResiduals } from '../unet/unet.ts';
import {
  type ConfigRules,
  type EncoderConfig,
  encode,
  encoder,
  featureWidths,
  parseConfig,
  type Question,
} from '../unet/unet_encoder.ts';

/** The fields of diffusers' config.json that SDXL's ControlNets differ in. */
export interface ControlNetConfig extends EncoderConfig {
  /** Widths of the picture's embedding, each but the first after half the resolution of the one before. */
  conditioning_embedding_out_channels: readonly number[];
}

/**
 * Reads a ControlNet's config.json, which errors call `file`.
 * @throws UserError naming a field that is absent, or asks for another architecture
 */
export const parseControlNetConfig = (json: Record<string, unknown>, file: string): ControlNetConfig =>
  parseConfig(json, controlnetRules(file));

/** What a ControlNet's config.json may say. */
export const controlnetRules = (file: string): ConfigRules => ({
  ...{ file, what: "a ControlNet of diffusers' for SDXL" },
  fixed: {
    conditioning_channels: 3,
    controlnet_conditioning_channel_order: 'rgb',
    encoder_hid_dim: null,
    encoder_hid_dim_type: null,
    global_pool_conditions: false,
    num_attention_heads: null,
    num_class_embeds: null,
    only_cross_attention: false,
    resnet_time_scale_shift: 'default',
  },
  oneOf: { mid_block_type: ['UNetMidBlock2DCrossAttn', 'UNetMidBlock2D'] },
  widths: ['conditioning_embedding_out_channels'],
  defaults: { conditioning_embedding_out_channels: [16, 32, 96, 256] },
});

/** Pixels per latent, of a config. */
export const controlRatio = ({ conditioning_embedding_out_channels: widths }: ControlNetConfig): number =>
  2 ** (widths.length - 1);

/** A picture [n, h, w, 3] to features [n, h / 8, w / 8, width]: two 3x3 convolutions for each half of the resolution. */
export const conditioningEmbedding = ([first, ...widths]: readonly number[], width: number) => {
  const from = [first, ...widths];
  const last = from[widths.length];
  return module(
    {
      conv_in: conv2d(3, first, 3, { padding: 1 }),
      blocks: widths.flatMap((c, i) => [
        conv2d(from[i], from[i], 3, { padding: 1 }),
        conv2d(from[i], c, 3, { padding: 1, stride: 2 }),
      ]),
      conv_out: conv2d(last, width, 3, { padding: 1 }),
    },
    (m, picture: Tensor) => {
      let h = silu(m.conv_in(picture));
      for (const conv of m.blocks) h = silu(conv(h));
      return m.conv_out(h);
    },
  );
};

const zeroConvolution = (c: number) => conv2d(c, c, 1);

/** A zero convolution for each feature and one for the middle block's output. */
export function controlBlocks(config: EncoderConfig) {
  const widths = featureWidths(config);
  return {
    controlnet_down_blocks: widths.map(zeroConvolution),
    controlnet_mid_block: zeroConvolution(widths[widths.length - 1]),
  };
}

/** What they make of the features, and where these are all, of the middle block's output last. */
export function residualsFrom(
  m: ReturnType<typeof controlBlocks>,
  { features, middle }: Pick<ReturnType<typeof encode>, 'features' | 'middle'>,
): Tensor[] {
  const residuals = features.map((x, i) => m.controlnet_down_blocks[i](x));
  if (features.length === m.controlnet_down_blocks.length) residuals.push(m.controlnet_mid_block(middle()));
  return residuals;
}

/**
 * What is to be added to the UNet that is asked the same: a tensor for each of its features, the first convolution's first, and
 * where all are wanted one for the middle block's output last. A `picture` is [8 h, 8 w, 3] in [0, 1], in the model's type: one for all
 * rows, [1, ...], or one for each. It is embedded once an image where there is a ContextCache. With gradient checkpointing, transformer
 * blocks run again in backward instead of keeping their activations.
 */
export function controlnet(config: ControlNetConfig, { gradientCheckpointing = false } = {}) {
  const [width] = config.block_out_channels;
  return module(
    {
      ...encoder(config, gradientCheckpointing ? checkpointed : undefined),
      controlnet_cond_embedding: conditioningEmbedding(config.conditioning_embedding_out_channels, width),
      ...controlBlocks(config),
    },
    (m, question: Question, picture: Tensor): Tensor[] => {
      const [hint] = once(question.conditioning.cache, picture, () => {
        const embedded = m.controlnet_cond_embedding(picture);
        const [rows] = question.sample.shape;
        if (embedded.shape[0] === rows) return [embedded];
        return [broadcast(embedded, 0, rows).reshape(rows, ...embedded.shape.slice(1))];
      });
      return residualsFrom(m, encode(m, config, { ...question, hint }));
    },
  );
}

export type ControlNet = ReturnType<typeof controlnet>;

/** What a ControlNet gives, or a sum of several, as a UNet of so many features takes it. */
export const additionalResiduals = (
  residuals: readonly Tensor[],
  features = residuals.length - 1,
): AdditionalResiduals => ({
  down_block_additional_residuals: residuals.slice(0, features),
  mid_block_additional_residual: residuals.at(features),
});
