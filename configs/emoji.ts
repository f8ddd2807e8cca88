// The small model that ships: Fluent emoji at 64x64 pixels, trained from random weights on a CPU. First the VAE; then the
// UNet and both text encoders together, on its latents: long by noise, then by velocity, at last with flags and fruit ten
// times as often. All weights in float16 take 13.5 MB.
//   npx sdxl train configs/emoji.ts
import { defineRun, type RunInput } from 'sdxl';
import { emojiModel as model } from '../models/formats/presets.ts';
import { drawEmoji } from './emoji_data.ts';

const dataset = { path: await drawEmoji('data/emoji'), resolution: 64, center_crop: true };
const captioned = { ...dataset, caption_dropout_rate: 0.1 };

/** What the three runs of the UNet and the text encoders share. */
const unet = {
  train: { text_encoders: true },
  dtype: 'bfloat16',
  dataset: captioned,
  batch_size: 32,
  ema: { decay: 0.9995 },
  checkpoints: { every_steps: 500 },
  validation: { samples: 256, every_steps: 500 },
  previews: {
    prompts: [
      'red heart',
      'blue heart',
      'red apple',
      'tangerine',
      'banana',
      'grinning face',
      'cat face',
      'white flag',
      'rainbow flag',
      'chequered flag',
      'yoda pokemon',
      'blue circle',
    ],
    num_inference_steps: 25,
    guidance_scale: 4,
    every_steps: 1000,
  },
} satisfies Partial<RunInput>;
const optimizer = { weight_decay: 0.01, betas: [0.9, 0.99] as const };

/** Down to pure noise the whole picture must come from the words, which predicting noise never asks for (Lin et al. 2023). */
const velocity = { prediction_type: 'v_prediction', zero_terminal_snr: true } as const;

export default defineRun(
  {
    name: 'emoji-vae',
    model,
    train: { target: 'vae' },
    vae_objective: { kl: 1e-4 },
    dtype: 'bfloat16',
    dataset: { ...dataset, random_flip: true, crops: 2 },
    batch_size: 16,
    steps: 2400,
    optimizer: { lr: 1e-3, weight_decay: 0, betas: [0.9, 0.99] },
    lr_scheduler: { name: 'cosine', warmup_steps: 100 },
    ema: { decay: 0.999 },
    checkpoints: { every_steps: 500 },
    previews: { every_steps: 500 },
  },
  {
    ...unet,
    name: 'emoji',
    model,
    vae: 'runs/emoji-vae/final/vae',
    steps: 6000,
    objective: { snr_gamma: 5 },
    optimizer: { ...optimizer, lr: 1e-3 },
    lr_scheduler: { name: 'cosine', warmup_steps: 200 },
  },
  {
    ...unet,
    name: 'emoji-velocity',
    model: 'runs/emoji/final',
    steps: 753,
    objective: velocity,
    optimizer: { ...optimizer, lr: 1e-3 },
    lr_scheduler: { name: 'constant_with_warmup', warmup_steps: 200 },
  },
  {
    ...unet,
    name: 'emoji-flags',
    model: 'runs/emoji-velocity/final',
    dataset: { ...captioned, path: await drawEmoji('data/emoji-flags', { flagsAndFruit: 10 }) },
    steps: 1900,
    objective: velocity,
    optimizer: { ...optimizer, lr: 7e-4 },
    lr_scheduler: { name: 'cosine', warmup_steps: 100 },
    ema: { decay: 0.999 },
  },
);
