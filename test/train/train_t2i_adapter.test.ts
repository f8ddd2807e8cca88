// Training T2I-Adapters: gradients against diffusers (golden/t2i_adapter_gradients.jsonl), what a new one is, runs that resume bit for bit,
// what comes of them, and mistakes.
import { readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { openComponent, openWeights } from '../../models/checkpoint/checkpoint.ts';
import { t2iAdapter, t2iAdapterConfig } from '../../models/control/t2i_adapter.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { adapted } from '../../train/controls/t2i_adapter.ts';
import { openMaterials } from '../../train/materials.ts';
import { planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { frozenUNet, type Gradient, holdGradients, pixelShape } from '../support/beside_gradients.ts';
import { sdxl } from '../support/command_line.ts';
import { goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import {
  basic,
  control,
  controlled,
  device,
  digest,
  drawn,
  folder,
  locate,
  model,
  resumes,
  run,
  sessionOf,
  silent,
} from '../support/small_runs.ts';
import { t2iAdapters, writeT2IAdapter } from '../support/t2i_adapter_golden.ts';

const adapter: RunInput = { train: { target: 't2i_adapter' }, dataset: control.dataset };
const adapterRun = (output: string, more: RunInput = {}): RunInput => ({
  ...basic(output),
  ...adapter,
  ...more,
});
const opened = async (input: RunInput) => openMaterials(resolveRun(input, 'run.ts', 'test'), locate, silent);
const given = (adapter_model_name_or_path: string): RunInput => ({
  t2i_adapter: { adapter_model_name_or_path },
});

const golden = goldenLines<{ adapter: string; loss: number } | Gradient>('t2i_adapter_gradients');
const gradients = golden.filter((each): each is Gradient => Array.isArray(each));

for (const gradientCheckpointing of [false, true])
  test(`the gradients are diffusers'${gradientCheckpointing ? ', checkpointed' : ''}`, (t) => {
    const before = device.memory.storages;
    for (const line of golden) {
      if (Array.isArray(line)) continue;
      const { adapter: name, loss } = line;
      const source = openComponent(writeT2IAdapter(join(folder, name), name));
      const config = t2iAdapterConfig(source);
      const net = t2iAdapter(config);
      source.load('adapter', net, device, 'float32');
      const own = { adapter: [{ config, module: net }] };
      const beside = {
        ...{ name, loss, net, pipeline: () => own },
        control: adapted(resolveRun(adapterRun('gradients'), 'test', 'test'), own as unknown as Pipeline),
        inputs: (_: unknown, pictures: Float32Array) => {
          const seen = config.in_channels === 3 ? pictures : pictures.filter((_, i) => i % 3 === 1);
          const shape = [...pixelShape.slice(0, 3), config.in_channels];
          return { conditioning_pixel_values: tensor(seen, shape, { device }) };
        },
      };
      holdGradients(t, gradients, beside, frozenUNet({ gradientCheckpointing }));
    }
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });

test("a new one has the published ones' shape, scaled to the model, and torch's beginning", async (t) => {
  const { task, release } = await sessionOf(await opened(adapterRun('new')));
  const [{ name, config, parameters }] = task.components;
  t.equal(name, 'adapter');
  const edges = t2iAdapters[0];
  t.same(
    Object.fromEntries([...parameters].map(([key, { shape }]) => [key, shape])),
    edges.keys,
    "as diffusers' of such widths",
  );
  t.same({ ...config, _diffusers_version: edges.config._diffusers_version }, edges.config);
  for (const [key, p] of parameters) {
    const weight = parameters.get(key.replace('bias', 'weight'));
    const bound = 1 / Math.sqrt((weight?.size ?? 0) / (weight?.shape[0] ?? 1));
    const values = scope(() => p.tensor.floats());
    const most = values.reduce((max, x) => Math.max(max, Math.abs(x)), 0);
    t.ok(most <= bound && most > bound / 2, `${key} lies within ${bound}`);
  }
  release();
  const { trained_parameters } = planOf(await opened(adapterRun('planned')));
  t.equal(
    trained_parameters,
    [...parameters.values()].reduce((sum, { size }) => sum + size, 0),
  );
});

test('runs resume bit for bit, and sdxl sample and the next run take what they made', async (t) => {
  const before = device.memory.storages;
  const image = join(controlled, '0.conditioning_image.png');
  const previews: RunInput['previews'] = {
    ...{ prompts: ['stripes'], validation_image: [image, join(controlled, '1.conditioning_image.png')] },
    ...{ num_inference_steps: 1, every_steps: 1 },
  };
  const final = await resumes(t, 'adapter', {
    ...{ train: { target: 't2i_adapter', gradient_checkpointing: true }, dataset: control.dataset, previews },
    ...{ validation: { samples: 2 }, objective: { timesteps: 'cubic' } },
  });
  t.equal(device.memory.storages, before, 'live tensors');
  t.same(readdirSync(final).sort(), ['config.json', 'diffusion_pytorch_model.safetensors', 'run.json']);
  const pictures = join(folder, 'adapter-whole', 'previews', 'step-00000001');
  t.same(readdirSync(pictures), ['0.png', '1.png']);
  t.notOk(readFileSync(join(pictures, '0.png')).equals(readFileSync(join(pictures, '1.png'))));

  const free = await drawn(t, 'free');
  t.notOk(free.equals(await drawn(t, 'under', '--adapter', `${final}:50`, '--adapter-image', image)));
  const checkpoint = listCheckpoints(join(folder, 'adapter-whole')).at(-1) as string;
  await drawn(t, 'under-checkpoint', '--adapter', checkpoint, '--adapter-image', image);

  const more = { ...given(final), steps: 1, optimizer: { lr: 0 }, ema: { decay: 0 } };
  const next = await run(adapterRun('next', more));
  for (const name of ['diffusion_pytorch_model.safetensors', 'config.json'])
    t.ok(
      readFileSync(join(next.folder, name)).equals(readFileSync(join(final, name))),
      `${name}: a run without a learning rate leaves it as it was`,
    );
  const { status, err } = await sdxl('export', checkpoint, join(folder, 'exported'));
  t.equal(status, 2);
  t.match(err, /is a T2I-Adapter's, which diffusers and sdxl sample --adapter read as it is: take .*adapter/);
});

test('a run that went on with a T2I-Adapter of grey levels resumes without it', async (t) => {
  const sketch = writeT2IAdapter(join(folder, 'begun'), 'sketch');
  const more = { ...given(sketch), steps: 2 };
  const shownTo = async (input: RunInput) => {
    const { task, release } = await sessionOf(await opened(input));
    const [{ conditioning_pixel_values: seen }, blank] = [
      await task.prepare({ bucket: 0, samples: [0, 3] }, 0),
      task.blank({ bucket: 0, samples: [0, 3] }),
    ];
    t.same(blank.conditioning_pixel_values.shape, seen.shape);
    release();
    return seen;
  };
  const [colours, grey] = [await shownTo(adapterRun('colours')), await shownTo(adapterRun('grey', more))];
  t.same(grey.shape, [2, 32, 32, 1]);
  const byte = (i: number) => Math.round(255 * colours.values[i]);
  const pillows = grey.values.map((_, i) => {
    const [r, g, b] = [byte(3 * i), byte(3 * i + 1), byte(3 * i + 2)];
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16) / 255;
  });
  t.equal(maxDifference(grey.values as Float32Array, pillows as Float32Array), 0, "Pillow's grey");
  t.ok(new Set(grey.values).size > 20);

  const whole = await run(adapterRun('on-whole', more));
  const { folder: checkpoint } = await run(adapterRun('on-broken', more), { until: 1 });
  rmSync(sketch, { recursive: true });
  const { folder: final } = await run(adapterRun('on-broken', more), { checkpoint });
  t.equal(digest(final), digest(whole.folder));
  const weights = openWeights(final);
  t.same(weights.info('adapter.conv_in.weight')?.shape, [16, 256, 3, 3]);
  weights.close();
});

test('what a run may not say', async (t) => {
  const refuses = async (what: string, input: RunInput, message: RegExp) => {
    const opening = async () => (await sessionOf(await opened(input))).release();
    await t.rejects(opening(), { name: 'UserError', message }, what);
  };
  const controlnet = { transformer_layers_per_block: [0, 0, 0] };
  const image = join(controlled, '0.conditioning_image.png');
  const preview = { prompt: 'a', width: 72, height: 64 };
  for (const [what, more, message] of [
    [
      'a refiner',
      {
        model: join(goldenFolder, 'tiny-sdxl-refiner'),
        dataset: { ...control.dataset, resolution: 64 },
      },
      /is a refiner, which takes no T2I-Adapter; train/,
    ],
    [
      'a size',
      given(writeT2IAdapter(join(folder, 'unfit'), 'edges', { downscale_factor: 8 })),
      /unfit gives features 16 wide at 1\/8, .* and the UNet takes 16 wide at 1\/16, /,
    ],
    ['a kind', given(join(model, 'unet')), /unet holds a UNet2DConditionModel, not a T2I-Adapter/],
    [
      'of a ControlNet',
      { controlnet },
      /"controlnet\.transformer_layers_per_block" is of a ControlNet, and "train\.target" is "t2i_adapter"/,
    ],
    [
      'for another target',
      { ...control, ...given('x') },
      /"t2i_adapter\.adapter_model_name_or_path" is of a T2I-Adapter, and "train\.target" is "controlnet"; leave it out, or set "train\.target" to "t2i_adapter"/,
    ],
    [
      'previews of nothing',
      { previews: { prompts: ['a'] } },
      /"previews\.prompts" has 1 and "previews\.validation_image" 0/,
    ],
    [
      'a preview of no squares',
      { previews: { prompts: [preview], validation_image: [image] } },
      /sees squares of 16x16 pixels, into which 72x64 does not divide/,
    ],
    [
      'masks',
      { objective: { masked_loss: true } },
      /"objective\.masked_loss" is for the targets .* is "t2i_adapter"/,
    ],
    [
      'text encoders',
      { train: { target: 't2i_adapter', text_encoders: true } },
      /target "t2i_adapter" does not/,
    ],
  ] as const)
    await refuses(what, adapterRun('unfit', more as RunInput), message);
});
