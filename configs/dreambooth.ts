// DreamBooth (Ruiz et al. 2023) with LoRA, as diffusers' train_dreambooth_lora_sdxl.py: a few pictures of one subject, all with one
// prompt that has a rare word for it, and pictures of its class beside them, so that the model keeps what it knows of that. The
// class's pictures come from the model itself:
//   npx sdxl sample --model stabilityai/stable-diffusion-xl-base-1.0 --prompt "a photo of a dog" --batch-count 100 --output class/dog.png
//   npx sdxl train configs/dreambooth.ts --set dataset.path=FOLDER
// Without prior preservation: --set dataset.class_data_dir= --set dataset.class_prompt=
import { defineRun } from 'sdxl';

export default defineRun({
  name: 'dreambooth',
  model: 'stabilityai/stable-diffusion-xl-base-1.0',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 'lora', gradient_checkpointing: true },
  lora: { rank: 4, alpha: 4 },
  dataset: {
    path: 'pictures',
    instance_prompt: 'a photo of sks dog',
    class_data_dir: 'class',
    class_prompt: 'a photo of a dog',
    resolution: 1024,
  },
  batch_size: 1,
  gradient_accumulation_steps: 2,
  steps: 500,
  objective: { prior_loss_weight: 1 },
  optimizer: { lr: 1e-4 },
  checkpoints: { every_steps: 100 },
  previews: {
    prompts: ['a photo of sks dog in a bucket', 'a photo of a dog'],
    num_inference_steps: 30,
    every_steps: 100,
  },
});
