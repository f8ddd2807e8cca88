// The library's public face: what `import ... from 'sdxl'` gives. The one file that gathers others.
export { openDevice } from './engine/device.ts';
export { UserError } from './io/errors.ts';
export { resolveHub } from './io/hub.ts';
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
export { openComponent, openComponentFile, openModel } from './models/checkpoint.ts';
export type { Embeds, PromptEmbeds } from './models/conditioning.ts';
export { CudaGenerator } from './models/cuda_random.ts';
export { feedForwardToFp8 } from './models/fp8.ts';
export { type Interpolation, interpolate } from './models/interpolate.ts';
export { type DecodedPicture, decodeLatents, type Latents } from './models/latents.ts';
export { locateControlNet, locateModel, locateT2IAdapter, locateVae } from './models/locate.ts';
export { locateIPAdapter } from './models/locate_ip_adapter.ts';
export { locateLora } from './models/locate_lora.ts';
export { withUNet } from './models/locate_unet.ts';
export { mergeLora } from './models/lora.ts';
export {
  type Denoised,
  decode,
  denoise,
  denoiseToEnd,
  loadPipeline,
  type Pipeline,
  type Progress,
} from './models/pipeline.ts';
export type { ModelPreset } from './models/presets.ts';
export { presets } from './models/presets.ts';
export { encodePrompt } from './models/prompts.ts';
export type { Asked } from './models/request.ts';
export { locateUpscaler, type UpscalerSource } from './models/rrdbnet_file.ts';
export { openSingleFile } from './models/singlefile.ts';
export { loadTextualInversion } from './models/textual_inversion.ts';
export { TorchGenerator } from './models/torch_random.ts';
export { openUpscaler, type Upscaler } from './models/upscaler.ts';
export { defineRun, type Run, type RunInput } from './train/run.ts';
