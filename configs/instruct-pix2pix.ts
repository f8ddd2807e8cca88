// An InstructPix2Pix model (Brooks et al. 2023) from the base model, as diffusers' train_instruct_pix2pix_sdxl.py: each picture is what an
// edit made, its caption tells the edit, and beside it lies what it was before: NAME.png, NAME.txt and NAME.original_image.png, or a
// metadata.jsonl with file_name, text and original_image. Parquet files and datasets of the hub have columns; of the script's:
//   npx sdxl train configs/instruct-pix2pix.ts --set dataset.path=fusing/instructpix2pix-1000-samples \
//     --set dataset.image_column=edited_image --set dataset.original_image_column=input_image --set dataset.caption_column=edit_prompt
//   npx sdxl sample --model runs/instruct-pix2pix/final --image IMAGE --prompt "make it winter" --image-guidance-scale 1.5
// With previews, each of which edits an image (or all edit one):
//   ... --set 'previews.prompts=["make it winter"]' --set previews.validation_image=IMAGE
import { defineRun } from 'sdxl';

export default defineRun({
  name: 'instruct-pix2pix',
  model: 'stabilityai/stable-diffusion-xl-base-1.0',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 'unet', gradient_checkpointing: true },
  dataset: {
    path: 'pictures',
    original_image_column: 'original_image',
    conditioning_dropout_prob: 0.05,
    resolution: 768,
    random_flip: true,
  },
  batch_size: 4,
  gradient_accumulation_steps: 4,
  steps: 15_000,
  optimizer: { name: 'adafactor', stochastic_rounding: true, lr: 5e-5 },
  checkpoints: { every_steps: 500 },
  previews: { num_inference_steps: 30, every_steps: 500 },
});
