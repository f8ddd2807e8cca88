// The recipe of diffengine's stable_diffusion_xl_pokemon_blip, setting for setting: the whole UNet, Adafactor without its
// relative step, bfloat16, batch 1 accumulated 4 times, 50 epochs, and "yoda pokemon" four times after each. Its dataset,
// lambdalabs/pokemon-blip-captions, was taken down: give another of the hub or a folder of captioned pictures.
//   npx sdxl train configs/pokemon-blip.ts --set dataset.path=FOLDER
import { defineRun } from 'sdxl';

export default defineRun({
  name: 'pokemon-blip',
  model: 'stabilityai/stable-diffusion-xl-base-1.0',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 'unet', gradient_checkpointing: true },
  dataset: {
    path: 'lambdalabs/naruto-blip-captions',
    resolution: 1024,
    interpolation: 'bilinear',
    random_flip: true,
    // The original crops and mirrors anew in each epoch; each version here is encoded once and kept.
    crops: 4,
  },
  batch_size: 1,
  gradient_accumulation_steps: 4,
  epochs: 50,
  optimizer: {
    name: 'adafactor',
    lr: 1e-5,
    weight_decay: 1e-2,
    clip_threshold: 1,
    decay_rate: -0.8,
    max_grad_norm: 1,
    // The original keeps float32 weights beside bfloat16 activations; masters are these float32 weights.
    stochastic_rounding: false,
  },
  lr_scheduler: { name: 'constant' },
  checkpoints: { keep: 3 },
  previews: {
    prompts: ['yoda pokemon', 'yoda pokemon', 'yoda pokemon', 'yoda pokemon'],
    num_inference_steps: 50,
    guidance_scale: 5,
  },
});
