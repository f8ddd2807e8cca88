// How a ControlNet's training begins, against diffusers: the gradients of all its parameters (golden/controlnet_gradients.jsonl), and what
// a new one is made of.
import { join } from 'node:path';
import { test } from 'tap';
import { backward, clearGrad, gradOf, requireGrad } from '../engine/grad.ts';
import { namedParameters, parameterCount, unload } from '../engine/module.ts';
import { scope } from '../engine/scope.ts';
import { tensor } from '../engine/tensor.ts';
import { openComponent, openModel, openWeights } from '../models/checkpoint.ts';
import { controlnet, parseControlNetConfig } from '../models/controlnet.ts';
import { controlNetJson } from '../models/controlnet_start.ts';
import { componentConfigs } from '../models/diffusers_config.ts';
import { toDevice } from '../models/latents.ts';
import type { Pipeline } from '../models/pipeline.ts';
import { presets } from '../models/presets.ts';
import { parseUNetConfig, unet } from '../models/unet.ts';
import { controlled as controlledBy } from '../train/controlnet.ts';
import { diffusionLoss, objectiveOf } from '../train/objective.ts';
import { resolveRun } from '../train/resolve_run.ts';
import type { RunInput } from '../train/run.ts';
import { openMaterials } from '../train/session.ts';
import { numbers, picture, writeControlNet } from './controlnet_golden.ts';
import { goldenLines, permuted } from './golden.ts';
import { basic, control, device, folder, locate, model, sessionOf, silent } from './small_runs.ts';

const source = openModel(model);

const controlRun = (output: string): RunInput => ({ ...basic(output), ...control });

interface Told {
  controlnet: string;
  config: Record<string, unknown>;
  loss: number;
}
type Gradient = [controlnet: string, key: string, norm: number, sum: number];
const golden = goldenLines<Told | Gradient>('controlnet_gradients');
const told = golden.filter((each): each is Told => !Array.isArray(each));
const gradients = golden.filter((each): each is Gradient => Array.isArray(each));

/** How far float32's gradients may be from float64's, as a part of their norm: torch's are 5.5e-6, and here is another order of sums. */
const NEAR = 3e-5;

for (const gradientCheckpointing of [false, true])
  test(`the gradients are diffusers'${gradientCheckpointing ? ', checkpointed' : ''}`, (t) => {
    const before = device.memory.storages;
    for (const { controlnet: name, config, loss: wanted } of told) {
      const options = { gradientCheckpointing };
      const net = controlnet(parseControlNetConfig(config, name), options);
      const written = writeControlNet(join(folder, name), name);
      openComponent(written).load('controlnet', net, device, 'float32');
      const frozen = unet(parseUNetConfig(source.config('unet')), options);
      source.load('unet', frozen, device, 'float32');
      const parameters = namedParameters(net);
      for (const { tensor: weight } of parameters.values()) requireGrad(weight);
      const [n, h, w] = [2, 8, 12];
      scope(() => {
        const made = (key: string, ...shape: number[]) =>
          tensor(numbers(`${name}.${key}`, shape), shape, { device });
        const latents = (key: string) =>
          toDevice({ shape: [n, 4, h, w], data: numbers(`${name}.${key}`, [n, 4, h, w]) }, device, 'float32');
        const images = [1, 2].flatMap((seed) => [...picture(seed, 8 * w, 8 * h).data]);
        const inputs = {
          sample: latents('sample'),
          target: latents('target'),
          timesteps: tensor([7, 803], [n], { device }),
          controlnet_cond: tensor(
            images.map((x) => x / 255),
            [n, 8 * h, 8 * w, 3],
            { device },
          ),
        };
        const ids = [64, 96, 0, 0, 64, 96, 80, 100, 8, 2, 64, 96];
        const conditioning = {
          context: made('encoder_hidden_states', n, 77, 80),
          textEmbeds: made('text_embeds', n, 40),
          timeIds: tensor(ids, [n, 6], { device }),
        };
        const settings = resolveRun(controlRun('gradients'), 'test', 'test');
        const objective = objectiveOf(settings.objective, source.config('scheduler'));
        const pipeline = { unet: frozen, controlnet: [net] } as unknown as Pipeline;
        const network = controlledBy(settings).network(pipeline, inputs);
        const loss = diffusionLoss(network, objective, inputs, conditioning);
        const [got] = loss.floats();
        t.ok(Math.abs(got / wanted - 1) < 1e-5, `${name}: the loss ${got}, diffusers' ${wanted}`);
        backward(loss);
      });
      let worst = { key: '', error: 0 };
      for (const [, key, norm, sum] of gradients.filter(([of]) => of === name)) {
        const parameter = parameters.get(key);
        const values = scope(() => parameter && gradOf(parameter.tensor)?.floats());
        if (!parameter || !values) {
          t.fail(`${name}: ${key} has no gradient`);
          continue;
        }
        const laid =
          parameter.layout === 'conv' ? permuted(values, parameter.memoryShape, [0, 3, 1, 2]) : values;
        const factors = numbers(key, [laid.length]);
        const [ownNorm, ownSum] = [
          Math.sqrt(laid.reduce((total, x) => total + x * x, 0)),
          laid.reduce((total, x, i) => total + x * factors[i], 0),
        ];
        // Errors of elements that are independent add up in the sum as its factors' root mean square, which is 1.15.
        const error = Math.max(Math.abs(ownNorm - norm), Math.abs(ownSum - sum) / 1.15) / norm;
        if (error > worst.error) worst = { key, error };
      }
      t.ok(worst.error < NEAR, `${name}: ${worst.key} is ${worst.error} off`);
      t.equal(gradients.filter(([of]) => of === name).length, parameters.size, `${name}: all its parameters`);
      const reached = [...namedParameters(frozen)].filter(([, p]) => gradOf(p.tensor));
      t.same(reached, [], `${name}: the UNet has no gradient`);
      for (const { tensor: weight } of parameters.values()) clearGrad(weight);
      for (const each of [net, frozen]) unload(each);
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
      copies.every(([key, p]) => {
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
