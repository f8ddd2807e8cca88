// LCM-LoRA (Luo et al. 2023), adapters with which the model draws in two to eight steps without guidance, as diffusers'
// train_lcm_distill_lora_sdxl.py: rank 64 on all layers, AdamW 1e-4, the pseudo-Huber loss. The teacher is the model itself, which
// shares the UNet's weights. Any captioned pictures do, the more the better; the published one saw millions.
//   npx sdxl train configs/lcm-lora.ts --set dataset.path=FOLDER
//   npx sdxl sample --model stabilityai/stable-diffusion-xl-base-1.0 --lora runs/lcm-lora/final --scheduler lcm --steps 4 \
//     --guidance-scale 1 --prompt ...
// The whole UNet instead, as train_lcm_distill_sdxl_wds.py: it is told the guidance, and its target is the moving average. It is drawn
// with by --model runs/lcm-lora/final and the --guidance-scale that is wished, without a second pass:
//   --set train.target=unet --set optimizer.lr=1e-6 --set ema.decay=0.95
import { defineRun } from 'sdxl';

export default defineRun({
  name: 'lcm-lora',
  model: 'stabilityai/stable-diffusion-xl-base-1.0',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 'lora', method: 'lcm', gradient_checkpointing: true },
  lora: {
    rank: 64,
    alpha: 64,
    targets: [
      ...['to_q', 'to_k', 'to_v', 'to_out.0', 'proj_in', 'proj_out', 'ff.net.0.proj', 'ff.net.2'],
      ...['conv1', 'conv2', 'conv_shortcut', 'downsamplers.0.conv', 'upsamplers.0.conv', 'time_emb_proj'],
    ],
  },
  lcm: { loss_type: 'huber' },
  dataset: { path: 'pictures', resolution: 1024, center_crop: true },
  batch_size: 12,
  steps: 1000,
  optimizer: { lr: 1e-4, weight_decay: 0 },
  checkpoints: { every_steps: 200 },
  previews: {
    prompts: ['a portrait', 'a landscape'],
    ...{ scheduler: 'lcm', num_inference_steps: 4, guidance_scale: 1, every_steps: 200 },
  },
});
