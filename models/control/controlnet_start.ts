// A ControlNet as training begins it, like diffusers' ControlNetModel.from_unet (Zhang et al. 2023, section 3.1): the UNet's half is
// copied, the last layer of the picture's embedding and all that is added to the UNet begin at zero, so that at first nothing is. A
// small one has fewer transformer blocks and takes what the UNet has of them.
import { noGrad } from '../../engine/grad.ts';
import { namedParameters, placeOf } from '../../engine/module.ts';
import { scale } from '../../engine/ops/unary.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { zeros } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import type { Numbers } from '../adapters/adapters.ts';
import { begun } from '../adapters/layer_init.ts';
import type { Json } from '../checkpoint/checkpoint.ts';
import type { UNet } from '../unet/unet.ts';
import type { ControlNet } from './controlnet.ts';

/** The fields of a UNet's config.json that a ControlNet's has too. */
const shared = [
  'act_fn',
  'addition_embed_type',
  'addition_embed_type_num_heads',
  'addition_time_embed_dim',
  'attention_head_dim',
  'block_out_channels',
  'class_embed_type',
  'cross_attention_dim',
  'down_block_types',
  'downsample_padding',
  'encoder_hid_dim',
  'encoder_hid_dim_type',
  'flip_sin_to_cos',
  'freq_shift',
  'in_channels',
  'layers_per_block',
  'mid_block_scale_factor',
  'mid_block_type',
  'norm_eps',
  'norm_num_groups',
  'num_attention_heads',
  'num_class_embeds',
  'only_cross_attention',
  'projection_class_embeddings_input_dim',
  'resnet_time_scale_shift',
  'transformer_layers_per_block',
  'upcast_attention',
  'use_linear_projection',
];

/** Widths of the picture's embedding, of which each but the first halves the sides. */
const embeddingWidths = [16, 32, 96, 256];

/**
 * A ControlNet's config.json from its UNet's, for a VAE that takes `ratio` pixels to a latent.
 * @throws UserError for a ratio that the embedding's four widths do not reach, or a UNet without the middle block that is copied
 */
export function controlNetJson(
  unet: Json,
  { ratio, transformer_layers_per_block }: { ratio: number; transformer_layers_per_block: readonly number[] },
): Json {
  const halvings = Math.log2(ratio);
  if (halvings >= embeddingWidths.length)
    throw new UserError(
      `the VAE takes ${ratio} pixels to a latent, and a new ControlNet at most ${2 ** (embeddingWidths.length - 1)}: begin with one of that ratio, by controlnet.controlnet_model_name_or_path`,
    );
  if (unet.mid_block_type === null)
    throw new UserError(
      'the UNet has no middle block, which a new ControlNet is begun from: begin with one by controlnet.controlnet_model_name_or_path',
    );
  return {
    _class_name: 'ControlNetModel',
    ...Object.fromEntries(shared.filter((key) => key in unet).map((key) => [key, unet[key]])),
    ...(transformer_layers_per_block.length > 0 && {
      transformer_layers_per_block,
      // As the published small ones: a level without blocks has no transformers either.
      down_block_types: (unet.down_block_types as readonly string[]).map((type, i) =>
        transformer_layers_per_block[i] === 0 ? 'DownBlock2D' : type,
      ),
    }),
    conditioning_channels: 3,
    conditioning_embedding_out_channels: embeddingWidths.slice(0, halvings + 1),
    controlnet_conditioning_channel_order: 'rgb',
    global_pool_conditions: false,
  };
}

const zeroed = /^controlnet_(down_blocks|mid_block|cond_embedding\.conv_out)\b/;

/** Loads a new ControlNet beside its loaded UNet, on the same device and in the same type. */
export function startFromUNet(net: ControlNet, unet: UNet, numbers: Numbers): void {
  const given = namedParameters(unet);
  const own = namedParameters(net);
  const { device, dtype } = placeOf(unet);
  for (const [key, parameter] of own) {
    const from = given.get(key);
    parameter.tensor = unscoped(() => {
      if (from) return noGrad(() => scope(() => scale(from.tensor, 1)));
      return zeroed.test(key)
        ? zeros(parameter.memoryShape, { device, dtype })
        : begun(key, own, numbers, { device, dtype });
    });
  }
}
