// Models with the UNets of golden/distilled.jsonl: tiny-sdxl's other parts, the config that is recorded, weights by the formula; and an
// adapter of theirs.
import { mkdirSync, readdirSync, symlinkSync } from 'node:fs';
import { join } from 'node:path';
import { type AnyModule, namedParameters } from '../../engine/module.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { readJsonObject } from '../../io/json.ts';
import { type TensorEntry, writeSafetensors } from '../../io/safetensors.ts';
import { parseUNetConfig, type UNetConfig, unet } from '../../models/unet/unet.ts';
import { numbers, writeComponent } from './controlnet_golden.ts';
import { goldenFolder, goldenLines } from './golden.ts';

/** ssd is as segmind/SSD-1B, bare has no middle block, and deep has several depths in the level whose first one its middle block has. */
export type Shape = 'ssd' | 'bare' | 'deep';

export interface Recorded {
  unet: Shape;
  config: Partial<UNetConfig>;
  loss: number;
  noise: number;
  /** By what keys begin with. */
  gradients: Record<string, [norm: number, sum: number]>;
}

export interface Called {
  unet: Shape;
  kind: string;
  settings: Record<string, unknown> & { scheduler?: string };
  seed: number;
  atol: number;
  /** Every seventh number of the latents, float32 in base64. */
  values: string;
}

const lines = goldenLines<Recorded | Called>('distilled');
export const recorded = lines.filter((each): each is Recorded => 'loss' in each);
export const calls = lines.filter((each): each is Called => 'values' in each);

const model = join(goldenFolder, 'tiny-sdxl');

/** The config.json of its UNet. */
export const jsonOf = (name: Shape): Record<string, unknown> => ({
  ...readJsonObject(join(model, 'unet', 'config.json')),
  ...recorded.find((each) => each.unet === name)?.config,
});

/** Keys and shapes of its weights. */
export const shapesOf = (module: AnyModule) =>
  [...namedParameters(module)].map(([key, { shape }]) => [key, shape] as const);

/** Writes the model's folder. */
export function writeDistilled(folder: string, name: Shape): string {
  mkdirSync(folder, { recursive: true });
  for (const part of readdirSync(model))
    if (part !== 'unet') symlinkSync(join(model, part), join(folder, part));
  const json = jsonOf(name);
  writeComponent(join(folder, 'unet'), name, json, shapesOf(unet(parseUNetConfig(json))));
  return folder;
}

/** Writes the script's adapter, under names that `spelled` gives a layer and its parts. */
export function writeLora(path: string, spelled: (layer: string, part: 'A' | 'B') => string): string {
  const layers: [layer: string, shape: readonly number[]][] = [
    ['up_blocks.0.attentions.2.transformer_blocks.2.attn1.to_q', [32, 32]],
    ['up_blocks.1.attentions.1.transformer_blocks.1.ff.net.0.proj', [192, 24]],
    ['down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k', [24, 80]],
    ['mid_block.resnets.0.conv1', [32, 32, 3, 3]],
  ];
  const entries = layers.flatMap(([layer, [out, inner, ...kernel]]) =>
    (
      [
        ['A', [2, inner, ...kernel]],
        ['B', [out, 2, ...kernel.map(() => 1)]],
      ] as const
    ).map(([part, shape]): TensorEntry => {
      const values = numbers(`${layer}.lora_${part}.weight`, shape).map((x) => x / 8);
      const bytes = encodeNumbers(values, 'float32');
      return { name: spelled(layer, part), dtype: 'float32', shape, bytes };
    }),
  );
  writeSafetensors(path, entries);
  return path;
}
