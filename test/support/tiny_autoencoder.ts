// A small AutoencoderTiny whose weights are a formula: that of golden/autoencoder_tiny.jsonl.
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { namedParameters } from '../../engine/module.ts';
import { sizeOf } from '../../engine/tensor.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { type TensorEntry, writeSafetensors } from '../../io/safetensors.ts';
import { autoencoder } from '../../models/vae/autoencoder.ts';

export const tinyConfig = {
  _class_name: 'AutoencoderTiny',
  encoder_block_out_channels: [8, 8, 8, 8],
  decoder_block_out_channels: [8, 8, 8, 8],
  num_encoder_blocks: [1, 2, 1, 1],
  num_decoder_blocks: [1, 1, 2, 1],
};

/** The weights under diffusers' keys, in torch's order. */
export const tinyWeights = (): TensorEntry[] =>
  [...namedParameters(autoencoder(tinyConfig).module)].map(([name, { shape }], k) => {
    const values = Float32Array.from(
      { length: sizeOf(shape) },
      (_, i) => ((((7 * i * i + 37 * i + 11 * k) % 101) - 50) * 5) / 1024,
    );
    return { name, shape, dtype: 'float32', bytes: encodeNumbers(values, 'float32') };
  });

/** Writes it as diffusers does; `change` alters its config. Returns the folder. */
export function writeTiny(folder: string, change: object = {}): string {
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, 'config.json'), JSON.stringify({ ...tinyConfig, ...change }));
  writeSafetensors(join(folder, 'diffusion_pytorch_model.safetensors'), tinyWeights());
  return folder;
}

/** Numbers in [-1, 1], exact in every float type. */
export const wave = (shape: readonly number[], step: number): Float32Array =>
  Float32Array.from({ length: sizeOf(shape) }, (_, i) => (((step * i + Math.floor(i / 7)) % 129) - 64) / 64);
