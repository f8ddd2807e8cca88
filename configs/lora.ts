// LoRA adapters on the base model's attention, for a style or a subject from a few dozen pictures: rank 8, AdamW 1e-4, as
// diffusers' train_text_to_image_lora_sdxl.py. The result is runs/lora/final/pytorch_lora_weights.safetensors.
//   npx sdxl train configs/lora.ts --set dataset.path=FOLDER
// To go on with a LoRA that is there, of the same rank: --set lora.network_weights=FILE
// On convolutions too, with a rank of their own (LoCon):
//   npx sdxl train configs/lora.ts --set dataset.path=FOLDER --set lora.conv_rank=4 --set lora.conv_alpha=4 \
//     --set lora.targets=to_q,to_k,to_v,to_out.0,conv1,conv2,conv_shortcut,conv
// LyCORIS's LoKr (or LoHa, or OFT) in LoRA's place:
//   npx sdxl train configs/lora.ts --set dataset.path=FOLDER --set lora.algo=lokr --set lora.factor=8
// With adapters on the text encoders too, as --train_text_encoder there:
//   npx sdxl train configs/lora.ts --set dataset.path=FOLDER --set train.text_encoders=true --set optimizer.text_encoder_lr=5e-6
// With the optimizer that finds its learning rate, as kohya's guides:
//   npx sdxl train configs/lora.ts --set dataset.path=FOLDER --set optimizer.name=prodigy --set optimizer.lr=1
//   npx sdxl sample --model stabilityai/stable-diffusion-xl-base-1.0 --lora runs/lora/final/pytorch_lora_weights.safetensors --prompt ...
import { defineRun } from 'sdxl';

export default defineRun({
  name: 'lora',
  model: 'stabilityai/stable-diffusion-xl-base-1.0',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 'lora', gradient_checkpointing: true },
  lora: { rank: 8, alpha: 8, targets: ['to_q', 'to_k', 'to_v', 'to_out.0'] },
  dataset: {
    path: 'pictures',
    resolution: 1024,
    aspect_ratio_buckets: true,
    center_crop: true,
    caption_dropout_rate: 0.05,
  },
  batch_size: 1,
  gradient_accumulation_steps: 4,
  steps: 1000,
  objective: { snr_gamma: 5 },
  optimizer: { lr: 1e-4 },
  lr_scheduler: { name: 'constant_with_warmup', warmup_steps: 50 },
  checkpoints: { every_steps: 100, keep: 10 }, // all ten, for the choice by `sdxl grid`
  previews: { prompts: ['a portrait', 'a landscape'], num_inference_steps: 30, every_steps: 100 },
});
