// The library's public face: what `import ... from 'sdxl'` gives. The one file that gathers others.
export { type Device, openDevice } from './engine/device.ts';
export { canny } from './io/canny.ts';
export { UserError } from './io/errors.ts';
export {
  preprocess,
  preprocessControl,
  preprocessMask,
  readMask,
  readPicture,
  toPictures,
  writePng,
} from './io/image.ts';
export { cutAndFill, maskWindow, overlay } from './io/mask_crop.ts';
export type { Mask, Picture } from './io/pixels.ts';
export type { ModelSource } from './models/checkpoint/checkpoint.ts';
export type { ModelPreset } from './models/formats/presets.ts';
export { presets } from './models/formats/presets.ts';
export type { IPAdapterSource } from './models/ip_adapter/ip_adapter.ts';
export type { LoadOptions } from './models/load_options.ts';
export {
  type LocateOptions,
  locateControlNet,
  locateModel,
  locateT2IAdapter,
  locateVae,
} from './models/locate/locate.ts';
export { locateIPAdapter } from './models/locate/locate_ip_adapter.ts';
export { locateLora } from './models/locate/locate_lora.ts';
export { withUNet } from './models/locate/locate_unet.ts';
export { type AdapterFile, mergeLora } from './models/lora/lora.ts';
export {
  type Denoised,
  decode,
  denoise,
  denoiseToEnd,
  loadPipeline,
  type Pipeline,
  type Progress,
} from './models/pipeline.ts';
export { encodePrompt } from './models/prompts.ts';
export { CudaGenerator } from './models/random/cuda_random.ts';
export { TorchGenerator } from './models/random/torch_random.ts';
export { type Variation, VariedGenerator } from './models/random/variation.ts';
export type { Asked } from './models/request.ts';
export type { Embeds, PromptEmbeds } from './models/text/conditioning.ts';
export { loadTextualInversion } from './models/text/textual_inversion.ts';
export { locateUpscaler, type UpscalerSource } from './models/upscaler/rrdbnet_file.ts';
export { openUpscaler, type Upscaler } from './models/upscaler/upscaler.ts';
export { type Interpolation, interpolate } from './models/vae/interpolate.ts';
export { type DecodedPicture, decodeLatents, type Latents } from './models/vae/latents.ts';
export { defineRun, type Run, type RunInput } from './train/run/run.ts';
