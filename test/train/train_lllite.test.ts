// Training ControlNet-LLLites: gradients against kohya's modules in diffusers' UNet (golden/lllite_gradients.jsonl), what a new one is, runs that
// resume bit for bit, what comes of them, and mistakes.
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { lllite, llliteConfig, openLLLite } from '../../models/control/lllite.ts';

import { locateControlNet } from '../../models/locate/locate.ts';
import { parseUNetConfig } from '../../models/unet/unet.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { controlled as followed } from '../../train/controls/controlnet.ts';

import { planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { frozenUNet, type Gradient, holdGradients, pixelShape } from '../support/beside_gradients.ts';
import { sdxl } from '../support/command_line.ts';
import { goldenLines } from '../support/golden.ts';
import { llliteKeys, writeLLLite } from '../support/lllite_golden.ts';
import {
  basic,
  control,
  controlled,
  device,
  drawn,
  folder,
  model,
  opened,
  resumes,
  run,
  sessionOf,
} from '../support/small_runs.ts';

const dims = { network_dim: 12, cond_emb_dim: 8 };
const unetConfig = parseUNetConfig(openModel(model).config('unet'));
const lite = (more: RunInput['controlnet'] = dims): RunInput => ({ ...control, controlnet: more });

const golden = goldenLines<{ lllite: string; loss: number; noise: number } | Gradient>('lllite_gradients');
const gradients = golden.filter((each): each is Gradient => Array.isArray(each));

for (const gradientCheckpointing of [false, true])
  test(`the gradients are kohya's${gradientCheckpointing ? ', checkpointed' : ''}`, (t) => {
    const before = device.memory.storages;
    const [{ loss, noise }] = golden as { loss: number; noise: number }[];
    const source = openLLLite(writeLLLite(join(folder, 'edges.safetensors'), 'edges'));
    const net = lllite(llliteConfig(source));
    source.load('controlnet', net, device, 'float32');
    const beside = {
      ...{ name: 'edges', loss, noise, net },
      pipeline: () => ({ controlnet: [net], unetConfig }),
      control: followed(resolveRun({ ...basic('gradients'), ...lite() }, 'test', 'test')),
      inputs: (_: unknown, pictures: Float32Array) => ({
        conditioning_pixel_values: tensor(pictures, pixelShape, { device }),
      }),
    };
    holdGradients(t, gradients, beside, frozenUNet({ gradientCheckpointing }));
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });

test("a new one has kohya's layers, and begins as his", async (t) => {
  const { task, release } = await sessionOf(await opened({ ...basic('new'), ...lite() }));
  const [{ name, parameters }] = task.components;
  t.equal(name, 'controlnet');
  const shapes = [...parameters].map(([key, { shape }]) => [key, shape] as const);
  t.same(Object.fromEntries(shapes), llliteKeys.edges);
  for (const [key, p] of parameters) {
    const weight = parameters.get(key.replace('bias', 'weight'));
    // Of few numbers the largest may be small.
    const least = p.size > 50 ? 0.5 : 0;
    const bound = 1 / Math.sqrt((weight?.size ?? 0) / (weight?.shape[0] ?? 1));
    const most = scope(() => p.tensor.floats()).reduce((max, x) => Math.max(max, Math.abs(x)), 0);
    if (key.endsWith('.up.0.weight')) t.equal(most, 0, key);
    else t.ok(most <= bound && most > least * bound, `${key} lies within ${bound}`);
  }
  release();
  const { trained_parameters } = planOf(await opened({ ...basic('planned'), ...lite() }));
  t.equal(
    trained_parameters,
    [...parameters.values()].reduce((sum, { size }) => sum + size, 0),
  );
});

test('runs resume bit for bit, and sdxl sample and the next run take what they made', async (t) => {
  const before = device.memory.storages;
  const image = join(controlled, '0.conditioning_image.png');
  const final = await resumes(t, 'lllite', {
    ...{ ...lite(), train: { target: 'controlnet', gradient_checkpointing: true } },
    previews: { prompts: ['stripes'], validation_image: [image], num_inference_steps: 1, every_steps: 1 },
  });
  t.equal(device.memory.storages, before, 'live tensors');
  t.same(readdirSync(final).sort(), ['lllite.safetensors', 'run.json']);
  const free = await drawn(t, 'free');
  t.notOk(free.equals(await drawn(t, 'under', '--controlnet', `${final}:50`, '--control-image', image)));
  const checkpoint = listCheckpoints(join(folder, 'lllite-whole')).at(-1) as string;
  await drawn(t, 'under-checkpoint', '--controlnet', checkpoint, '--control-image', image);
  await t.rejects(locateControlNet(join(folder, 'lllite-whole')), /is the folder of a run; give .*final$/);
  const { status, err } = await sdxl('export', checkpoint, join(folder, 'exported'));
  t.equal(status, 2, err);
  t.match(err, /is a ControlNet-LLLite's, .* take .*controlnet\/lllite\.safetensors/);

  const given = lite({ controlnet_model_name_or_path: final });
  const next = await run({ ...basic('next'), ...given, steps: 1, optimizer: { lr: 0 }, ema: { decay: 0 } });
  const file = (of: string) => readFileSync(join(of, 'lllite.safetensors'));
  t.ok(file(next.folder).equals(file(final)), 'a run without a learning rate leaves it as it was');
});

test('mistakes', (t) => {
  for (const [keys, want] of [
    [{ cond_emb_dim: 8 }, /"controlnet\.cond_emb_dim" is for a new ControlNet-LLLite/],
    [{ ...dims, transformer_layers_per_block: [0, 1, 1] }, /which has no transformer blocks/],
    [
      { ...dims, controlnet_model_name_or_path: 'x' },
      /"controlnet\.network_dim" is for a new ControlNet, and/,
    ],
  ] as const)
    t.throws(() => resolveRun({ ...basic('mistaken'), ...lite(keys) }, 'run.ts', 'test'), want);
  t.end();
});
