// What a benchmark can measure: the UNet, the VAE's decoder or the text encoders of a preset, built with random weights and
// run once per call on random inputs of the size asked for.
import type { Device } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import { type AnyModule, parameterCount, unload } from '../engine/module.ts';
import { scope, unscoped } from '../engine/scope.ts';
import { sizeOf, type Tensor, tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import type { ModelPreset } from '../models/formats/presets.ts';
import { placeTokens, type TextConfig, textEncoder } from '../models/text/clip.ts';
import { keepInQ8 } from '../models/unet/q8.ts';
import { unet } from '../models/unet/unet.ts';
import { vae } from '../models/vae/vae.ts';
import { fillRandom, uniforms } from './pool_weights.ts';

export const subjectNames = ['unet', 'vae', 'text'] as const;
export type SubjectName = (typeof subjectNames)[number];

export interface Subject {
  parameters: number;
  /** One forward pass or update; what it makes is freed. */
  run(): void;
  release(): void;
}

export interface Sizes {
  /** Pixels. */
  width: number;
  height: number;
  batch: number;
}

const TOKENS = 77;

/** Builds a subject on `device`, weights (by `fill`) and inputs included. */
export function buildSubject(
  name: SubjectName,
  preset: ModelPreset,
  { width, height, batch, q8 = false }: Sizes & { q8?: boolean },
  device: Device,
  dtype: FloatDType,
  fill: typeof fillRandom = fillRandom,
): Subject {
  if (name === 'unet') {
    const module = unet(preset.unet);
    if (q8) keepInQ8(module);
    fill(module, device, dtype);
    const { sample, times, conditioning, release } = unetInputs(
      preset,
      { width, height, batch },
      device,
      dtype,
    );
    return subject([module], release, () => void module(sample, times, conditioning));
  }
  if (name === 'vae') {
    const coder = vae(preset.vae);
    fill(coder.module, device, dtype);
    const z = random([batch, height / 8, width / 8, 4], device, dtype);
    return subject(
      [coder.module],
      () => z.release(),
      () => void coder.decode(z),
    );
  }
  const encoders = [preset.text_encoder, preset.text_encoder_2]
    .filter((config): config is TextConfig => config !== undefined)
    .map(textEncoder);
  for (const encoder of encoders) fill(encoder, device, dtype);
  const ids = new Int32Array(batch * TOKENS).fill(1);
  const tokens = unscoped(() => placeTokens(encoders[0], ids, TOKENS, device));
  return subject(
    encoders,
    () => {
      tokens.ids.release();
      tokens.ends.release();
    },
    () => {
      for (const encoder of encoders) encoder(tokens, { layer: -2, pooled: true });
    },
  );
}

const random = (shape: readonly number[], device: Device, dtype: FloatDType): Tensor =>
  unscoped(() => tensor(uniforms(sizeOf(shape), 1), shape, { device, dtype }));

/** What a UNet is called with, at this size. */
export function unetInputs(
  { unet: config, requires_aesthetics_score }: ModelPreset,
  { width, height, batch }: Sizes,
  device: Device,
  dtype: FloatDType,
) {
  const ids = requires_aesthetics_score ? 5 : 6;
  const same = (value: number, shape: number[]) =>
    unscoped(() => tensor(new Float32Array(sizeOf(shape)).fill(value), shape, { device }));
  const pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim;
  const sample = random([batch, height / 8, width / 8, config.in_channels], device, dtype);
  const times = same(500, [batch]);
  const conditioning = {
    context: random([batch, TOKENS, config.cross_attention_dim], device, dtype),
    textEmbeds: random([batch, pooled], device, dtype),
    timeIds: same(512, [batch, ids]),
  };
  const release = () => {
    for (const t of [sample, times, ...Object.values(conditioning)]) t.release();
  };
  return { sample, times, conditioning, release };
}

function subject(modules: readonly AnyModule[], release: () => void, forward: () => void): Subject {
  return {
    parameters: modules.reduce((total, module) => total + parameterCount(module), 0),
    run: () => noGrad(() => scope(forward)),
    release() {
      for (const module of modules) unload(module);
      release();
    },
  };
}
