// ESD (Gandikota et al. 2023): the cross attention of the base model forgets a concept, here a painter's style, as diffengine's
// stable_diffusion_xl_gogh_esd. The pictures are some that the model itself draws of it; they are seen under noise alone. The result is a
// model, runs/esd/final.
//   mkdir gogh
//   npx sdxl sample --model stabilityai/stable-diffusion-xl-base-1.0 --prompt "a painting by Van Gogh" -b 20 --output gogh/a.png
//   npx sdxl train configs/esd.ts --set dataset.path=gogh --set "dataset.instance_prompt=Van Gogh"
// All of the model, for what is to be forgotten under other words too, as diffengine; or adapters, which can be taken off again:
//   ... --set train.parts=
//   ... --set train.target=lora --set train.parts= --set optimizer.lr=1e-4
import { defineRun } from 'sdxl';

export default defineRun({
  name: 'esd',
  model: 'stabilityai/stable-diffusion-xl-base-1.0',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 'unet', method: 'esd', parts: ['attn2'], gradient_checkpointing: true },
  esd: { negative_guidance: 1 },
  dataset: { path: 'concept', instance_prompt: 'Van Gogh', resolution: 1024 },
  batch_size: 1,
  steps: 300,
  optimizer: { name: 'adafactor', lr: 1e-5 },
  checkpoints: { every_steps: 100 },
  previews: {
    prompts: ['the starry night by Van Gogh', 'a portrait'],
    num_inference_steps: 30,
    every_steps: 100,
  },
});
