// An inpainting model, as runwayml's was trained from Stable Diffusion and diffusers/stable-diffusion-xl-1.0-inpainting-0.1 from SDXL: the
// base model's UNet, widened to nine channels, learns to paint in what random masks mark, a quarter of the time all of the picture. Each
// picture is prepared with as many masks and crops as dataset.crops says, which the epochs show in turn.
//   npx sdxl train configs/inpainting.ts --set dataset.path=FOLDER
//   npx sdxl sample --model runs/inpainting/final --image IMAGE --mask MASK --prompt ...
// A subject or a style by LoRA on an inpainting model, as diffengine's stable_diffusion_xl_inpaint (its masks are "bbox"):
//   ... --set model=diffusers/stable-diffusion-xl-1.0-inpainting-0.1 --set train.target=lora --set optimizer.name=adamw \
//     --set optimizer.lr=1e-4 --set steps=1000
// What to paint in told by the data, white in a NAME.conditioning_image.png beside each NAME.png:
//   ... --set inpainting.mask_mode=conditioning_image --set inpainting.full_mask_rate=0
// With previews, each of which paints in a picture (or, without pictures, draws one whole):
//   ... --set 'previews.prompts=["a wooden door"]' --set previews.validation_image=IMAGE
import { defineRun } from 'sdxl';

export default defineRun({
  name: 'inpainting',
  model: 'stabilityai/stable-diffusion-xl-base-1.0',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 'unet', gradient_checkpointing: true },
  inpainting: { mask_mode: 'irregular', full_mask_rate: 0.25 },
  dataset: {
    path: 'pictures',
    resolution: 1024,
    aspect_ratio_buckets: true,
    crops: 8,
    random_flip: true,
    caption_dropout_rate: 0.05,
  },
  batch_size: 1,
  gradient_accumulation_steps: 16,
  steps: 20_000,
  optimizer: { name: 'adafactor', stochastic_rounding: true, lr: 1e-5 },
  lr_scheduler: { name: 'constant_with_warmup', warmup_steps: 500 },
  checkpoints: { every_steps: 500 },
  previews: { num_inference_steps: 30, every_steps: 500 },
});
