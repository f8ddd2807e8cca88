// What the tests of files of weights share: the tiny model's numbers, files of them in GGUF and safetensors, and models held together by all
// of their parameters.
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { openDevice } from '../../engine/device.ts';
import { namedParameters, unload } from '../../engine/module.ts';
import { decodeFloats, encodeNumbers, type FloatDType } from '../../io/dtype.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { buildComponent } from '../../models/formats/components.ts';
import { openSingleFile } from '../../models/formats/singlefile.ts';
import { type GgufTensor, type GgufValue, ggufBytes, q8_0 } from './gguf_writer.ts';
import { goldenFolder, goldenSingleFile } from './golden.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-weights-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
export const at = (name: string): string => join(folder, name);
export const model = join(goldenFolder, 'tiny-sdxl');
export const device = openDevice('auto');
export const parts = ['unet', 'vae', 'text_encoder', 'text_encoder_2'];

export interface Weight {
  shape: readonly number[];
  values: Float32Array;
}
export type Weights = Map<string, Weight>;

export const sizeOf = (shape: readonly number[]): number => shape.reduce((product, n) => product * n, 1);

export function weightsOf(path: string): Weights {
  const file = openSafetensors(path);
  const found = [...file.tensors.values()].map(({ name, shape, dtype }): [string, Weight] => [
    name,
    { shape, values: decodeFloats(file.read(name), dtype) },
  ]);
  file.close();
  return new Map(found);
}
export const golden = weightsOf(goldenSingleFile('tiny-sdxl'));

/** What a block of Q8_0 holds, by its definition. */
export function ofQ8(bytes: Uint8Array): Float32Array {
  const blocks = Array.from({ length: bytes.byteLength / 34 }, (_, i) => bytes.slice(34 * i, 34 * i + 34));
  return Float32Array.from(
    blocks.flatMap((block) => {
      const [d] = decodeFloats(block.slice(0, 2), 'float16');
      return [...new Int8Array(block.buffer, 2)].map((q) => d * q);
    }),
  );
}

/** Rows of whole blocks, as stable-diffusion.cpp asks. */
export const isQuantised = (name: string, { shape }: Weight): boolean =>
  name.endsWith('.weight') && shape.length > 1 && (shape.at(-1) as number) % 32 === 0;

export const asGguf = (
  weights: Weights,
  type: 'F16' | 'Q8_0',
  metadata?: Record<string, GgufValue>,
): Buffer =>
  ggufBytes(
    [...weights].map(([name, weight]): GgufTensor => {
      const { shape, values } = weight;
      if (type === 'Q8_0' && isQuantised(name, weight)) return { name, shape, type: 8, bytes: q8_0(values) };
      return { name, shape, type: 1, bytes: encodeNumbers(values, 'float16') };
    }),
    metadata,
  );

/** The numbers that asGguf's Q8_0 leaves. */
export const inQ8 = (weights: Weights): Weights =>
  new Map(
    [...weights].map(([name, weight]): [string, Weight] => [
      name,
      isQuantised(name, weight) ? { ...weight, values: ofQ8(q8_0(weight.values)) } : weight,
    ]),
  );

/** A float32 file of these weights. */
export function plainFile(name: string, weights: Weights): string {
  const entries = [...weights].map(([key, { shape, values }]) => ({
    ...{ name: key, dtype: 'float32' as const, shape },
    bytes: encodeNumbers(values, 'float32'),
  }));
  writeSafetensors(at(name), entries);
  return at(name);
}

export function fileOf(name: string, bytes: Uint8Array): string {
  writeFileSync(at(name), bytes);
  return at(name);
}

/** All of a component's parameters as they come to lie on the device. */
export function loaded(source: ModelSource, component: string, dtype: FloatDType): Map<string, string> {
  const built = buildComponent(source.config(component));
  if (!built) throw new Error(`no ${component}`);
  source.load(component, built.module, device, dtype);
  const bits = [...namedParameters(built.module)].map(([name, { tensor }]): [string, string] => [
    name,
    Buffer.from(tensor.bytes()).toString('base64'),
  ]);
  unload(built.module);
  return new Map(bits);
}

interface Assert {
  ok(value: unknown, message: string): unknown;
}
export function sameModel(
  t: Assert,
  got: ModelSource,
  want: ModelSource,
  components = parts,
  dtype: FloatDType = 'float32',
) {
  for (const component of components) {
    const [ours, theirs] = [got, want].map((source) => loaded(source, component, dtype));
    const other = [...theirs].filter(([name, bits]) => ours.get(name) !== bits).map(([name]) => name);
    t.ok(
      theirs.size > 0 && ours.size === theirs.size && other.length === 0,
      `${component} in ${dtype}: ${other}`,
    );
  }
}
export const whole = (path: string): ModelSource => openSingleFile(path, { configs: model });

/** What a UNet's names begin with in a whole model. */
export const unetPrefix = 'model.diffusion_model.';
