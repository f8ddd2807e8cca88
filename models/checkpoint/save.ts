// Writing a model's components as diffusers keeps them: a folder each, with config.json beside one .safetensors file.
// Weights are downloaded and turned back to [o, i, kh, kw] one at a time.
import { dirname, join } from 'node:path';
import type { Parameter } from '../../engine/module.ts';
import { sizeOf, type Tensor } from '../../engine/tensor.ts';
import { bytesPerElement } from '../../io/dtype.ts';
import { makeFolder, writeFileAtomic } from '../../io/files.ts';
import { type TensorEntry, writeSafetensors, writeSafetensorsInTurns } from '../../io/safetensors.ts';
import type { Json } from './checkpoint.ts';
import { toStoredLayout } from './weights.ts';

/** The name of a component's weight file: transformers' for text encoders, diffusers' for adapters and the rest. */
export function weightFile(component: string): string {
  if (component === 'lora') return 'pytorch_lora_weights.safetensors';
  return component.startsWith('text_encoder') ? 'model.safetensors' : 'diffusion_pytorch_model.safetensors';
}

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
        ? toStoredLayout(tensor.bytes(), parameter.shape, bytesPerElement[dtype])
        : tensor.bytes();
    return { name, dtype, shape: parameter.shape, bytes };
  });
}

/** What transformers and diffusers ask of a file before they read it. */
const format = { format: 'pt' };

export interface SavedComponent {
  /** Names the weight file, where `file` does not; `lora` for adapters. */
  name: string;
  file?: string;
  /** config.json; adapters and textual inversions have none. */
  config?: Json;
  /** Of the weight file. */
  metadata?: Readonly<Record<string, string>>;
  weights: readonly TensorEntry[];
}

/** Writes FOLDER/config.json and the weights. @throws UserError when the disk is full or closed to us */
export function saveComponent(
  folder: string,
  { name, config, file = weightFile(name), metadata, weights }: SavedComponent,
): void {
  makeFolder(folder);
  if (config) writeJson(join(folder, 'config.json'), config);
  writeSafetensors(join(folder, file), weights, { ...format, ...metadata });
}

/** Writes a component's weights, a tensor at a time: one file, or above `maxShardSize` bytes several and the index that names them. */
export function* saveShardsInTurns(
  folder: string,
  component: string,
  entries: readonly TensorEntry[],
  maxShardSize: number,
  metadata?: Readonly<Record<string, string>>,
): Generator<void, void> {
  const file = weightFile(component);
  const shards = shardsOf(entries, maxShardSize);
  const number = (n: number) => String(n).padStart(5, '0');
  const name = (i: number) =>
    shards.length === 1 ? file : file.replace('.', `-${number(i + 1)}-of-${number(shards.length)}.`);
  for (const [i, shard] of shards.entries())
    yield* writeSafetensorsInTurns(join(folder, name(i)), shard, { ...format, ...metadata });
  if (shards.length === 1) return;
  writeJson(join(folder, `${file}.index.json`), {
    metadata: { total_size: entries.reduce((sum, entry) => sum + byteLength(entry), 0) },
    weight_map: Object.fromEntries(shards.flatMap((shard, i) => shard.map((entry) => [entry.name, name(i)]))),
  });
}

const byteLength = ({ dtype, shape }: TensorEntry): number => sizeOf(shape) * bytesPerElement[dtype];

/** Fills one shard after another, in the entries' order; a tensor larger than a shard has one to itself. */
function shardsOf(entries: readonly TensorEntry[], maxShardSize: number): TensorEntry[][] {
  const shards: TensorEntry[][] = [[]];
  let room = maxShardSize;
  for (const entry of entries) {
    const bytes = byteLength(entry);
    if (bytes > room && shards[shards.length - 1].length > 0) {
      shards.push([]);
      room = maxShardSize;
    }
    shards[shards.length - 1].push(entry);
    room -= bytes;
  }
  return shards;
}

/**
 * Python's libraries tell 1 from 1.0, and transformers refuses a whole number in these; JavaScript's JSON has one kind of
 * number, so a config that was read and written again would have lost the difference.
 */
const floatKeys = [
  'attention_dropout',
  'dropout',
  'initializer_factor',
  'initializer_range',
  'layer_norm_eps',
  'logit_scale_init_value',
];
const wholeFloat = new RegExp(`("(?:${floatKeys.join('|')})": -?\\d+)(?=[,\\n])`, 'g');

/** Writes JSON as the libraries do, making the folder where needed. */
export function writeJson(path: string, value: unknown): void {
  makeFolder(dirname(path));
  writeFileAtomic(path, `${JSON.stringify(value, null, 2)}\n`.replace(wholeFloat, '$1.0'));
}
