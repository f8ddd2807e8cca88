// SSD-1B (Gupta et al. 2024), SDXL's UNet at half its size, learns what SDXL says and makes on the way, with the settings of diffengine's
// ssd_1b_distill_pokemon_blip. Its dataset was taken down: give another of the hub or a folder of captioned pictures; what made SSD-1B saw
// millions. The result is a model, runs/ssd-1b/final.
//   npx sdxl train configs/ssd-1b.ts --set dataset.path=FOLDER
// From SDXL's weights of those layers that SSD-1B has, as ssd_1b_distill_from_sdxl_pokemon_blip:
//   ... --set distillation.student_weight_from_teacher=true
// Any other shape is a folder with a config.json alone, SDXL's with fewer transformer_layers_per_block or another mid_block_type. With
// layers_per_block 1 it is diffengine's small_sd_xl_pokemon_blip, and tiny_sd_xl_pokemon_blip where mid_block_type is null, too:
//   ... --set model=stabilityai/stable-diffusion-xl-base-1.0 --set unet=FOLDER --set distillation.student_weight_from_teacher=true \
//     --set distillation.distill_level=block --set distillation.output_weight=1 --set distillation.feature_weight=1
import { defineRun } from 'sdxl';

export default defineRun({
  name: 'ssd-1b',
  model: 'segmind/SSD-1B',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 'unet', method: 'distillation', gradient_checkpointing: true },
  distillation: {
    pretrained_teacher_model: 'stabilityai/stable-diffusion-xl-base-1.0',
    output_weight: 0.5,
    feature_weight: 0.5,
  },
  dataset: {
    path: 'lambdalabs/naruto-blip-captions',
    resolution: 1024,
    interpolation: 'bilinear',
    random_flip: true,
    crops: 4,
  },
  batch_size: 2,
  epochs: 50,
  optimizer: { name: 'adafactor', lr: 1e-5, weight_decay: 1e-2 },
  lr_scheduler: { name: 'constant' },
  previews: {
    prompts: ['yoda pokemon', 'yoda pokemon', 'yoda pokemon', 'yoda pokemon'],
    num_inference_steps: 50,
    guidance_scale: 5,
  },
});
