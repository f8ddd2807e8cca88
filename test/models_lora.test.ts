// Merged LoRA files against diffusers (golden area lora): the UNet's output after load_lora_weights, for each spelling of
// the keys, scale and pair of adapters.
import { join } from 'node:path';
import { test } from 'tap';
import type { Device } from '../engine/device.ts';
import { unload } from '../engine/module.ts';
import { openModel } from '../models/checkpoint.ts';
import { mergeLora } from '../models/lora.ts';
import { parseUNetConfig, unet } from '../models/unet.ts';
import { type Assert, type GoldenCase, goldenArea, goldenFolder } from './golden.ts';
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
    const changed = mergeLora({ unet: model, unetConfig }, join(goldenFolder, file), factor);
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
