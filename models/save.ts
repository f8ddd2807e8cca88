// Writing a model's components as diffusers keeps them: a folder each, with config.json beside one .safetensors file.
// Weights are downloaded and turned back to [o, i, kh, kw] one at a time.
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import type { Parameter } from '../engine/module.ts';
import type { Tensor } from '../engine/tensor.ts';
import { bytesPerElement } from '../io/dtype.ts';
import { asUserError, writeFileAtomic } from '../io/files.ts';
import { type TensorEntry, writeSafetensors } from '../io/safetensors.ts';
import { channelsFirst, type Json } from './checkpoint.ts';

/** The name of a component's weight file: transformers' for text encoders, diffusers' for the rest. */
export const weightFile = (component: string): string =>
  component.startsWith('text_encoder') ? 'model.safetensors' : 'diffusion_pytorch_model.safetensors';

/** Parameters by checkpoint key, each with the tensor whose numbers are saved (its own unless `tensorOf` says otherwise). */
export function weightEntries(
  parameters: ReadonlyMap<string, Parameter>,
  tensorOf: (name: string, parameter: Parameter) => Tensor = (_, parameter) => parameter.tensor,
): TensorEntry[] {
  return [...parameters].map(([name, parameter]) => {
    const tensor = tensorOf(name, parameter);
    const { dtype } = tensor;
    const bytes = () =>
      parameter.layout === 'conv'
        ? channelsFirst(tensor.bytes(), parameter.shape, bytesPerElement[dtype])
        : tensor.bytes();
    return { name, dtype, shape: parameter.shape, bytes };
  });
}

/** Writes FOLDER/config.json and the weights. @throws UserError when the disk is full or closed to us */
export function saveComponent(
  folder: string,
  component: string,
  config: Json,
  entries: readonly TensorEntry[],
): void {
  writeJson(join(folder, 'config.json'), config);
  // What transformers and diffusers ask of a file before they read it.
  writeSafetensors(join(folder, weightFile(component)), entries, { format: 'pt' });
}

/** Writes JSON as the libraries do, making the folder where needed. */
export function writeJson(path: string, value: unknown): void {
  try {
    mkdirSync(join(path, '..'), { recursive: true });
  } catch (error) {
    throw asUserError(error, path);
  }
  writeFileAtomic(path, `${JSON.stringify(value, null, 2)}\n`);
}
