// How a ControlNet's training begins, against diffusers: the gradients of all its parameters (golden/controlnet_gradients.jsonl), and what
// a new one is made of.
import { join } from 'node:path';
import { test } from 'tap';
import { parameterCount } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { openComponent, openModel, openWeights } from '../../models/checkpoint/checkpoint.ts';
import { controlnet, parseControlNetConfig } from '../../models/control/controlnet.ts';
import { controlNetJson } from '../../models/control/controlnet_start.ts';
import { componentConfigs } from '../../models/formats/diffusers_config.ts';
import { presets } from '../../models/formats/presets.ts';
import { controlled as controlledBy } from '../../train/controls/controlnet.ts';
import { openMaterials } from '../../train/materials.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { frozenUNet, type Gradient, holdGradients, pixelShape } from '../support/beside_gradients.ts';
import { writeControlNet } from '../support/controlnet_golden.ts';
import { goldenLines, permuted } from '../support/golden.ts';
import { nonEmpty } from '../support/non_empty.ts';
import { basic, control, device, folder, locate, model, sessionOf, silent } from '../support/small_runs.ts';

const source = openModel(model);

const controlRun = (output: string): RunInput => ({ ...basic(output), ...control });

interface Told {
  controlnet: string;
  config: Record<string, unknown>;
  loss: number;
}
const golden = goldenLines<Told | Gradient>('controlnet_gradients');
const told = golden.filter((each): each is Told => !Array.isArray(each));
const gradients = golden.filter((each): each is Gradient => Array.isArray(each));

for (const gradientCheckpointing of [false, true])
  test(`the gradients are diffusers'${gradientCheckpointing ? ', checkpointed' : ''}`, (t) => {
    const before = device.memory.storages;
    for (const { controlnet: name, config, loss } of told) {
      const options = { gradientCheckpointing };
      const net = controlnet(parseControlNetConfig(config, name), options);
      const written = writeControlNet(join(folder, name), name);
      openComponent(written).load('controlnet', net, device, 'float32');
      const beside = {
        ...{ name, loss, net, control: controlledBy(resolveRun(controlRun('gradients'), 'test', 'test')) },
        pipeline: () => ({ controlnet: [net] }),
        inputs: (_: unknown, pictures: Float32Array) => ({
          conditioning_pixel_values: tensor(pictures, pixelShape, { device }),
        }),
      };
      holdGradients(t, gradients, beside, frozenUNet(options));
    }
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });

test("a new one has diffusers' config, and is the UNet's half behind zeros", async (t) => {
  for (const { controlnet: name, config } of told) {
    const depths = config.transformer_layers_per_block as number[];
    const json = controlNetJson(source.config('unet'), { ratio: 8, transformer_layers_per_block: depths });
    const { _class_name, conditioning_embedding_out_channels, ...rest } = json;
    t.equal(_class_name, 'ControlNetModel');
    t.same(conditioning_embedding_out_channels, [16, 32, 96, 256], "diffusers' default");
    t.same({ ...rest, conditioning_embedding_out_channels: [4, 8, 12, 16] }, config, name);
  }
  t.throws(() => controlNetJson(source.config('unet'), { ratio: 16, transformer_layers_per_block: [] }), {
    message: /the VAE takes 16 pixels to a latent, and a new ControlNet at most 8/,
  });
  // What diffusers/controlnet-canny-sdxl-1.0, its -mid and its -small have.
  const base = componentConfigs(presets['sdxl-base']).unet;
  for (const [transformer_layers_per_block, count] of [
    [[], 1_251_014_160],
    [[0, 0, 1], 270_942_480],
    [[0, 0, 0], 160_111_120],
  ] as const) {
    const json = controlNetJson(base, { ratio: 8, transformer_layers_per_block });
    t.equal(parameterCount(controlnet(parseControlNetConfig(json, 'new'))), count);
  }
  const given = openWeights(join(model, 'unet'));
  for (const transformer_layers_per_block of [[], [0, 0, 1]]) {
    const input = { ...controlRun('new'), controlnet: { transformer_layers_per_block } };
    const session = await sessionOf(await openMaterials(resolveRun(input, 'test', 'test'), locate, silent));
    const [{ parameters }] = session.task.components;
    const copies = [...parameters].filter(([key]) => given.info(key));
    t.ok(
      nonEmpty(copies).every(([key, p]) => {
        const values = scope(() => p.tensor.floats());
        const laid = p.layout === 'conv' ? permuted(values, p.memoryShape, [0, 3, 1, 2]) : values;
        return Buffer.from(laid.buffer).equals(Buffer.from(given.floats(key).buffer));
      }),
      `${copies.length} weights of the UNet`,
    );
    const added = [...parameters].filter(([key]) => !given.info(key));
    const zero = added.filter(([, p]) => scope(() => p.tensor.floats().every((x) => x === 0)));
    t.same(
      zero.map(([key]) => key),
      added
        .map(([key]) => key)
        .filter((key) => /^controlnet_(down_blocks|mid_block|cond_embedding\.conv_out)\./.test(key)),
    );
    for (const [key, p] of added) {
      if (zero.some(([other]) => other === key)) continue;
      const weight = parameters.get(key.replace('bias', 'weight'));
      const bound = 1 / Math.sqrt((weight?.size ?? 0) / (weight?.shape[0] ?? 1));
      const values = scope(() => p.tensor.floats());
      const most = values.reduce((max, x) => Math.max(max, Math.abs(x)), 0);
      t.ok(most <= bound && most > bound / 2, `${key} lies within ${bound}`);
    }
    session.release();
  }
  given.close();
});
