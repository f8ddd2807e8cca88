// Fine-tuning the refiner: its UNet alone, five times as often on the noise levels where it works (the last fifth of
// denoising, timesteps below 200) as on others, told an aesthetic score in place of the target size.
//   npx sdxl train configs/refiner.ts --set dataset.path=FOLDER
import { defineRun } from 'sdxl';

export default defineRun({
  name: 'refiner',
  model: 'stabilityai/stable-diffusion-xl-refiner-1.0',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 'unet', gradient_checkpointing: true },
  dataset: {
    path: 'pictures',
    resolution: 1024,
    aspect_ratio_buckets: true,
    center_crop: true,
    caption_dropout_rate: 0.1,
    aesthetic_score: 6,
  },
  batch_size: 1,
  gradient_accumulation_steps: 8,
  steps: 5000,
  objective: { timesteps: 'earlier', timestep_bias: 0.2 },
  optimizer: { name: 'adafactor', lr: 1e-5, stochastic_rounding: true },
  lr_scheduler: { name: 'constant_with_warmup', warmup_steps: 100 },
  ema: { decay: 0 },
  checkpoints: { every_steps: 500, keep: 2 },
});
