// The base and the refiner UNet against diffusers (golden areas unet and unet_refiner): outputs, the output of every
// submodule, and the gradients of every parameter and of three inputs.
import { join } from 'node:path';
import { test } from 'tap';
import { anyHopper, standInApi } from '../../engine/cuda/stand_in.ts';
import { cudaDevice, type Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { namedParameters, unload } from '../../engine/module.ts';
import { mse } from '../../engine/ops/loss.ts';
import { concat } from '../../engine/ops/move.ts';
import { timestepEmbedding } from '../../engine/ops/timestep_embedding.ts';
import { cast } from '../../engine/ops/unary.ts';
import { profiled } from '../../engine/profile.ts';
import { scope } from '../../engine/scope.ts';
import { empty, sizeOf, type Tensor, tensor } from '../../engine/tensor.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { presets } from '../../models/formats/presets.ts';
import { resnet } from '../../models/unet/blocks.ts';
import { ContextCache } from '../../models/unet/context_cache.ts';
import { parseUNetConfig, type UNet, unet } from '../../models/unet/unet.ts';
import type { Schedule } from '../../models/unet/unet_encoder.ts';
import { toHost } from '../../models/vae/latents.ts';
import { draws } from '../../train/data/draws.ts';
import {
  type Assert,
  type GoldenArea,
  type GoldenCase,
  goldenArea,
  goldenFolder,
} from '../support/golden.ts';
import {
  checkActivations,
  checkGradients,
  compare,
  devices,
  image,
  scaleParameters,
  unetInputs,
} from '../support/models_golden.ts';
import { nonEmpty } from '../support/non_empty.ts';
import { relativeError } from '../support/op_cases.ts';

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
    } else {
      compare(t, area, c, 'sample', noGrad(run));
      // A schedule's way through the layers is the same on every device, and the loops of the reference are slow.
      if (device !== devices[0]) return;
      for (const stepped of noGrad(() => scheduled(model, { sample, timesteps, conditioning }, device)))
        compare(t, area, c, 'sample', stepped);
    }
  });
  unload(model);
}

/** The same as the middle one of three steps of a schedule: the first time, when all is made, and from what was kept. */
function scheduled(
  model: UNet,
  { sample, timesteps, conditioning }: ReturnType<typeof unetInputs>,
  device: Device,
): Tensor[] {
  const now = timesteps.floats();
  const times = tensor([...now.map((t) => t + 1), ...now, ...now.map((t) => t / 2)], [3, now.length], {
    device,
  });
  const step = tensor([1], [1], { device, dtype: 'int32' });
  const cache = new ContextCache();
  const outputs = [1, 2].map(() => model(sample, { times, step }, { ...conditioning, cache }));
  cache.release();
  return outputs;
}

const models = [
  ['unet', 'tiny-sdxl'],
  ['unet_refiner', 'tiny-sdxl-refiner'],
] as const;

for (const device of devices) {
  for (const [name, folder] of models) {
    test(`${name} on ${device.name}`, (t) => {
      const area = goldenArea(name);
      const before = device.memory.storages;
      for (const c of area.cases) check(t, area, c, folder, device);
      t.equal(device.memory.storages, before, 'live tensors');
      t.end();
    });
  }
}

test('in bfloat16 what is kept over an image, summed taps among it, adds little to the distance from diffusers', (t) => {
  const [device] = devices;
  const dtype = 'bfloat16';
  for (const [name, folder] of models) {
    const area = goldenArea(name);
    const source = openModel(join(goldenFolder, folder));
    const model = unet(parseUNetConfig(source.config('unet')));
    source.load('unet', model, device, dtype);
    for (const c of nonEmpty(
      area.cases.filter(({ expect, scale_parameters }) => expect.sample && !scale_parameters),
    ))
      noGrad(() =>
        scope(() => {
          const { sample, timesteps, conditioning } = unetInputs(area, c, device);
          const { context, textEmbeds, timeIds } = conditioning;
          const inputs = {
            sample: cast(sample, dtype),
            timesteps,
            conditioning: { context: cast(context, dtype), textEmbeds: cast(textEmbeds, dtype), timeIds },
          };
          const want = area.floats(c.expect.sample.tensor);
          const error = (y: Tensor) => relativeError(toHost(y).data, want);
          const alone = error(model(inputs.sample, timesteps, inputs.conditioning));
          const [kept] = scheduled(model, inputs, device).map(error);
          t.ok(
            kept <= 1.1 * alone,
            `${name} ${c.id}: ${(100 * kept).toFixed(2)} %, ${(100 * alone).toFixed(2)} % without`,
          );
        }),
      );
    unload(model);
  }
  t.end();
});

test("an image's schedule: what follows from the time alone is made once, and a step looks it up", (t) => {
  let launches = 0;
  const api = { ...standInApi(anyHopper), cuLaunchKernel: () => void launches++ };
  const ops = new Map<string, number>();
  const device = profiled(cudaDevice(api), ({ record: { name }, tensors: { x, x0 } }) => {
    const ofTime = name.startsWith('linear') && x.shape[0] === 2 && x.shape.length === 2;
    const ofImages = name === 'concat' && x0.shape.length === 4 && x0.shape[3] !== 4;
    const op = ofTime ? 'linear of the time' : ofImages ? 'skip connection joined' : name;
    ops.set(op, (ops.get(op) ?? 0) + 1);
  });
  const dtype = 'bfloat16';
  const { unet: config } = presets['sdxl-base'];
  const model = unet(config);
  for (const p of namedParameters(model).values()) p.tensor = empty(p.memoryShape, { device, dtype });
  scope(() => {
    const conditioning = {
      context: empty([2, 77, config.cross_attention_dim], { device, dtype }),
      textEmbeds: empty([2, 1280], { device, dtype }),
      timeIds: empty([2, 6], { device }),
    };
    const sample = empty([2, 128, 128, 4], { device, dtype });
    /** Ops and launches of an image's second step. */
    const second = (times: Tensor | Schedule) => {
      const cache = new ContextCache();
      const step = () => noGrad(() => scope(() => void model(sample, times, { ...conditioning, cache })));
      step();
      launches = 0;
      ops.clear();
      step();
      cache.release();
      const counts = ['timestep_embedding', 'cast', 'silu', 'linear of the time', 'embedding'].map(
        (name) => ops.get(name) ?? 0,
      );
      return { counts, launches };
    };
    const each = second(empty([2], { device }));
    const kept = second({
      times: empty([30, 2], { device }),
      step: empty([1], { device, dtype: 'int32' }),
    });
    t.same(each.counts, [1, 1, 1, 2 + 17, 0], 'two layers of the embedding and one of each resnet');
    t.same(kept.counts, [0, 0, 0, 0, 17]);
    const saved = each.launches - kept.launches;
    t.ok(saved >= 1 + 1 + 1 + 2, `${saved} of ${each.launches} launches are saved`);
    t.notOk(ops.has('skip connection joined'));
  });
  unload(model);
  t.equal(device.memory.storages, 0, 'live tensors');
  t.end();
});

let seed = 0;
const normal = (shape: readonly number[], device: Device): Tensor => {
  const source = draws(5, 0, seed++, 'weights');
  return tensor(source.normals(sizeOf(shape)), shape, { device });
};

test('a resnet takes a skip connection as it takes the joined image, to the bit, with a 1x1 convolution past it or without', (t) => {
  for (const device of devices)
    for (const cout of [16, 24])
      for (const own of [16, 10]) {
        const block = resnet(24, cout, { groups: 4, eps: 1e-5 });
        const [x, skip] = [own, 24 - own].map((c) => normal([2, 5, 6, c], device));
        for (const p of namedParameters(block).values()) p.tensor = normal(p.memoryShape, device);
        noGrad(() =>
          scope(() => {
            const want = block(concat([x, skip], 3)).floats();
            t.same(block(x, { skip }).floats(), want, `${device.name}, ${own} of 24 to ${cout} channels`);
          }),
        );
        unload(block);
        for (const each of [x, skip]) each.release();
      }
  t.end();
});
