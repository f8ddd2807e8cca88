// Merged LoRA files against diffusers (golden area lora): the UNet's output after load_lora_weights, for each spelling of
// the keys, scale and pair of adapters.
import { join } from 'node:path';
import { test } from 'tap';
import type { Device } from '../engine/device.ts';
import { namedParameters, unload } from '../engine/module.ts';
import { encodeNumbers } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { writeSafetensors } from '../io/safetensors.ts';
import { openModel } from '../models/checkpoint.ts';
import { mergeLora } from '../models/lora.ts';
import { loadPipeline, type Pipeline } from '../models/pipeline.ts';
import { parseUNetConfig, unet } from '../models/unet.ts';
import { type Assert, type GoldenCase, goldenArea, goldenFolder, goldenLora } from './golden.ts';
import { compareSample, devices } from './models_golden.ts';

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
    for (const c of area.cases.filter(({ call }) => call === 'unet forward after load_lora_weights'))
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
