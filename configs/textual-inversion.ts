// Vectors of a new word for the base model, for a subject or a style from a handful of pictures, as diffusers' textual_inversion_sdxl.py
// (its learning rate of 5e-4 is multiplied there by the four pictures of an update). Captions hold the word, or templates take their place
// (learnable_property). The result is runs/textual-inversion/final/mytoy.safetensors, for A1111, ComfyUI and diffusers too.
//   npx sdxl train configs/textual-inversion.ts --set dataset.path=FOLDER --set textual_inversion.initializer_token=toy
// A style:
//   ... --set textual_inversion.placeholder_token=mystyle --set textual_inversion.initializer_token=painting \
//     --set textual_inversion.learnable_property=style --set 'previews.prompts=["a castle in the style of mystyle"]'
// By captions of your own, a NAME.txt beside each NAME.png, each with the word in it:
//   ... --set textual_inversion.learnable_property=
// To go on with one that is there, of as many vectors:
//   ... --set textual_inversion.initializer_token= --set textual_inversion.weights=FILE
//   npx sdxl sample --model stabilityai/stable-diffusion-xl-base-1.0 --textual-inversion runs/textual-inversion/final \
//     --prompt "a mytoy backpack"
import { defineRun } from 'sdxl';

export default defineRun({
  name: 'textual-inversion',
  model: 'stabilityai/stable-diffusion-xl-base-1.0',
  vae: 'madebyollin/sdxl-vae-fp16-fix',
  dtype: 'bfloat16',
  train: { target: 'textual_inversion', gradient_checkpointing: true },
  textual_inversion: {
    placeholder_token: 'mytoy',
    initializer_token: 'toy',
    num_vectors: 2,
    learnable_property: 'object',
  },
  dataset: {
    path: 'pictures',
    resolution: 1024,
    aspect_ratio_buckets: true,
    center_crop: true,
    random_flip: true,
  },
  batch_size: 1,
  gradient_accumulation_steps: 4,
  steps: 1000,
  optimizer: { lr: 2e-3 },
  checkpoints: { every_steps: 100 },
  previews: { prompts: ['a mytoy backpack', 'mytoy on a beach'], num_inference_steps: 30, every_steps: 100 },
});
