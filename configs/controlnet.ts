// A ControlNet for the base model, as diffusers' train_controlnet_sdxl.py and diffengine's stable_diffusion_xl_controlnet: begun from
// the UNet's encoder behind zero convolutions, beside the frozen UNet. A folder has a conditioning image (edges, depth, a pose, ...) for
// each picture, of its size: NAME.png, NAME.txt and NAME.conditioning_image.png, or a metadata.jsonl with file_name, text and
// conditioning_image. Parquet files and datasets of the hub have it in a column.
//   npx sdxl train configs/controlnet.ts --set dataset.path=FOLDER
//   npx sdxl sample --model stabilityai/stable-diffusion-xl-base-1.0 --controlnet runs/controlnet/final --control-image IMAGE --prompt ...
// With previews, each of which follows an image (or all follow one):
//   ... --set 'previews.prompts=["a red circle"]' --set previews.validation_image=IMAGE
// A small one, as diffengine's mid (its small has no blocks, 0,0,0):
//   ... --set controlnet.transformer_layers_per_block=0,0,1 --set optimizer.lr=3e-5
// kohya's ControlNet-LLLite, small layers beside the UNet's attentions (his width, and his rate of learning):
//   ... --set controlnet.network_dim=64 --set optimizer.lr=2e-4
// With half of the captions left away, so that it learns to go by the image alone (Zhang et al. 2023, section 3.2):
//   ... --set dataset.caption_dropout_rate=0.5
import { defineRun } from 'sdxl';

export default defineRun({
  name: 'controlnet',
  model: 'stabilityai/stable-diffusion-xl-base-1.0',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 'controlnet', gradient_checkpointing: true },
  dataset: {
    path: 'pictures',
    conditioning_image_column: 'conditioning_image',
    resolution: 1024,
  },
  batch_size: 1,
  gradient_accumulation_steps: 4,
  steps: 15_000,
  optimizer: { lr: 1e-5 },
  checkpoints: { every_steps: 500 },
  previews: { num_inference_steps: 30, every_steps: 500 },
});
