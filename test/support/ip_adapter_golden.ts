// What golden/ip_adapter.jsonl was made from: a vision encoder and two IP-Adapters, whose weights are the formulas of ControlNets', and
// numbers of diffusers' by what they are of.
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type AnyModule, namedParameters } from '../../engine/module.ts';
import { decodeFloats, encodeNumbers } from '../../io/dtype.ts';
import type { Mask, Picture } from '../../io/pixels.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import { parseVisionConfig, visionEncoder } from '../../models/ip_adapter/clip_vision.ts';
import { type IPAdapterConfig, ipAdapter } from '../../models/ip_adapter/ip_adapter.ts';
import type { Scale, ScalesByBlock } from '../../models/ip_adapter/ip_adapter_scale.ts';
import { disc, picture, weight } from './controlnet_golden.ts';
import { goldenLines } from './golden.ts';

/** A picture by its seed, width and height. */
export type Of = [seed: number, width: number, height: number];

/** A mask is a disc, or what is bright of a picture. */
type Masks = ('disc' | Of)[];

interface Golden {
  values: Float32Array;
  atol: number;
  picture: Of;
  /** Of preprocessing: every `stride`-th number of a picture `size` pixels wide. */
  size?: number;
  stride: number;
  encoder?: Record<string, unknown>;
  adapter?: string;
  call?: string;
  seed: number;
  adapters: [name: string, pictures: Of | Of[], scale: Scale | ScalesByBlock, masks?: Masks | null][];
  settings: Record<string, number>;
  /** What of an encoder or an adapter. */
  of?: string;
}

export const golden: readonly Golden[] = goldenLines<Golden & { values: string }>('ip_adapter').map(
  ({ values, ...rest }) => ({ ...rest, values: decodeFloats(Buffer.from(values, 'base64'), 'float32') }),
);

/** What a golden call draws by: a picture, or several. */
export const picturesOf = (of: Of | Of[]): Picture | Picture[] =>
  typeof of[0] === 'number' ? picture(...(of as Of)) : (of as Of[]).map((each) => picture(...each));

/** What its masks are, none where its pictures act everywhere. */
export const masksOf = (of?: Masks | null): (Mask | Picture)[] | undefined =>
  of?.map((each) => (each === 'disc' ? disc() : picture(...each)));

export const encoderConfig = {
  architectures: ['CLIPVisionModelWithProjection'],
  ...golden.find(({ encoder }) => encoder)?.encoder,
};

/** Of the attentions over the prompt of tiny-sdxl's UNet. */
const widths = [24, 24, ...Array(10).fill(32), 24, 24, 24, 32, 32];
const shared = { cross_attention_dim: 80, widths };
export const configs: Record<string, IPAdapterConfig> = {
  plain: { ...shared, tokens: 4, inputs: 40 },
  plus: {
    ...{ ...shared, tokens: 6, inputs: 48 },
    resampler: { width: 32, depth: 4, inner: 128, feedForward: 128 },
  },
};

function write(path: string, name: string, module: AnyModule): string {
  const entries = [...namedParameters(module)].map(([key, { shape }]) => ({
    ...{ name: key, dtype: 'float16' as const, shape },
    bytes: encodeNumbers(weight(name, key, shape), 'float16'),
  }));
  writeSafetensors(path, entries);
  return path;
}

/** Writes a vision encoder's folder. */
export function writeEncoder(folder: string, json: Record<string, unknown> = encoderConfig): string {
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, 'config.json'), JSON.stringify(json));
  write(join(folder, 'model.safetensors'), 'image_encoder', visionEncoder(parseVisionConfig(json)));
  return folder;
}

/** Writes an adapter's file, whose weights are those of `name`. */
export const writeIPAdapter = (path: string, name: string, more: Partial<IPAdapterConfig> = {}): string =>
  write(path, name, ipAdapter({ ...configs[name], ...more }));
