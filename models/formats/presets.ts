// The published models' configurations, in the words of their config.json files
// (stabilityai/stable-diffusion-xl-base-1.0 and -refiner-1.0). Single-file checkpoints carry weights only and
// take these; a diffusers folder brings its own. A preset is a whole model of them: what training from random weights
// and benchmarks start from.
import type { Json } from '../checkpoint/checkpoint.ts';
import type { TextConfig } from '../text/clip.ts';
import type { UNetConfig } from '../unet/unet.ts';
import { sdxlScalingFactor, type VaeConfig } from '../vae/vae.ts';

export const sdxlBase = {
  in_channels: 4,
  out_channels: 4,
  sample_size: 128,
  block_out_channels: [320, 640, 1280],
  layers_per_block: 2,
  down_block_types: ['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
  up_block_types: ['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
  attention_head_dim: [5, 10, 20],
  transformer_layers_per_block: [1, 2, 10],
  cross_attention_dim: 2048,
  addition_time_embed_dim: 256,
  projection_class_embeddings_input_dim: 2816,
  norm_num_groups: 32,
  norm_eps: 1e-5,
} satisfies UNetConfig;

export const sdxlRefiner = {
  in_channels: 4,
  out_channels: 4,
  sample_size: 128,
  block_out_channels: [384, 768, 1536, 1536],
  layers_per_block: 2,
  down_block_types: ['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'],
  up_block_types: ['UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
  attention_head_dim: [6, 12, 24, 24],
  transformer_layers_per_block: 4,
  cross_attention_dim: 1280,
  addition_time_embed_dim: 256,
  projection_class_embeddings_input_dim: 2560,
  norm_num_groups: 32,
  norm_eps: 1e-5,
} satisfies UNetConfig;

export const sdxlVae = {
  in_channels: 3,
  out_channels: 3,
  latent_channels: 4,
  sample_size: 1024,
  block_out_channels: [128, 256, 512, 512],
  layers_per_block: 2,
  norm_num_groups: 32,
  scaling_factor: sdxlScalingFactor,
  use_quant_conv: true,
  use_post_quant_conv: true,
  force_upcast: true,
} satisfies VaeConfig;

/** OpenAI's CLIP ViT-L/14, SDXL's first text encoder. */
export const clipL = {
  vocab_size: 49408,
  hidden_size: 768,
  intermediate_size: 3072,
  num_hidden_layers: 12,
  num_attention_heads: 12,
  max_position_embeddings: 77,
  hidden_act: 'quick_gelu',
  layer_norm_eps: 1e-5,
  projection_dim: undefined,
  eos_token_id: 2,
} satisfies TextConfig;

/** OpenCLIP ViT-bigG/14, SDXL's second text encoder and the refiner's only one. */
export const clipBigG = {
  vocab_size: 49408,
  hidden_size: 1280,
  intermediate_size: 5120,
  num_hidden_layers: 32,
  num_attention_heads: 20,
  max_position_embeddings: 77,
  hidden_act: 'gelu',
  layer_norm_eps: 1e-5,
  projection_dim: 1280,
  eos_token_id: 2,
} satisfies TextConfig;

/**
 * The same graph at small widths, for tests and quick benchmarks: 64x64 pixels or larger. Its text encoders have a row for each
 * token of the tokenizers that ship (assets/emoji).
 */
const sdxlTiny = {
  ...sdxlBase,
  sample_size: 16,
  block_out_channels: [16, 24, 32],
  attention_head_dim: [1, 2, 4],
  transformer_layers_per_block: [1, 1, 2],
  cross_attention_dim: 80,
  addition_time_embed_dim: 16,
  projection_class_embeddings_input_dim: 136,
  norm_num_groups: 8,
} satisfies UNetConfig;

const tinyVae = {
  ...sdxlVae,
  sample_size: 64,
  block_out_channels: [16, 24, 32, 32],
  norm_num_groups: 8,
} satisfies VaeConfig;

const tinyClipL = {
  ...clipL,
  vocab_size: 2048,
  hidden_size: 32,
  intermediate_size: 128,
  num_hidden_layers: 4,
  num_attention_heads: 4,
} satisfies TextConfig;

const tinyClipBigG = {
  ...clipBigG,
  vocab_size: 2048,
  hidden_size: 48,
  intermediate_size: 192,
  num_hidden_layers: 4,
  num_attention_heads: 6,
  projection_dim: 40,
} satisfies TextConfig;

/** The noise schedule that both were trained with (scheduler/scheduler_config.json). */
export const sdxlScheduler = {
  _class_name: 'EulerDiscreteScheduler',
  num_train_timesteps: 1000,
  beta_start: 0.00085,
  beta_end: 0.012,
  beta_schedule: 'scaled_linear',
  prediction_type: 'epsilon',
  timestep_spacing: 'leading',
  steps_offset: 1,
  interpolation_type: 'linear',
  use_karras_sigmas: false,
};

/** A whole model without weights. */
export interface ModelPreset {
  unet: UNetConfig;
  vae: VaeConfig;
  /** The refiner has none. */
  text_encoder: TextConfig | undefined;
  text_encoder_2: TextConfig;
  scheduler: Json;
  requires_aesthetics_score: boolean;
}

/** By name: SDXL's base and refiner, and a tiny model of the same graph. */
export const presets: Readonly<Record<string, ModelPreset>> = {
  'sdxl-base': {
    unet: sdxlBase,
    vae: sdxlVae,
    text_encoder: clipL,
    text_encoder_2: clipBigG,
    scheduler: sdxlScheduler,
    requires_aesthetics_score: false,
  },
  'sdxl-refiner': {
    unet: sdxlRefiner,
    vae: sdxlVae,
    text_encoder: undefined,
    text_encoder_2: clipBigG,
    scheduler: sdxlScheduler,
    requires_aesthetics_score: true,
  },
  tiny: {
    unet: sdxlTiny,
    vae: tinyVae,
    text_encoder: tinyClipL,
    text_encoder_2: tinyClipBigG,
    scheduler: sdxlScheduler,
    requires_aesthetics_score: false,
  },
};

const emojiText = {
  vocab_size: 2048,
  hidden_size: 64,
  intermediate_size: 256,
  num_hidden_layers: 3,
  num_attention_heads: 2,
  max_position_embeddings: 77,
  layer_norm_eps: 1e-5,
  eos_token_id: 2,
};

/** The small model that ships (assets/emoji): SDXL's graph for 64x64 pixels, trained by configs/emoji.ts. */
export const emojiModel: ModelPreset = {
  ...presets['sdxl-base'],
  unet: {
    ...presets['sdxl-base'].unet,
    sample_size: 16,
    block_out_channels: [48, 96, 128],
    attention_head_dim: [1, 2, 2],
    transformer_layers_per_block: [0, 1, 1],
    layers_per_block: 1,
    cross_attention_dim: 128,
    addition_time_embed_dim: 32,
    projection_class_embeddings_input_dim: 64 + 6 * 32,
    norm_num_groups: 8,
  },
  vae: {
    ...presets['sdxl-base'].vae,
    sample_size: 64,
    block_out_channels: [24, 48, 64],
    layers_per_block: 1,
    norm_num_groups: 8,
    scaling_factor: 1,
  },
  text_encoder: { ...emojiText, hidden_act: 'quick_gelu', projection_dim: undefined },
  text_encoder_2: { ...emojiText, hidden_act: 'gelu', projection_dim: 64 },
};
