// Merged LoRA files against diffusers (golden area lora): the UNet's output after load_lora_weights, for each spelling of
// the keys, scale and pair of adapters.
import { join } from 'node:path';
import { test } from 'tap';
import type { Device } from '../../engine/device.ts';
import { namedParameters, unload } from '../../engine/module.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { inspect } from '../../models/inspect.ts';
import { mergeLora } from '../../models/lora/lora.ts';
import { loadPipeline, type Pipeline } from '../../models/pipeline.ts';
import { parseUNetConfig, unet } from '../../models/unet/unet.ts';
import { digestOf } from '../support/contents.ts';
import { type Assert, type GoldenCase, goldenArea, goldenFolder, goldenLora } from '../support/golden.ts';
import { compareSample, devices } from '../support/models_golden.ts';
import { nonEmpty } from '../support/non_empty.ts';

const area = goldenArea('lora');

interface Settings {
  scale: number | null;
  adapter_weights: number[] | null;
}

function check(t: Assert, c: GoldenCase, device: Device): void {
  const source = openModel(join(goldenFolder, 'tiny-sdxl'));
  const unetConfig = parseUNetConfig(source.config('unet'));
  const model = unet(unetConfig);
  source.load('unet', model, device, 'float32');
  const { scale, adapter_weights: weights } = c.settings as unknown as Settings;
  (c.files as string[]).forEach((file, i) => {
    const factor = weights?.[i] ?? scale ?? 1;
    const changed = mergeLora({ unet: model, unetConfig }, goldenLora(file), factor);
    t.ok(changed === 136, `${c.id}: ${file} changes ${changed} weights`);
  });
  compareSample(t, area, c, model, device);
  unload(model);
}

for (const device of devices) {
  test(`merged LoRAs on ${device.name}`, (t) => {
    const before = device.memory.storages;
    for (const c of nonEmpty(
      area.cases.filter(({ call }) => call === 'unet forward after load_lora_weights'),
    ))
      check(t, c, device);
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });
}

test('a loaded pipeline takes an adapter of its text encoders too', (t) => {
  const [device] = devices;
  const path = join(t.testdir(), 'texts.safetensors');
  const layer = 'text_model_encoder_layers_1_self_attn_q_proj';
  const ones = (name: string, shape: number[]) => {
    const bytes = encodeNumbers(new Float32Array(shape[0] * shape[1]).fill(0.5), 'float32');
    return { name, dtype: 'float32' as const, shape, bytes };
  };
  const parts = (encoder: string, width: number) => [
    ones(`lora_${encoder}_${layer}.lora_down.weight`, [2, width]),
    ones(`lora_${encoder}_${layer}.lora_up.weight`, [width, 2]),
  ];
  const texts = ({ text }: Pipeline) =>
    text.encoders.map(({ encoder }) =>
      namedParameters(encoder).get('text_model.encoder.layers.1.self_attn.q_proj.weight')?.tensor.floats(),
    );
  for (const [model, entries] of [
    ['tiny-sdxl', [...parts('te1', 32), ...parts('te2', 48)]],
    ['tiny-sdxl-refiner', parts('te', 48)],
  ] as const) {
    writeSafetensors(path, entries);
    const source = openModel(join(goldenFolder, model));
    const place = { device, dtype: 'float32' } as const;
    const [loaded, merged] = [[{ path, scale: 0.5 }], []].map((lora) =>
      loadPipeline(source, { ...place, lora }),
    );
    t.equal(mergeLora(merged, path, 0.5), entries.length / 2, model);
    t.same(texts(merged), texts(loaded), `${model}: as when it is loaded with it`);
    for (const each of [loaded, merged]) each.release();
    t.throws(
      () => mergeLora(merged, path),
      new UserError(`LoRA ${path} changes weights that are released by now: load the pipeline again`),
    );
  }
  t.end();
});

test("ComfyUI's spelling is read as kohya's of the same layers", (t) => {
  const [device] = devices;
  const folder = t.testdir();
  const entry = (name: string, rows: number, columns: number) => {
    const values = Float32Array.from({ length: rows * columns }, (_, i) => Math.sin(i + rows));
    return {
      name,
      dtype: 'float32' as const,
      shape: [rows, columns],
      bytes: encodeNumbers(values, 'float32'),
    };
  };
  // As ComfyUI's model_lora_keys_unet and model_lora_keys_clip list them.
  const layers = [
    [
      'diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q',
      'unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q',
      24,
    ],
    [
      'diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q',
      'unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q',
      32,
    ],
    [
      'text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj',
      'te1_text_model_encoder_layers_1_self_attn_q_proj',
      32,
    ],
    [
      'text_encoders.clip_g.transformer.text_model.encoder.layers.1.self_attn.q_proj',
      'te2_text_model_encoder_layers_1_self_attn_q_proj',
      48,
    ],
  ] as const;
  const merged = (spelling: 0 | 1) => {
    const path = join(folder, `${spelling}.safetensors`);
    const module = (names: (typeof layers)[number]) => (spelling ? `lora_${names[1]}` : names[0]);
    const entries = layers.flatMap((names) => [
      entry(`${module(names)}.lora_down.weight`, 2, names[2]),
      entry(`${module(names)}.lora_up.weight`, names[2], 2),
    ]);
    writeSafetensors(path, entries);
    const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'float32' });
    t.equal(mergeLora(pipeline, path), layers.length, `${path}: layers`);
    const parts = [pipeline.unet, ...pipeline.text.encoders.map(({ encoder }) => encoder)];
    const weights = parts.flatMap((part) =>
      [...namedParameters(part)].map(([name, { tensor }]) => `${name} ${digestOf(tensor.floats())}`),
    );
    pipeline.release();
    return weights;
  };
  t.same(merged(0), merged(1));
  t.match(inspect(join(folder, '0.safetensors')), {
    kind: "LoRA, ComfyUI's keys",
    lora: { layers: { diffusion_model: 2, 'text_encoders.clip_l': 1, 'text_encoders.clip_g': 1 } },
  });
  t.end();
});
