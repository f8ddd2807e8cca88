// Training IP-Adapters: gradients against diffusers (golden/ip_adapter_gradients.jsonl), what a new one is, what passes read of pictures,
// runs that resume bit for bit, what comes of them, and mistakes.
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { noGrad } from '../../engine/grad.ts';
import { unload } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { zeros } from '../../engine/tensor.ts';
import { preprocessClip, readPicture } from '../../io/image.ts';
import { parseVisionConfig, visionEncoder } from '../../models/ip_adapter/clip_vision.ts';
import { loadIPAdapter, readIPAdapter } from '../../models/ip_adapter/ip_adapter.ts';
import { locateImageEncoder } from '../../models/locate/locate_ip_adapter.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { crossAttentions } from '../../models/unet/unet.ts';
import { toDevice } from '../../models/vae/latents.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { prompted } from '../../train/controls/ip_adapter.ts';
import { openMaterials } from '../../train/materials.ts';
import { planOf } from '../../train/plan.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { frozenUNet, type Gradient, holdGradients } from '../support/beside_gradients.ts';
import { sdxl } from '../support/command_line.ts';
import { goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { configs, encoderConfig, writeEncoder, writeIPAdapter } from '../support/ip_adapter_golden.ts';
import {
  basic,
  control,
  controlled,
  pictures as data,
  device,
  drawn,
  folder,
  locate,
  model,
  resumes,
  run,
  sessionOf,
  silent,
} from '../support/small_runs.ts';

const encoder = writeEncoder(join(folder, 'image_encoder'));
const train = { target: 'ip_adapter' } as const;
const fresh = { image_encoder_path: encoder };
const ipRun = (
  output: string,
  ip_adapter: RunInput['ip_adapter'] = fresh,
  more: RunInput = {},
): RunInput => ({
  ...{ ...basic(output), train, ip_adapter },
  ...more,
});
const opened = async (input: RunInput) => openMaterials(resolveRun(input, 'run.ts', 'test'), locate, silent);

const golden = goldenLines<{ adapter: string; loss: number } | Gradient>('ip_adapter_gradients');
const gradients = golden.filter((each): each is Gradient => Array.isArray(each));

for (const gradientCheckpointing of [false, true])
  test(`the gradients are diffusers'${gradientCheckpointing ? ', checkpointed' : ''}`, (t) => {
    const before = device.memory.storages;
    for (const line of golden) {
      if (Array.isArray(line)) continue;
      const { adapter: name, loss } = line;
      const config = configs[name];
      const net = loadIPAdapter(
        writeIPAdapter(join(folder, `${name}.safetensors`), name),
        config,
        device,
        'float32',
      );
      const own = {
        ipAdapter: [{ config, module: net, encoder: visionEncoder(parseVisionConfig(encoderConfig)) }],
      };
      const read = () => new Float32Array(0);
      const beside = {
        ...{ name, loss, net, pipeline: () => own },
        control: prompted(resolveRun(ipRun('gradients'), 'test', 'test'), own as unknown as Pipeline, read),
        inputs: (made: (key: string, ...shape: number[]) => ReturnType<typeof zeros>) => ({
          image_embeds: made('image_embeds', ...(config.resampler ? [2, 17, 48] : [2, 40])),
        }),
      };
      holdGradients(t, gradients, beside, frozenUNet({ gradientCheckpointing }));
    }
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });

test("a new one has torch's beginning, and the prompt's keys and values", async (t) => {
  const unet = frozenUNet();
  for (const image_projection of ['ImageProjModel', 'Resampler'] as const) {
    const { task, release } = await sessionOf(await opened(ipRun('new', { ...fresh, image_projection })));
    const [{ name, parameters }] = task.components;
    t.equal(name, 'ip_adapter');
    const values = (key: string) => scope(() => parameters.get(key)?.tensor.floats() ?? new Float32Array(0));
    crossAttentions(unet).forEach(({ children: { to_k, to_v } }, i) => {
      for (const [of, { children }] of Object.entries({ k: to_k, v: to_v }))
        t.equal(
          maxDifference(
            values(`ip_adapter.${2 * i + 1}.to_${of}_ip.weight`),
            scope(() => children.weight.tensor.floats()),
          ),
          0,
        );
    });
    const spread = (key: string) =>
      Math.sqrt(values(key).reduce((sum, x) => sum + x * x, 0) / values(key).length);
    for (const [key, { shape, size }] of parameters) {
      if (key.startsWith('ip_adapter.')) continue;
      const weight = parameters.get(key.replace(/bias$/, 'weight'));
      const [rows] = weight?.shape ?? [1];
      const isNorm = weight?.shape.length === 1;
      // A uniform spread within 1 / sqrt(fan in), or numbers that are 1 long together.
      const wanted = isNorm
        ? Number(key.endsWith('weight'))
        : key.endsWith('latents')
          ? 1 / Math.sqrt(shape[2])
          : Math.sqrt(rows / (weight?.size ?? 1) / 3);
      t.ok(
        Math.abs(spread(key) - wanted) <= wanted * (isNorm ? 0 : 2 / Math.sqrt(size)),
        `${key}: ${spread(key)}`,
      );
    }
    const shapes = Object.fromEntries([...parameters].map(([key, p]) => [key, p.shape]));
    t.match(
      shapes,
      image_projection === 'Resampler'
        ? { 'image_proj.latents': [1, 16, 48], 'image_proj.layers.3.0.to_kv.weight': [128, 48] }
        : { 'image_proj.proj.weight': [4 * 80, 40] },
    );
    release();
    const { trained_parameters } = planOf(await opened(ipRun('planned', { ...fresh, image_projection })));
    t.equal(
      trained_parameters,
      [...parameters.values()].reduce((sum, { size }) => sum + size, 0),
    );
  }
});

test('passes read what the encoder says of whole pictures, and of some zeros', async (t) => {
  const module = visionEncoder(parseVisionConfig(encoderConfig));
  (await locateImageEncoder(folder)).load('image_encoder', module, device, 'float32');
  for (const image_projection of ['ImageProjModel', 'Resampler'] as const) {
    const wanted = image_projection === 'Resampler' ? 'penultimate' : 'image_embeds';
    const ip_adapter = { ...fresh, image_projection, zeros_image_embeddings_prob: 0.4 };
    const { task, pictures, release } = await sessionOf(await opened(ipRun('read', ip_adapter)));
    const said = async (i: number) => {
      const picture = await readPicture(join(data, pictures.samples[i].id));
      return noGrad(() =>
        scope(() => module(toDevice(preprocessClip(picture, 56), device, 'float32'), wanted).floats()),
      );
    };
    const none =
      wanted === 'image_embeds'
        ? new Float32Array(40)
        : noGrad(() => scope(() => module(zeros([1, 56, 56, 3], { device }), wanted).floats()));
    let left = 0;
    for (let epoch = 0; epoch < 8; epoch++) {
      const samples = [0, 1, 2, 3, 4, 5];
      const { image_embeds } = await task.prepare({ bucket: 0, samples }, epoch);
      t.same(image_embeds.shape, task.blank({ bucket: 0, samples }).image_embeds.shape);
      const length = image_embeds.values.length / 6;
      for (const i of samples) {
        const own = image_embeds.values.slice(i * length, (i + 1) * length) as Float32Array;
        const isNone = maxDifference(own, none) < 3e-6;
        if (isNone) left++;
        else t.ok(maxDifference(own, await said(i)) < 3e-6, `${pictures.samples[i].id}`);
      }
    }
    t.ok(left > 8 && left < 32, `${left} of 48 are left away`);
    release();
  }
  unload(module);
});

test('runs resume bit for bit, and sdxl sample and the next run take what they made', async (t) => {
  const before = device.memory.storages;
  const image = join(controlled, '0.conditioning_image.png');
  const previews: RunInput['previews'] = {
    ...{ prompts: ['stripes'], validation_image: [image, join(controlled, '1.conditioning_image.png')] },
    ...{ num_inference_steps: 1, every_steps: 1 },
  };
  const final = await resumes(t, 'ip', {
    train: { ...train, gradient_checkpointing: true },
    ip_adapter: { ...fresh, zeros_image_embeddings_prob: 0.3 },
    ...{ previews, validation: { samples: 2 } },
  });
  t.equal(device.memory.storages, before, 'live tensors');
  t.same(readdirSync(final).sort(), ['image_encoder', 'ip_adapter.safetensors', 'run.json']);
  t.same(readdirSync(join(final, 'image_encoder')), readdirSync(encoder));
  const sheet = join(folder, 'ip-whole', 'previews', 'step-00000001');
  t.notOk(readFileSync(join(sheet, '0.png')).equals(readFileSync(join(sheet, '1.png'))));

  const free = await drawn(t, 'free');
  t.notOk(free.equals(await drawn(t, 'by', '--ip-adapter', final, '--ip-adapter-image', image)));
  const still = { optimizer: { lr: 0 }, ema: { decay: 0 } };
  const next = await run(ipRun('next', { pretrained_ip_adapter_path: final }, { ...still, steps: 1 }));
  const weights = (path: string) => readFileSync(join(path, 'ip_adapter.safetensors'));
  t.ok(weights(next.folder).equals(weights(final)), 'a run without a learning rate leaves it as it was');

  const checkpoint = listCheckpoints(join(folder, 'ip-whole')).at(-1) as string;
  const { status, err } = await sdxl('export', checkpoint, join(folder, 'exported'));
  t.equal(status, 2);
  t.match(err, /is an IP-Adapter's, which .* read as it is: take .*ip_adapter.safetensors, or its averages/);
});

test('one with a Resampler goes on from a file, beside the UNet in 8-bit integers', async (t) => {
  const begun = join(folder, 'begun');
  writeEncoder(join(begun, 'image_encoder'));
  const pretrained_ip_adapter_path = writeIPAdapter(join(begun, 'plus.safetensors'), 'plus');
  const q8 = { train: { ...train, q8: true, gradient_checkpointing: true } };
  const final = await resumes(t, 'plus', { ...q8, ip_adapter: { pretrained_ip_adapter_path } });
  const [before, after] = [pretrained_ip_adapter_path, join(final, 'ip_adapter.safetensors')];
  t.same(readIPAdapter(after), readIPAdapter(before));
  t.notOk(readFileSync(after).equals(readFileSync(before)));
});

test('what a run may not say', async (t) => {
  const refuses = async (what: string, input: RunInput, message: RegExp) => {
    const opening = async () => (await sessionOf(await opened(input))).release();
    await t.rejects(opening(), { name: 'UserError', message }, what);
  };
  const { dataset } = basic('');
  const narrow = writeIPAdapter(join(folder, 'narrow.safetensors'), 'plain', { cross_attention_dim: 40 });
  const other = writeIPAdapter(join(folder, 'other.safetensors'), 'plain', { inputs: 48 });
  for (const [what, ip_adapter, more, message] of [
    [
      'a refiner',
      fresh,
      { model: join(goldenFolder, 'tiny-sdxl-refiner'), dataset: { ...dataset, resolution: 64 } },
      /is a refiner, which takes no IP-Adapter; train one for the base/,
    ],
    ['no encoder', {}, {}, /"ip_adapter\.image_encoder_path" is empty; name the vision encoder/],
    [
      'nowhere',
      { image_encoder_path: join(folder, 'x', 'y') },
      {},
      /no image encoder at .*y; give the folder of a CLIPV/,
    ],
    ['no config', { image_encoder_path: controlled }, {}, /controlled has no image encoder; give the folder/],
    [
      'a kind',
      { image_encoder_path: join(model, 'unet') },
      {},
      /holds a UNet2DConditionModel, not an image encoder/,
    ],
    [
      'a width',
      { pretrained_ip_adapter_path: narrow },
      {},
      /makes tokens of width 40 and the UNet attends to 80/,
    ],
    [
      'of another encoder',
      { pretrained_ip_adapter_path: other },
      {},
      /other\.safetensors reads 48 numbers .* gives 40/,
    ],
    [
      'two beginnings',
      { ...fresh, pretrained_ip_adapter_path: 'x' },
      {},
      /"ip_adapter\.image_encoder_path" is for a new IP-Adapter, and the one of .* has its own/,
    ],
    [
      'two kinds',
      { pretrained_ip_adapter_path: 'x', image_projection: 'Resampler' },
      {},
      /"ip_adapter\.image_projection" is for a new IP-Adapter/,
    ],
    [
      'for another target',
      fresh,
      { train: { target: 'lora' } },
      /"ip_adapter\.image_encoder_path" is of an IP-Adapter, and "train\.target" is "lora"; leave it out, or set "train\.target" to "ip_adapter"/,
    ],
    [
      'conditioning images',
      fresh,
      { dataset: control.dataset && { ...dataset, conditioning_image_column: 'x' } },
      /target "ip_adapter" does not train, masks/,
    ],
    [
      'previews of nothing',
      fresh,
      { previews: { prompts: ['a'] } },
      /"previews\.prompts" has 1 and "previews\.validation_image" 0/,
    ],
    [
      'masks',
      fresh,
      { objective: { masked_loss: true } },
      /"objective\.masked_loss" is for the targets .* is "ip_adapter"/,
    ],
  ] as const)
    await refuses(what, ipRun('unfit', ip_adapter as RunInput['ip_adapter'], more as RunInput), message);
});
