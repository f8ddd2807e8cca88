// A run: everything that decides what is trained, on what, and how, as one typed value in a file of its own. The interface
// is for editors and readers; the table below it holds defaults and what each key takes, and both must name the same keys
// or this file does not compile. Names are those of diffusers' training scripts where these have one.
import { type Algo, algos } from '../models/adapter_kinds.ts';
import type { ModelPreset } from '../models/presets.ts';
import { type RandomMask, randomMasks } from './data/random_mask.ts';
import {
  choice,
  countOrShare,
  type Fields,
  flag,
  list,
  number,
  pair,
  text,
  textOrObject,
  whole,
} from './fields.ts';
import type { LrSchedule } from './lr_schedule.ts';
import { type LcmSettings, lcmFields } from './method_settings.ts';
import type { ObjectiveSettings } from './objective.ts';
import type { OptimizerSettings } from './optimizers/create.ts';
import { type PreviewSettings, previewPrompt } from './preview_prompts.ts';

export interface Run {
  /** Names the run in logs and, unless `output` says otherwise, its folder runs/NAME. */
  name: string;
  /** Receives checkpoints, previews, the log and the final model. */
  output: string;
  seed: number;
  /** A diffusers folder, an original .safetensors or .gguf file, a hub id; or a preset, which starts from random weights. */
  model: string | ModelPreset;
  /** Another UNet than the model's: a file (ComfyUI's .gguf), a folder or a hub id. Empty for the model's own. */
  unet: string;
  /** Another VAE than the model's: a folder or a hub id. Empty for the model's own. */
  vae: string;
  /** The type of weights and activations. bfloat16 weights keep float32 masters unless the optimizer rounds stochastically. */
  dtype: 'float32' | 'bfloat16';
  train: {
    /** What is trained: the UNet's own weights, LoRA on it, a ControlNet, T2I- or IP-Adapter beside it, a token's vectors, or the VAE. */
    target: 'unet' | 'lora' | 'controlnet' | 't2i_adapter' | 'ip_adapter' | 'textual_inversion' | 'vae';
    /**
     * What it learns from: the diffusion loss of `objective`, or, for `unet` and `lora`, pairs of pictures of which people prefer one
     * (Diffusion-DPO), or the model itself: to forget a concept (ESD), or to draw in a few steps (`lcm`).
     */
    method: 'diffusion' | 'dpo' | 'esd' | 'lcm';
    /** Of the UNet's weights, those whose key contains one of these; empty for all. */
    parts: readonly string[];
    /** Train both text encoders along with the UNet: whole for target `unet`, by adapters for `lora`. */
    text_encoders: boolean;
    /** Recompute activations in the backward pass: less memory, a third more work. */
    gradient_checkpointing: boolean;
    /**
     * Move each weight as soon as its gradient is there, and drop that: none of the gradients' memory, the same bits. With
     * `optimizer.max_grad_norm` a pass is made twice, as the norm has to be known first.
     */
    fused_backward_pass: boolean;
    /** Keep the UNet that is not trained itself in 8-bit integers: half its memory. For all targets but `unet` and `vae`. */
    q8: boolean;
  };
  lora: {
    /** The kind of adapter: LoRA, or LyCORIS's LoHa, LoKr or OFT (its diag-oft). */
    algo: Algo;
    /** Of OFT the side of its blocks, as near as divisors of a layer's outputs come. */
    rank: number;
    alpha: number;
    /** Of convolutions larger than 1x1, of which `targets` then names some (LoCon); 0 for those above. */
    conv_rank: number;
    conv_alpha: number;
    /** LoKr: what each side of a weight is divided by, where it can be; -1 for two numbers near each other. */
    factor: number;
    /** LoKr: make the smaller of its two matrices a product, too. */
    decompose_both: boolean;
    /**
     * Of LoRA, train the lengths of each weight's rows apart from their directions (DoRA, Liu et al. 2024). What a dropout drops leaves the
     * lengths as they are.
     */
    use_dora: boolean;
    /** OFT: stretch the rows of weights, too. */
    rescaled: boolean;
    /** Of LoRA, the share of A's results that a pass drops (peft's lora_dropout drops what A is given). */
    network_dropout: number;
    /** The share of a layer's ranks, or of LoHa's and LoKr's outputs, that a picture drops. */
    rank_dropout: number;
    /** The share of layers whose adapter a picture drops. */
    module_dropout: number;
    /** Of LoRA, by how much faster than A its B learns (LoRA+, Hayou et al. 2024); 1 is as fast. */
    loraplus_lr_ratio: number;
    /** The greatest norm that the difference of a layer's weight may have, or OFT's blocks; 0 for any. */
    scale_weight_norms: number;
    /** Names of the UNet's linear layers and convolutions, as peft's target_modules. */
    targets: readonly string[];
    /** Those of the text encoders, where these are trained. */
    text_encoder_targets: readonly string[];
    /** A LoRA to go on with, of these ranks: a file, or a run's folder or checkpoint. Empty to begin with one that changes nothing. */
    network_weights: string;
  };
  /** Latent consistency distillation. */
  lcm: LcmSettings;
  controlnet: {
    /** The one to go on with: a folder, a .safetensors file or a hub id. Empty to begin with a copy of the UNet's encoder. */
    controlnet_model_name_or_path: string;
    /** Transformer blocks of each level of a new one: fewer make a small ControlNet. Empty for as many as the UNet has. */
    transformer_layers_per_block: readonly number[];
  };
  t2i_adapter: {
    /** The one to go on with: a folder, a .safetensors file or a hub id. Empty to begin with a new one. */
    adapter_model_name_or_path: string;
  };
  ip_adapter: {
    /** The frozen vision encoder of a new one, a CLIPVisionModelWithProjection: a folder, or OWNER/NAME/FOLDER on the hub. */
    image_encoder_path: string;
    /** What makes tokens of a picture: 4 of its embedding (plain), or 16 of all the encoder's states (plus). */
    image_projection: 'ImageProjModel' | 'Resampler';
    /** One to go on with, and its vision encoder: what `sdxl sample --ip-adapter` takes. */
    pretrained_ip_adapter_path: string;
    /** Share of pictures that are left away, for zeros. */
    zeros_image_embeddings_prob: number;
  };
  inpainting: {
    /**
     * Trains the UNet, or LoRA on it, to paint in what is masked, which it sees beside the latents in nine channels: a base model's UNet is
     * widened. `random_mask` draws boxes and ellipses, `bbox` boxes of half the sides, `irregular` strokes, a mask for each of the
     * `dataset.crops` versions of a picture; of `conditioning_image` the white is painted anew. Empty for another model.
     */
    mask_mode: '' | RandomMask | 'conditioning_image';
    /** The share of drawn masks that are of the whole picture; runwayml's model was trained with 0.25. */
    full_mask_rate: number;
  };
  textual_inversion: {
    /** What stands in captions and prompts for what is learnt: no word yet, and the name of the file. */
    placeholder_token: string;
    /** The word that it begins as, of no more tokens than there are vectors. */
    initializer_token: string;
    /** Vectors in each text encoder. */
    num_vectors: number;
    /** Templates about an object or in a style (data/templates.ts) in the captions' place; empty for captions that hold the token. */
    learnable_property: '' | 'object' | 'style';
    /** A textual inversion to go on with, of so many vectors: a file, or a run's folder or checkpoint. */
    weights: string;
  };
  dataset: {
    /** A folder, a .parquet file, or owner/name on the hub. */
    path: string;
    revision: string;
    split: string;
    image_column: string;
    caption_column: string;
    /** What the name of a picture's file of captions ends in. */
    caption_extension: string;
    /**
     * What a ControlNet or T2I-Adapter is shown with each picture, or the mask of its loss or of inpainting, of the same size. Empty for
     * `conditioning_image` where it is wanted.
     */
    conditioning_image_column: string;
    /** For method `dpo`: the picture of the same shape that was rejected for each. Empty for `rejected`, where it is wanted. */
    rejected_image_column: string;
    /** Parquet: 1 where `image_column` has the preferred picture, 0 where `rejected_image_column` has, 0.5 for a tie, left out. Empty for 1. */
    label_column: string;
    /** Trains an InstructPix2Pix model on these: what each picture was before the edit that its caption tells, of the same size. Empty for another. */
    original_image_column: string;
    /** The share of such captions that are left away, of pictures before the edit, and of both. */
    conditioning_dropout_prob: number;
    /** A picture's own alpha is the mask of its loss. The VAE is then shown the colours beneath what is transparent, else white. */
    alpha_mask: boolean;
    /** The caption of pictures that have none; empty where each must have its own. */
    instance_prompt: string;
    /** An epoch has the pictures of a folder `10_name` ten times, as kohya's trainer. */
    folder_repeats: boolean;
    /**
     * Pictures of the subject's class for prior preservation (DreamBooth, Ruiz et al. 2023), as `path` is given; empty for none. An
     * epoch has as many of them as of the others, in turn.
     */
    class_data_dir: string;
    /** The caption of those that have none. */
    class_prompt: string;
    /** Pixels of the square whose area all pictures take. */
    resolution: number;
    /** Group pictures by aspect ratio into SDXL's sizes; otherwise all are cropped to the square. */
    aspect_ratio_buckets: boolean;
    /** Crop at the centre rather than at random. */
    center_crop: boolean;
    /** Versions of one picture that are prepared, where crop, flip or a mask are drawn. */
    crops: number;
    random_flip: boolean;
    interpolation: 'lanczos' | 'bilinear';
    /** Tokens of a caption that are read, in chunks of 75: the further ones as `sdxl sample --max-token-length` reads them. */
    max_token_length: number;
    /** Share of captions replaced by the model's unconditional. */
    caption_dropout_rate: number;
    caption_tag_dropout_rate: number;
    shuffle_caption: boolean;
    keep_tokens: number;
    caption_separator: string;
    /** What becomes of pictures that cannot be read, and of captions without a picture and the reverse. */
    broken: 'skip' | 'fatal';
    /** Told to a model that wants an aesthetic score: the refiner. */
    aesthetic_score: number;
    /** Where prepared latents and embeddings are kept; empty for a folder in `output`. */
    cache: string;
  };
  /** Pictures in one pass. */
  batch_size: number;
  /** Passes summed into one update; several GPUs take them in turn. */
  gradient_accumulation_steps: number;
  epochs: number;
  /** Updates; 0 to count by epochs. */
  steps: number;
  objective: ObjectiveSettings;
  dpo: {
    /** How near the network is held to the model as it was loaded: large is near. */
    beta_dpo: number;
  };
  esd: {
    /** How far away from the concept, as a guidance; 0 for no further than without a caption. */
    negative_guidance: number;
  };
  vae_objective: {
    l1: number;
    mse: number;
    kl: number;
  };
  optimizer: OptimizerSettings & {
    lr: number;
    /** The text encoders' learning rate, where they are trained; 0 for `lr`. It goes by the same schedule. */
    text_encoder_lr: number;
    /**
     * The learning rates of the UNet's blocks, for targets `unet` and `lora`, as kohya numbers them: 0 the embeddings of time and sizes,
     * 1 to 9 the way down, 10 to 12 the middle, 13 to 21 the way up, 22 the last layers. They go by the same schedule, and 0 trains
     * nothing of a block. Empty for `lr`.
     */
    block_lr: readonly number[];
    /** Global norm that gradients are clipped to; 0 for none. */
    max_grad_norm: number;
  };
  lr_scheduler: LrSchedule;
  ema: {
    /** Decay of the moving average of the weights; 0 for none. */
    decay: number;
  };
  checkpoints: {
    /** Updates between checkpoints; 0 for one at the end of each epoch. */
    every_steps: number;
    /** How many are kept. */
    keep: number;
  };
  previews: PreviewSettings;
  /** The loss of the averaged weights on noise, timesteps and captions that no update draws, each time the same. */
  validation: {
    /** Pictures it is measured on, evenly spread over the dataset; 0 for none. */
    samples: number;
    /** Updates between; 0 for every epoch. */
    every_steps: number;
  };
  /** Updates between lines of the log. */
  log_every: number;
  /** Updates in a row that may fail on a loss that is not finite. */
  max_nonfinite: number;
}

/** What a file may leave out: everything. */
export type RunInput = {
  [K in keyof Run]?: Run[K] extends readonly unknown[] | string | number ? Run[K] : Partial<Run[K]>;
};

/** Learning rate, weight decay, clipping, epochs and checkpoints are by default the seed recipe's (configs/pokemon-blip.ts). */
export const fields: Fields<Run> = {
  name: text(''),
  output: text(''),
  seed: whole(0),
  model: textOrObject<ModelPreset>(
    'a folder, a .safetensors or .gguf file, a hub id, or a preset { unet, vae, text_encoder, ... }',
  ),
  unet: text(''),
  vae: text(''),
  dtype: choice('float32', 'float32', 'bfloat16'),
  train: {
    target: choice(
      'unet',
      'unet',
      'lora',
      'controlnet',
      't2i_adapter',
      'ip_adapter',
      'textual_inversion',
      'vae',
    ),
    method: choice('diffusion', 'diffusion', 'dpo', 'esd', 'lcm'),
    parts: list([], text('')),
    text_encoders: flag(false),
    gradient_checkpointing: flag(false),
    fused_backward_pass: flag(false),
    q8: flag(false),
  },
  lora: {
    algo: choice('lora', ...algos),
    rank: whole(8, { min: 1 }),
    alpha: number(8, { min: 0 }),
    conv_rank: whole(0),
    conv_alpha: number(0, { min: 0 }),
    factor: whole(-1, { min: -1 }),
    decompose_both: flag(false),
    use_dora: flag(false),
    rescaled: flag(false),
    network_dropout: number(0, { min: 0, below: 1 }),
    rank_dropout: number(0, { min: 0, below: 1 }),
    module_dropout: number(0, { min: 0, below: 1 }),
    loraplus_lr_ratio: number(1, { min: 1 }),
    scale_weight_norms: number(0, { min: 0 }),
    targets: list(['to_q', 'to_k', 'to_v', 'to_out.0'], text('')),
    text_encoder_targets: list(['q_proj', 'k_proj', 'v_proj', 'out_proj'], text('')),
    network_weights: text(''),
  },
  lcm: lcmFields,
  controlnet: {
    controlnet_model_name_or_path: text(''),
    transformer_layers_per_block: list([], whole(0)),
  },
  t2i_adapter: { adapter_model_name_or_path: text('') },
  ip_adapter: {
    image_encoder_path: text(''),
    image_projection: choice('ImageProjModel', 'ImageProjModel', 'Resampler'),
    pretrained_ip_adapter_path: text(''),
    zeros_image_embeddings_prob: number(0.1, { min: 0, max: 1 }),
  },
  inpainting: {
    mask_mode: choice('', '', ...randomMasks, 'conditioning_image'),
    full_mask_rate: number(0, { min: 0, max: 1 }),
  },
  textual_inversion: {
    placeholder_token: text(''),
    initializer_token: text(''),
    num_vectors: whole(1, { min: 1 }),
    learnable_property: choice('', '', 'object', 'style'),
    weights: text(''),
  },
  dataset: {
    path: text(''),
    revision: text('main'),
    split: text('train'),
    image_column: text('image'),
    caption_column: text('text'),
    caption_extension: text('.txt'),
    conditioning_image_column: text(''),
    rejected_image_column: text(''),
    label_column: text(''),
    original_image_column: text(''),
    conditioning_dropout_prob: number(0, { min: 0, max: 0.33 }),
    alpha_mask: flag(false),
    instance_prompt: text(''),
    folder_repeats: flag(false),
    class_data_dir: text(''),
    class_prompt: text(''),
    resolution: whole(1024, { min: 8 }),
    aspect_ratio_buckets: flag(false),
    center_crop: flag(false),
    crops: whole(1, { min: 1 }),
    random_flip: flag(false),
    interpolation: choice('lanczos', 'lanczos', 'bilinear'),
    max_token_length: whole(75, { min: 1 }),
    caption_dropout_rate: number(0, { min: 0, max: 1 }),
    caption_tag_dropout_rate: number(0, { min: 0, max: 1 }),
    shuffle_caption: flag(false),
    keep_tokens: whole(0),
    caption_separator: text(','),
    broken: choice('fatal', 'fatal', 'skip'),
    aesthetic_score: number(6),
    cache: text(''),
  },
  batch_size: whole(1, { min: 1 }),
  gradient_accumulation_steps: whole(1, { min: 1 }),
  epochs: whole(50, { min: 1 }),
  steps: whole(0),
  objective: {
    prediction_type: choice('', '', 'epsilon', 'v_prediction'),
    loss: choice('mse', 'mse', 'huber'),
    huber_delta: number(1, { min: 0 }),
    prior_loss_weight: number(1, { min: 0 }),
    masked_loss: flag(false),
    snr_gamma: number(0, { min: 0 }),
    debiased: flag(false),
    zero_terminal_snr: flag(false),
    noise_offset: number(0, { min: 0 }),
    pyramid_noise: number(0, { min: 0 }),
    input_perturbation: number(0, { min: 0 }),
    timesteps: choice('uniform', 'uniform', 'earlier', 'later', 'range', 'cubic'),
    timestep_bias: number(0.25, { min: 0, max: 1 }),
    timestep_range: pair([0.25, 0.75], number(0, { min: 0, max: 1 })),
    min_timestep: whole(0, { min: 0 }),
    max_timestep: whole(0, { min: 0 }),
  },
  dpo: { beta_dpo: number(5000, { min: 0 }) },
  esd: { negative_guidance: number(1, { min: 0 }) },
  vae_objective: { l1: number(1, { min: 0 }), mse: number(1, { min: 0 }), kl: number(1e-4, { min: 0 }) },
  optimizer: {
    name: choice('adamw', 'adamw', 'adafactor', 'adamw8bit', 'lion', 'prodigy'),
    lr: number(1e-5, { min: 0 }),
    text_encoder_lr: number(0, { min: 0 }),
    block_lr: list([], number(0, { min: 0 })),
    betas: pair([0.9, 0.999], number(0, { min: 0, below: 1 })),
    eps: number(1e-8, { min: 0 }),
    moments_dtype: choice('float32', 'float32', 'bfloat16'),
    weight_decay: number(1e-2, { min: 0 }),
    clip_threshold: number(1, { min: 0 }),
    decay_rate: number(-0.8, { max: 0 }),
    d_coef: number(1, { min: 0 }),
    d0: number(1e-6, { min: 0 }),
    beta3: number(0, { min: 0, below: 1 }),
    growth_rate: number(0, { min: 0 }),
    use_bias_correction: flag(false),
    safeguard_warmup: flag(false),
    stochastic_rounding: flag(false),
    max_grad_norm: number(1, { min: 0 }),
  },
  lr_scheduler: {
    name: choice(
      'constant',
      'constant',
      'constant_with_warmup',
      'linear',
      'cosine',
      'cosine_with_restarts',
      'polynomial',
      'piecewise_constant',
    ),
    warmup_steps: countOrShare(0),
    num_cycles: number(1, { min: 0 }),
    power: number(1, { min: 0 }),
    step_rules: text(''),
  },
  ema: { decay: number(0, { min: 0, max: 1 }) },
  checkpoints: { every_steps: whole(0), keep: whole(3, { min: 1 }) },
  previews: {
    prompts: list([], previewPrompt),
    validation_image: list([], text('')),
    negative_prompt: text(''),
    seed: whole(0),
    every_steps: whole(0),
    num_inference_steps: whole(50, { min: 1 }),
    guidance_scale: number(5, { min: 0 }),
    scheduler: text(''),
  },
  validation: { samples: whole(0), every_steps: whole(0) },
  log_every: whole(1, { min: 1 }),
  max_nonfinite: whole(5, { min: 1 }),
};

/** Whether something in the text encoders is trained, so that they run in each pass. */
export const trainsTexts = ({ train }: Pick<Run, 'train'>): boolean =>
  train.text_encoders || train.target === 'textual_inversion';

/** Whether what is trained beside the UNet is shown images, and so are its previews. */
export const followsImages = ({ train: { target } }: Pick<Run, 'train'>): boolean =>
  target === 'controlnet' || target === 't2i_adapter' || target === 'ip_adapter';

/**
 * Describes a run, or several that are trained one after another. Gives back what it is given: its use is that an editor
 * knows the keys.
 */
export function defineRun(...stages: RunInput[]): RunInput[] {
  return stages;
}
