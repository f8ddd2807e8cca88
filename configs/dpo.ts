// Diffusion-DPO (Wallace et al. 2023): LoRA adapters learn which of two pictures people prefer under a caption, as diffusers'
// train_diffusion_dpo_sdxl.py, with the numbers of its command line. A folder has a rejected picture for each preferred one, of its
// shape: NAME.png, NAME.txt and NAME.rejected.png, or a metadata.jsonl with file_name, text and rejected.
//   npx sdxl train configs/dpo.ts --set dataset.path=FOLDER
//   npx sdxl sample --model stabilityai/stable-diffusion-xl-base-1.0 --lora runs/dpo/final --prompt ...
// Parquet files and datasets of the hub have both in columns, and may say which is preferred in a third, as Pick-a-Pic does:
//   ... --set dataset.path=kashif/pickascore --set dataset.split=validation --set dataset.image_column=jpg_0 \
//     --set dataset.rejected_image_column=jpg_1 --set dataset.label_column=label_0 --set dataset.caption_column=caption --set dataset.broken=skip
// All weights with the paper's optimizer and rate, which are for updates of 2048 pairs:
//   ... --set train.target=unet --set optimizer.name=adafactor --set optimizer.lr=8.2e-9
import { defineRun } from 'sdxl';

export default defineRun({
  name: 'dpo',
  model: 'stabilityai/stable-diffusion-xl-base-1.0',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 'lora', method: 'dpo', gradient_checkpointing: true },
  lora: { rank: 8, alpha: 8, targets: ['to_q', 'to_k', 'to_v', 'to_out.0'] },
  dpo: { beta_dpo: 5000 },
  dataset: {
    path: 'pairs',
    resolution: 1024,
    center_crop: true,
    random_flip: true,
    crops: 2,
  },
  batch_size: 2,
  gradient_accumulation_steps: 8,
  steps: 2000,
  optimizer: { lr: 1e-5 },
  checkpoints: { every_steps: 500 },
  previews: { prompts: ['a portrait', 'a landscape'], num_inference_steps: 30, every_steps: 500 },
});
