// The tiny model with other weights in its UNet and its text encoders.
import { cpSync } from 'node:fs';
import { join } from 'node:path';
import { decodeFloats, encodeNumbers, type FloatDType } from '../../io/dtype.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import { goldenFolder } from './golden.ts';

/** The file of each of these components. */
export const tinyFiles = {
  unet: 'diffusion_pytorch_model.safetensors',
  text_encoder: 'model.safetensors',
  text_encoder_2: 'model.safetensors',
};

/** Writes it to a folder, of which it gives the path, in `dtype`: with what `made` makes of a weight, by its component's name and its own. */
export function writeTiny(
  folder: string,
  dtype: FloatDType,
  made: (path: string, shape: readonly number[], values: Float32Array) => Float32Array,
): string {
  const base = join(goldenFolder, 'tiny-sdxl');
  cpSync(base, folder, { recursive: true, dereference: true });
  for (const [component, file] of Object.entries(tinyFiles)) {
    const source = openSafetensors(join(base, component, file));
    const entries = [...source.tensors.values()].map(({ name, shape, dtype: stored }) => {
      const values = made(`${component}.${name}`, shape, decodeFloats(source.read(name), stored));
      return { name, shape, dtype, bytes: encodeNumbers(values, dtype) };
    });
    source.close();
    writeSafetensors(join(folder, component, file), entries);
  }
  return folder;
}
