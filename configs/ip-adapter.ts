// An IP-Adapter for the base model, as tencent-ailab's tutorial_train_sdxl.py and diffengine's stable_diffusion_xl_ip_adapter: each picture is
// shown to the frozen UNet beside its caption, as a frozen vision encoder sees it. The result is runs/ip-adapter/final, with that encoder.
//   npx sdxl train configs/ip-adapter.ts --set dataset.path=FOLDER
//   npx sdxl sample --model stabilityai/stable-diffusion-xl-base-1.0 --ip-adapter runs/ip-adapter/final --ip-adapter-image IMAGE --prompt ...
// Plus, whose Resampler reads all states of the encoder:
//   ... --set ip_adapter.image_projection=Resampler
// To go on with one that is there:
//   ... --set ip_adapter.image_encoder_path= \
//     --set ip_adapter.pretrained_ip_adapter_path=h94/IP-Adapter/sdxl_models/ip-adapter_sdxl_vit-h.safetensors
// With previews, each of which is drawn by an image (or all by one); the encoder then stays on the device:
//   ... --set 'previews.prompts=["a dog, best quality"]' --set previews.validation_image=IMAGE
import { defineRun } from 'sdxl';

export default defineRun({
  name: 'ip-adapter',
  model: 'stabilityai/stable-diffusion-xl-base-1.0',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 'ip_adapter', gradient_checkpointing: true },
  ip_adapter: { image_encoder_path: 'h94/IP-Adapter/models/image_encoder' },
  dataset: {
    path: 'pictures',
    resolution: 1024,
    aspect_ratio_buckets: true,
    caption_dropout_rate: 0.1,
  },
  batch_size: 1,
  gradient_accumulation_steps: 8,
  steps: 50_000,
  optimizer: { lr: 1e-4 },
  checkpoints: { every_steps: 2000 },
  previews: { num_inference_steps: 30, every_steps: 2000 },
});
