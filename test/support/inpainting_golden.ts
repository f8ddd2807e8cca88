// The inpainting model of golden/inpainting.jsonl, and InstructPix2Pix's of golden/instruct_pix2pix.jsonl: tiny-sdxl with another first
// convolution, of nine or eight channels, whose weights are the formula of ControlNets'.
import { mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { encodeNumbers } from '../../io/dtype.ts';
import { openSafetensors, type TensorEntry, writeSafetensors } from '../../io/safetensors.ts';
import { weight } from './controlnet_golden.ts';
import { goldenFolder } from './golden.ts';

const base = join(goldenFolder, 'tiny-sdxl');
const weights = join('unet', 'diffusion_pytorch_model.safetensors');
const others = ['scheduler', 'text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2', 'vae'];

/** Writes the inpainting model's folder. */
export const writeInpainting = (folder: string): string =>
  writeWidened(folder, 'inpainting', 9, 'StableDiffusionXLInpaintPipeline');

/** Writes InstructPix2Pix's. */
export const writeInstructPix2Pix = (folder: string): string =>
  writeWidened(folder, 'instruct_pix2pix', 8, 'StableDiffusionXLInstructPix2PixPipeline');

function writeWidened(folder: string, name: string, channels: number, _class_name: string): string {
  const shape = [16, channels, 3, 3];
  mkdirSync(join(folder, 'unet'), { recursive: true });
  const written = (name: string, more: object) => {
    const json = JSON.parse(readFileSync(join(base, name), 'utf8'));
    writeFileSync(join(folder, name), JSON.stringify({ ...json, ...more }));
  };
  written('model_index.json', { _class_name });
  written(join('unet', 'config.json'), { in_channels: shape[1] });
  for (const name of others) symlinkSync(join(base, name), join(folder, name));
  const unet = openSafetensors(join(base, weights));
  const entries = [...unet.tensors.values()].map(
    ({ name, dtype, shape }): TensorEntry => ({ name, dtype, shape, bytes: unet.read(name) }),
  );
  const values = weight(name, 'conv_in.weight', shape);
  const first: TensorEntry = {
    ...{ name: 'conv_in.weight', dtype: 'float16', shape },
    bytes: encodeNumbers(values, 'float16'),
  };
  writeSafetensors(
    join(folder, weights),
    entries.map((entry) => (entry.name === first.name ? first : entry)),
  );
  unet.close();
  return folder;
}
