// What diffusers and transformers write in config.json and model_index.json, made from our configurations: for models that
// were never a diffusers folder. Keys that SDXL's models all share are spelled out, as the libraries' defaults differ.
import type { Json } from '../checkpoint/checkpoint.ts';
import type { TextConfig } from '../text/clip.ts';
import type { UNetConfig } from '../unet/unet.ts';
import type { VaeConfig } from '../vae/vae.ts';
import type { ModelPreset } from './presets.ts';

/** The component configs of a whole model, by folder name; absent components have no entry. */
export function componentConfigs(preset: ModelPreset): Record<string, Json> {
  const { text_encoder: first, text_encoder_2: second } = preset;
  return {
    unet: unetJson(preset.unet),
    vae: vaeJson(preset.vae),
    ...(first ? { text_encoder: textJson(first) } : {}),
    text_encoder_2: textJson(second),
    scheduler: preset.scheduler,
  };
}

/** The library and class of each component of an SDXL model, as model_index.json names them. */
export const componentClasses: Readonly<Record<string, readonly [library: string, className: string]>> = {
  unet: ['diffusers', 'UNet2DConditionModel'],
  vae: ['diffusers', 'AutoencoderKL'],
  text_encoder: ['transformers', 'CLIPTextModel'],
  text_encoder_2: ['transformers', 'CLIPTextModelWithProjection'],
  tokenizer: ['transformers', 'CLIPTokenizer'],
  tokenizer_2: ['transformers', 'CLIPTokenizer'],
  scheduler: ['diffusers', 'EulerDiscreteScheduler'],
};

/** model_index.json. The refiner has no first text encoder. */
export function modelIndex(preset: ModelPreset): Json {
  const base = !preset.requires_aesthetics_score;
  const none = [null, null];
  return {
    _class_name: base ? 'StableDiffusionXLPipeline' : 'StableDiffusionXLImg2ImgPipeline',
    force_zeros_for_empty_prompt: base,
    ...componentClasses,
    ...(base ? {} : { text_encoder: none, tokenizer: none, requires_aesthetics_score: true }),
    scheduler: ['diffusers', String(preset.scheduler._class_name)],
  };
}

const unetJson = (config: UNetConfig): Json => ({
  _class_name: 'UNet2DConditionModel',
  act_fn: 'silu',
  addition_embed_type: 'text_time',
  mid_block_type: 'UNetMidBlock2DCrossAttn',
  use_linear_projection: true,
  flip_sin_to_cos: true,
  freq_shift: 0,
  ...config,
});

export const vaeJson = (config: VaeConfig): Json => ({
  _class_name: 'AutoencoderKL',
  act_fn: 'silu',
  down_block_types: config.block_out_channels.map(() => 'DownEncoderBlock2D'),
  up_block_types: config.block_out_channels.map(() => 'UpDecoderBlock2D'),
  ...config,
});

function textJson({ projection_dim, ...config }: TextConfig): Json {
  const projected = projection_dim !== undefined;
  return {
    architectures: [projected ? 'CLIPTextModelWithProjection' : 'CLIPTextModel'],
    model_type: 'clip_text_model',
    bos_token_id: 0,
    pad_token_id: 1,
    ...config,
    projection_dim: projection_dim ?? config.hidden_size,
  };
}
