// A run: everything that decides what is trained, on what, and how, as one typed value in a file of its own. The interface is for editors
// and readers; defaults and what each key takes are in run_fields.ts. Names are those of diffusers' training scripts where these have one.
import type { Algo } from '../../models/adapters/adapter_kinds.ts';
import type { ModelPreset } from '../../models/formats/presets.ts';
import type { RandomMask } from '../data/random_mask.ts';
import type { ObjectiveSettings } from '../objective/objective.ts';
import type { OptimizerSettings } from '../optimizers/create.ts';
import type { LrSchedule } from '../optimizers/lr_schedule.ts';
import type { PreviewSettings } from './preview_prompts.ts';

export const targets = [
  'unet',
  'lora',
  'controlnet',
  't2i_adapter',
  'ip_adapter',
  'textual_inversion',
  'vae',
] as const;
export const methods = ['diffusion', 'distillation', 'dpo', 'esd', 'lcm'] as const;

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
    target: (typeof targets)[number];
    /**
     * What it learns from: the diffusion loss of `objective`, or, for `unet` and `lora`, pairs of pictures of which people prefer one
     * (Diffusion-DPO), or the model itself: to forget a concept (ESD), or to draw in a few steps (`lcm`). For `unet` from a larger model
     * (`distillation`).
     */
    method: (typeof methods)[number];
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
  /** Latent consistency distillation (Luo et al. 2023; methods/lcm.ts), in the words of diffusers' scripts. */
  lcm: {
    /** The guidance w that is distilled, drawn for each picture from here to there; in `guidance_scale` it is 1 more. */
    w_min: number;
    w_max: number;
    /** The timesteps that the student learns to draw from: an LCM sampler's `original_inference_steps`. */
    num_ddim_timesteps: number;
    /** The square of the distance, or sqrt(r^2 + huber_c^2) - huber_c. */
    loss_type: 'l2' | 'huber';
    huber_c: number;
    /** How soon above timestep 0 the prediction counts, and not the noised picture itself. */
    timestep_scaling_factor: number;
    /**
     * Of target `unet`: tell the UNet the drawn guidance, embedded in so many numbers, where the model has no such layer yet
     * (`time_cond_proj_dim`); 0 not to. Adapters are told nothing.
     */
    unet_time_cond_proj_dim: number;
  };
  /** Distillation of a larger UNet into a smaller one, as of SDXL into SSD-1B (Gupta et al. 2024; methods/distillation.ts). */
  distillation: {
    /** The teacher, a frozen UNet of the student's widths that predicts the same: a model's folder, file or hub id, or a UNet's alone. */
    pretrained_teacher_model: string;
    /** Begin the student with the teacher's weights. Of its own UNet a config.json is enough. */
    student_weight_from_teacher: boolean;
    /** What is compared on the way: the outputs of all resnets and transformers that both have, or of levels. Both and the middle block. */
    distill_level: 'block' | 'sub_block';
    /** What the distance of both outputs counts beside the loss. */
    output_weight: number;
    /** What those on the way count. */
    feature_weight: number;
  };
  controlnet: {
    /** The one to go on with: a folder, a .safetensors file or a hub id. Empty to begin with a copy of the UNet's encoder. */
    controlnet_model_name_or_path: string;
    /** Transformer blocks of each level of a new one: fewer make a small ControlNet. Empty for as many as the UNet has. */
    transformer_layers_per_block: readonly number[];
    /** Width of a ControlNet-LLLite's layers: above 0 a new one is that of kohya's, small layers beside the UNet's attentions. */
    network_dim: number;
    /** Width of what it sees of the images. */
    cond_emb_dim: number;
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
    /** What stands before and behind each caption, and a space between: but for those of the class. */
    caption_prefix: string;
    caption_suffix: string;
    /** An epoch has the pictures of a folder `10_name` ten times, as kohya's trainer. */
    folder_repeats: boolean;
    /**
     * Pictures of the subject's class for prior preservation (DreamBooth, Ruiz et al. 2023), as `path` is given; empty for none. An
     * epoch has as many of them as of the others, in turn.
     */
    class_data_dir: string;
    /** The caption of those that have none. */
    class_prompt: string;
    /** Pixels of the square whose area all pictures take. Of several resolutions an epoch has each picture at each. */
    resolution: number | readonly number[];
    /** Group pictures by aspect ratio into SDXL's sizes; otherwise all are cropped to the square. */
    aspect_ratio_buckets: boolean;
    /** A picture that its size would enlarge has one of its own instead: its pixels, cut to whole multiples of what the model divides by. */
    bucket_no_upscale: boolean;
    /** Crop at the centre rather than at random. */
    center_crop: boolean;
    /** Crops of one picture that are prepared, where crop or a mask are drawn: epochs show them in turn. */
    crops: number;
    /** Mirror pictures at random, in each epoch anew: each crop is prepared both ways. */
    random_flip: boolean;
    interpolation: 'lanczos' | 'bilinear';
    /** Tokens of a caption that are read, in chunks of 75: the further ones as `sdxl sample --max-token-length` reads them. */
    max_token_length: number;
    /** Share of captions replaced by the model's unconditional. */
    caption_dropout_rate: number;
    caption_tag_dropout_rate: number;
    shuffle_caption: boolean;
    /** Of `{one|another}` in a caption one is drawn, in each epoch anew; `{{` and `}}` are braces. */
    enable_wildcard: boolean;
    keep_tokens: number;
    keep_tokens_separator: string;
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
    /**
     * The text encoders' learning rate, where they are trained; 0 for `lr`. Two are the first's and the second's, of which one may be 0: that
     * one is not trained. They go by the same schedule.
     */
    text_encoder_lr: number | readonly number[];
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

/** Whether something in the text encoders is trained, so that they run in each pass. */
export const trainsTexts = ({ train }: Pick<Run, 'train'>): boolean =>
  train.text_encoders || train.target === 'textual_inversion';

/** Whether it trains an InstructPix2Pix model, which sees what pictures were before their edits. */
export const trainsEdits = ({ dataset }: Pick<Run, 'dataset'>): boolean =>
  dataset.original_image_column !== '';

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
