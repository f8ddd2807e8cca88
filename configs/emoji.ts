// The small model that ships: Fluent emoji at 64x64 pixels, trained from random weights on a CPU. First the VAE; then the
// UNet and both text encoders together, on its latents. All weights in float16 take 13.5 MB.
//   npx sdxl train configs/emoji.ts
import { defineRun } from 'sdxl';
import { emojiModel as model } from '../models/presets.ts';
import { drawEmoji } from './emoji_data.ts';

const dataset = { path: await drawEmoji('data/emoji'), resolution: 64, center_crop: true };

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
    name: 'emoji',
    model,
    vae: 'runs/emoji-vae/final/vae',
    train: { text_encoders: true },
    dtype: 'bfloat16',
    dataset: { ...dataset, caption_dropout_rate: 0.1 },
    batch_size: 32,
    steps: 6000,
    objective: { snr_gamma: 5 },
    optimizer: { lr: 1e-3, weight_decay: 0.01, betas: [0.9, 0.99] },
    lr_scheduler: { name: 'cosine', warmup_steps: 200 },
    ema: { decay: 0.9995 },
    checkpoints: { every_steps: 500 },
    validation: { samples: 256, every_steps: 500 },
    previews: {
      prompts: [
        'red heart',
        'blue heart',
        'red apple',
        'tangerine',
        'grinning face',
        'cat face',
        'white flag',
        'rainbow flag',
        'transgender flag',
        'yoda pokemon',
        'blue circle',
        'pizza',
      ],
      num_inference_steps: 25,
      guidance_scale: 4,
      every_steps: 1000,
    },
  },
);
