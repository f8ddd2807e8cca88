// What the golden area controlnet was made from, by the formulas that its generator had too: ControlNets' weights, random
// numbers and pictures, of which none is stored.
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { namedParameters } from '../../engine/module.ts';
import { sizeOf } from '../../engine/tensor.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { writePng } from '../../io/image.ts';
import type { Mask, Picture } from '../../io/pixels.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import type { Json } from '../../models/checkpoint/checkpoint.ts';
import { controlnet, parseControlNetConfig } from '../../models/control/controlnet.ts';
import { goldenArea, goldenLines } from './golden.ts';

export const area = goldenArea('controlnet');

/** diffusers' config of the ControlNet `full`, `mid` or `small`. */
export const configOf = (name: string): Record<string, unknown> =>
  area.cases.find((c) => c.controlnet === name)?.config as Record<string, unknown>;

/** `count` whole numbers from -256 to 255 by name: FNV-1a of it, a Weyl sequence, MurmurHash3's finalizer. */
function wholeNumbers(name: string, count: number): Int32Array {
  let seed = 0x811c9dc5;
  for (const byte of Buffer.from(name)) seed = Math.imul(seed ^ byte, 0x01000193);
  return Int32Array.from({ length: count }, (_, i) => {
    let h = seed + Math.imul(i, 0x9e3779b9);
    h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    return ((h ^ (h >>> 16)) >>> 23) - 256;
  });
}

export const numbers = (name: string, shape: readonly number[]): Float32Array =>
  Float32Array.from(wholeNumbers(name, sizeOf(shape)), (k) => k / 128);

/** About 1 / sqrt(fan in), norms about 1, biases small; no zero convolution is zero. All exact in float16. */
export function weight(name: string, key: string, shape: readonly number[]): Float32Array {
  const k = wholeNumbers(`${name}.${key}`, sizeOf(shape));
  if (shape.length === 1)
    return Float32Array.from(k, (n) => (key.endsWith('.weight') ? 1 + n / 1024 : n / 4096));
  const fan = sizeOf(shape.slice(1));
  // Eight convolutions with SiLU between leave nothing of a picture, were they not made larger.
  const unit = 2 ** -Math.floor(Math.log2(fan) / 2 + 0.5) * (key.includes('cond_embedding') ? 3 : 1);
  return Float32Array.from(k, (n) => (n / 256) * unit);
}

/** A union ControlNet of golden/controlnet_union.jsonl: diffusers' config and the shapes of its weights. */
export const unionArchitecture = goldenLines<{ config: Json; keys: Record<string, number[]> }>(
  'controlnet_union',
).find(({ keys }) => keys) as { config: Json; keys: Record<string, number[]> };

/** Writes a union ControlNet's folder, whose weights are those of `name`. */
export function writeControlNetUnion(
  folder: string,
  name: string,
  json: Json = unionArchitecture.config,
): string {
  const shapes = Object.entries(unionArchitecture.keys);
  return writeComponent(folder, name, json, shapes);
}

/** Writes the folder of a component of diffusers', whose weights are those of `name`. */
export function writeComponent(
  folder: string,
  name: string,
  json: Json,
  shapes: readonly (readonly [string, readonly number[]])[],
): string {
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, 'config.json'), JSON.stringify(json));
  const entries = shapes.map(([key, shape]) => ({
    ...{ name: key, dtype: 'float16' as const, shape },
    bytes: encodeNumbers(weight(name, key, shape), 'float16'),
  }));
  writeSafetensors(join(folder, 'diffusion_pytorch_model.safetensors'), entries);
  return folder;
}

/** Writes a ControlNet's folder; `skip` leaves a tensor out. */
export function writeControlNet(folder: string, name: string, skip?: string): string {
  const json = configOf(name);
  const parameters = [...namedParameters(controlnet(parseControlNetConfig(json, name)))];
  const shapes = parameters.filter(([key]) => key !== skip).map(([key, { shape }]) => [key, shape] as const);
  return writeComponent(folder, name, json, shapes);
}

export function picture(seed: number, width: number, height: number): Picture {
  const data = Uint8Array.from({ length: 3 * width * height }, (_, i) => {
    const [x, y, c] = [Math.floor(i / 3) % width, Math.floor(i / 3 / width), i % 3];
    return (3 * x + (5 + 2 * c) * y + 40 * seed) ^ ((x >> 3) * (c + 1 + seed) * 9);
  });
  return { width, height, channels: 3, data };
}

/** The same in a file of a folder. */
export function pictureIn(folder: string, ...of: Parameters<typeof picture>): string {
  const file = join(folder, `${of.join('-')}.png`);
  writePng(file, picture(...of));
  return file;
}

/** The golden calls' mask. */
export const disc = (width = 64, height = 64): Mask => ({
  ...{ width, height, channels: 1 },
  data: Uint8Array.from({ length: width * height }, (_, i) =>
    ((i % width) - 30) ** 2 + (Math.floor(i / width) - 36) ** 2 < 400 ? 255 : 0,
  ),
});
