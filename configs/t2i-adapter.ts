// A T2I-Adapter for the base model, as diffusers' train_t2i_adapter_sdxl.py and diffengine's stable_diffusion_xl_t2i_adapter: of the published
// ones' shape (79 M parameters), beside the frozen UNet, at times drawn towards noise (Mou et al. 2023, section 3.4). A folder has a
// conditioning image for each picture, as configs/controlnet.ts says.
//   npx sdxl train configs/t2i-adapter.ts --set dataset.path=FOLDER
//   npx sdxl sample --model stabilityai/stable-diffusion-xl-base-1.0 --adapter runs/t2i-adapter/final --adapter-image IMAGE --prompt ...
// With previews, each of which follows an image (or all follow one):
//   ... --set 'previews.prompts=["a red circle"]' --set previews.validation_image=IMAGE
// To go on with one that is there, of grey levels too:
//   ... --set t2i_adapter.adapter_model_name_or_path=TencentARC/t2i-adapter-sketch-sdxl-1.0
import { defineRun } from 'sdxl';

export default defineRun({
  name: 't2i-adapter',
  model: 'stabilityai/stable-diffusion-xl-base-1.0',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 't2i_adapter', gradient_checkpointing: true },
  dataset: {
    path: 'pictures',
    conditioning_image_column: 'conditioning_image',
    resolution: 1024,
  },
  batch_size: 1,
  gradient_accumulation_steps: 4,
  steps: 15_000,
  objective: { timesteps: 'cubic' },
  optimizer: { lr: 1e-5 },
  checkpoints: { every_steps: 500 },
  previews: { num_inference_steps: 30, every_steps: 500 },
});
