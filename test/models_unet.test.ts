// The base and the refiner UNet against diffusers (golden areas unet and unet_refiner): outputs, the output of every
// submodule, and the gradients of every parameter and of three inputs.
import { join } from 'node:path';
import { test } from 'tap';
import type { Device } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import { unload } from '../engine/module.ts';
import { mse } from '../engine/ops/loss.ts';
import { timestepEmbedding } from '../engine/ops/move.ts';
import { scope } from '../engine/scope.ts';
import { openModel } from '../models/checkpoint.ts';
import { parseUNetConfig, unet } from '../models/unet.ts';
import { type Assert, type GoldenArea, type GoldenCase, goldenArea, goldenFolder } from './golden.ts';
import {
  checkActivations,
  checkGradients,
  compare,
  devices,
  image,
  scaleParameters,
  unetInputs,
} from './models_golden.ts';

function check(t: Assert, area: GoldenArea, c: GoldenCase, folder: string, device: Device): void {
  const source = openModel(join(goldenFolder, folder));
  const config = parseUNetConfig(source.config('unet'));
  const model = unet(config);
  source.load('unet', model, device, 'float32');
  scaleParameters(model, c);
  scope(() => {
    const { sample, timesteps, conditioning } = unetInputs(area, c, device);
    const run = () => model(sample, timesteps, conditioning);
    if (c.id === 'gradients') {
      const target = image(area, c.inputs?.target as string, device);
      const { context: encoder_hidden_states, textEmbeds: text_embeds } = conditioning;
      checkGradients(t, area, c, model, { sample, encoder_hidden_states, text_embeds }, () => {
        const out = run();
        compare(t, area, c, 'out', out);
        return mse(out, target);
      });
    } else if (c.id === 'activations') {
      const seen = noGrad(() => checkActivations(t, area, c, () => compare(t, area, c, 'out', run())));
      const sinusoids = {
        time_proj: timestepEmbedding(timesteps, config.block_out_channels[0]),
        add_time_proj: timestepEmbedding(conditioning.timeIds, config.addition_time_embed_dim),
      };
      for (const [label, got] of Object.entries(sinusoids)) compare(t, area, c, label, got);
      const unseen = Object.keys(c.expect).filter((label) => !seen.has(label));
      t.ok(unseen.sort().join() === 'add_time_proj,out,time_proj', `${c.id}: modules not seen: ${unseen}`);
    } else compare(t, area, c, 'sample', noGrad(run));
  });
  unload(model);
}

for (const device of devices) {
  for (const [name, folder] of [
    ['unet', 'tiny-sdxl'],
    ['unet_refiner', 'tiny-sdxl-refiner'],
  ]) {
    test(`${name} on ${device.name}`, (t) => {
      const area = goldenArea(name);
      const before = device.memory.storages;
      for (const c of area.cases) check(t, area, c, folder, device);
      t.equal(device.memory.storages, before, 'live tensors');
      t.end();
    });
  }
}
