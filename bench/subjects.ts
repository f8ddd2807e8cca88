// What a benchmark can measure: the UNet, the VAE's decoder or the text encoders of a preset, built with random weights and
// run once per call on random inputs of the size asked for.
import type { Device } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import { type AnyModule, parameterCount, unload } from '../engine/module.ts';
import { scope, unscoped } from '../engine/scope.ts';
import { sizeOf, type Tensor, tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import { type TextConfig, textEncoder } from '../models/clip.ts';
import type { ModelPreset } from '../models/presets.ts';
import { unet } from '../models/unet.ts';
import { vae } from '../models/vae.ts';
import { fillRandom, uniforms } from './pool_weights.ts';

export const subjectNames = ['unet', 'vae', 'text'] as const;
export type SubjectName = (typeof subjectNames)[number];

export interface Subject {
  parameters: number;
  /** One forward pass; what it makes is freed. */
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
  { width, height, batch }: Sizes,
  device: Device,
  dtype: FloatDType,
  fill: typeof fillRandom = fillRandom,
): Subject {
  const random = (...shape: number[]): Tensor =>
    unscoped(() => tensor(uniforms(sizeOf(shape), 1), shape, { device, dtype }));
  const latents = () => random(batch, height / 8, width / 8, 4);
  if (name === 'unet') {
    const config = preset.unet;
    const module = unet(config);
    fill(module, device, dtype);
    const ids = preset.requires_aesthetics_score ? 5 : 6;
    const sample = latents();
    const times = unscoped(() => tensor(new Float32Array(batch).fill(500), [batch], { device }));
    const timeIds = unscoped(() => tensor(new Float32Array(batch * ids).fill(512), [batch, ids], { device }));
    const pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim;
    const conditioning = {
      context: random(batch, TOKENS, config.cross_attention_dim),
      textEmbeds: random(batch, pooled),
      timeIds,
    };
    const inputs = [sample, times, timeIds, conditioning.context, conditioning.textEmbeds];
    return subject([module], inputs, () => void module(sample, times, conditioning));
  }
  if (name === 'vae') {
    const coder = vae(preset.vae);
    fill(coder.module, device, dtype);
    const z = latents();
    return subject([coder.module], [z], () => void coder.decode(z));
  }
  const encoders = [preset.text_encoder, preset.text_encoder_2]
    .filter((config): config is TextConfig => config !== undefined)
    .map(textEncoder);
  for (const encoder of encoders) fill(encoder, device, dtype);
  const ids = unscoped(() =>
    tensor(new Int32Array(batch * TOKENS).fill(1), [batch, TOKENS], { device, dtype: 'int32' }),
  );
  return subject(encoders, [ids], () => {
    for (const encoder of encoders) encoder(ids, { layer: -2, pooled: true });
  });
}

function subject(modules: readonly AnyModule[], inputs: readonly Tensor[], forward: () => void): Subject {
  return {
    parameters: modules.reduce((total, module) => total + parameterCount(module), 0),
    run: () => noGrad(() => scope(forward)),
    release() {
      for (const module of modules) unload(module);
      for (const t of inputs) t.release();
    },
  };
}
