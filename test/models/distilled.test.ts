// UNets as segmind's SSD-1B and Segmind-Vega, whose transformers have depths of their own and whose middle blocks lack attention, and one that
// has no middle block, against diffusers (golden/distilled.py): gradients, whole calls, files that tell what they are, training, and what
// they refuse.
import { copyFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { backward, clearGrad, gradOf, requireGrad } from '../../engine/grad.ts';
import { namedParameters, parameterCount, unload } from '../../engine/module.ts';
import { mse } from '../../engine/ops/loss.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { preprocessControl } from '../../io/image.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { type ModelSource, openComponent, openModel } from '../../models/checkpoint/checkpoint.ts';
import { controlnet, parseControlNetConfig } from '../../models/control/controlnet.ts';
import { componentConfigs } from '../../models/formats/diffusers_config.ts';
import { presets } from '../../models/formats/presets.ts';
import { openSingleFile } from '../../models/formats/singlefile.ts';
import { openUNetFile } from '../../models/formats/unet_file.ts';
import { toldIn } from '../../models/formats/unet_told.ts';
import { openIPAdapter } from '../../models/ip_adapter/ip_adapter.ts';
import type { LoadOptions } from '../../models/load_options.ts';
import { denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import { parseUNetConfig, unet } from '../../models/unet/unet.ts';
import { unetKeyInSgm } from '../../models/unet/unet_keys.ts';
import { toDevice } from '../../models/vae/latents.ts';
import { planOf } from '../../train/plan.ts';
import type { RunInput } from '../../train/run/run.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { configOf, numbers, picture, writeComponent } from '../support/controlnet_golden.ts';
import {
  type Called,
  calls,
  jsonOf,
  type Recorded,
  recorded,
  type Shape,
  shapesOf,
  writeDistilled,
  writeLora,
} from '../support/distilled_golden.ts';
import { allClose, maxDifference, permuted } from '../support/golden.ts';
import { writeEncoder, writeIPAdapter } from '../support/ip_adapter_golden.ts';
import { relativeError } from '../support/op_cases.ts';
import { basic, control, device, folder, model, opened, run, sessionOf } from '../support/small_runs.ts';
import { writeT2IAdapter } from '../support/t2i_adapter_golden.ts';

const at = (name: string): string => join(folder, name);
const folders = Object.fromEntries(
  recorded.map(({ unet }) => [unet, writeDistilled(at(unet), unet)]),
) as Record<Shape, string>;

function holdGradients(t: Test, { unet: name, loss: wanted, noise, gradients }: Recorded): void {
  const net = unet(parseUNetConfig(jsonOf(name)), { gradientCheckpointing: name === 'ssd' });
  openModel(folders[name]).load('unet', net, device, 'float32');
  const parameters = namedParameters(net);
  for (const { tensor: weight } of parameters.values()) requireGrad(weight);
  const made = (key: string, ...shape: number[]) =>
    tensor(numbers(`${name}.${key}`, shape), shape, { device });
  const latents = (key: string) =>
    toDevice({ shape: [2, 4, 8, 12], data: numbers(`${name}.${key}`, [2, 4, 8, 12]) }, device, 'float32');
  scope(() => {
    const conditioning = {
      ...{ context: made('context', 2, 77, 80), textEmbeds: made('text_embeds', 2, 40) },
      timeIds: tensor([64, 96, 0, 0, 64, 96, 80, 100, 8, 2, 64, 96], [2, 6], { device }),
    };
    const said = net(latents('sample'), tensor([7, 803], [2], { device }), conditioning);
    const loss = mse(said, latents('target'));
    const [got] = loss.floats();
    t.ok(Math.abs(got / wanted - 1) < 3e-6, `${name}: the loss ${got}, diffusers' ${wanted}`);
    backward(loss);
  });
  const sums = new Map<string, [square: number, sum: number]>();
  for (const [key, { tensor: weight, layout, memoryShape }] of parameters) {
    const values = scope(() => gradOf(weight)?.floats() ?? new Float32Array());
    const laid = layout === 'conv' ? permuted(values, memoryShape, [0, 3, 1, 2]) : values;
    const factors = numbers(key, [laid.length]);
    const part = key
      .split('.')
      .slice(0, key.includes('_blocks') ? 4 : 1)
      .join('.');
    const [square, sum] = sums.get(part) ?? [0, 0];
    const add = (of: (x: number, i: number) => number) => laid.reduce((total, x, i) => total + of(x, i), 0);
    sums.set(part, [square + add((x) => x * x), sum + add((x, i) => x * factors[i])]);
    clearGrad(weight);
  }
  t.same(
    [...sums.keys()].sort(),
    Object.keys(gradients).sort(),
    `${name}: all that diffusers has, and no more`,
  );
  for (const [part, [norm, sum]] of Object.entries(gradients)) {
    const [square, own] = sums.get(part) ?? [0, 0];
    const error = Math.max(Math.abs(Math.sqrt(square) - norm), Math.abs(own - sum)) / norm;
    t.ok(error < 10 * noise, `${name}: ${part} is ${error} off`);
  }
  unload(net);
}

test("gradients are diffusers'", (t) => {
  const before = device.memory.storages;
  t.equal(recorded.length, 3);
  for (const each of recorded) holdGradients(t, each);
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

const kohya = (layer: string, part: 'A' | 'B') =>
  `${layer.replaceAll('.', '_')}.lora_${part === 'A' ? 'down' : 'up'}.weight`;
const inSgm = (layer: string) =>
  unetKeyInSgm(`${layer}.weight`, parseUNetConfig(jsonOf('ssd'))).replace(/\.weight$/, '');
const loras = [
  writeLora(at('diffusers.safetensors'), (layer, part) => `unet.${layer}.lora_${part}.weight`),
  writeLora(at('kohya.safetensors'), (layer, part) => `lora_unet_${kohya(inSgm(layer), part)}`),
  writeLora(at('flat.safetensors'), (layer, part) => `lora_unet_${kohya(layer, part)}`),
];

/** Of the attentions over the prompt in ssd's UNet: on the way down, on the way up. */
const widths = [24, 24, 24, ...Array(10).fill(32), ...Array(4).fill(24)];

/** A ControlNet whose half is that of ssd's UNet. */
function writeNet(path: string): string {
  const { mid_block_type, transformer_layers_per_block } = jsonOf('ssd');
  const json = { ...configOf('full'), mid_block_type, transformer_layers_per_block };
  return writeComponent(path, 'full', json, shapesOf(controlnet(parseControlNetConfig(json, 'full'))));
}

/** What a kind of call has beside the model. */
const beside: Record<string, () => { options?: Partial<LoadOptions>; asked?: Partial<Asked> }> = {
  controlled: () => ({
    options: { controlnet: [openComponent(writeNet(at('full')))] },
    asked: { control_image: [preprocessControl(picture(1, 64, 64))] },
  }),
  adapted: () => ({
    options: {
      ipAdapter: [
        openIPAdapter(
          writeIPAdapter(at('plain.safetensors'), 'plain', { widths }),
          writeEncoder(at('encoder')),
        ),
      ],
    },
    asked: { ip_adapter_image: [picture(1, 117, 149)], ip_adapter_scale: 0.7 },
  }),
  t2i_adapter: () => ({
    options: { adapter: [openComponent(writeT2IAdapter(at('edges'), 'edges'))] },
    asked: { adapter_image: [picture(1, 64, 64)] },
  }),
};

async function latentsOf(
  source: ModelSource,
  { kind, settings: { scheduler, ...settings }, seed }: Called,
  more: Partial<LoadOptions> = {},
): Promise<Float32Array> {
  const { options, asked } = beside[kind]?.() ?? {};
  const pipeline = loadPipeline(source, { device, dtype: 'float32', ...options, ...more });
  const { latents } = await denoiseToEnd(pipeline, {
    ...{ prompt: '', width: 64, height: 64, ...settings, ...asked },
    scheduler: { name: scheduler },
    generators: [new TorchGenerator(seed)],
  });
  pipeline.release();
  return latents.data;
}

test("whole calls are diffusers'", async (t) => {
  const before = device.memory.storages;
  t.equal(calls.length, 10);
  for (const call of calls)
    for (const path of call.kind === 'lora' ? loras : [undefined]) {
      const lora = path ? [{ path, scale: 1 }] : [];
      const got = await latentsOf(openModel(folders[call.unet]), call, { lora });
      const want = decodeFloats(Buffer.from(call.values, 'base64'), 'float32');
      const label = `${call.unet} ${call.kind} ${JSON.stringify(call.settings)} ${path ?? ''}`;
      allClose(
        t,
        label,
        got.filter((_, i) => i % 7 === 0),
        want,
        { atol: call.atol, rtol: 0 },
      );
    }
  t.equal(device.memory.storages, before, 'live tensors');
});

/** That a model's UNet has the weights of a shape, and is told so in the words of its config. */
function holdShape(t: Test, source: ModelSource, name: Shape, label: string): void {
  const [own, want] = [source.config('unet'), jsonOf(name)].map((json) =>
    shapesOf(unet(parseUNetConfig(json))),
  );
  t.same(own, want, label);
  if (name === 'ssd') t.match(source.config('unet'), recorded[0].config, 'as its publishers tell it');
}

const first = { ...calls[0], settings: { ...calls[0].settings, num_inference_steps: 1 } };

test('files tell by their tensors what they are, whoever lends a config', async (t) => {
  const weights = join('unet', 'diffusion_pytorch_model.safetensors');
  const base = openModel(model);
  for (const { unet: name } of recorded) {
    const source = openModel(folders[name]);
    const want = await latentsOf(source, first);
    const [single, gguf, again] = [`${name}-one.safetensors`, `${name}.gguf`, `${name}-again`].map(at);
    for (const [path, ...flags] of [
      [single, '--format', 'single-file'],
      [gguf, '--format', 'gguf', '--type', 'f16', '--save-keys', 'unet'],
    ])
      t.match(await sdxl('export', folders[name], path, ...flags, '--quiet'), { status: 0 }, path);
    const file = openSingleFile(single, { configs: base });
    holdShape(t, file, name, "the original's keys");
    t.equal(maxDifference(await latentsOf(file, first), want), 0, 'and its weights');
    const kind = /original single file: SDXL base(, distilled)?\n/.exec((await sdxl('inspect', single)).out);
    t.equal(kind?.[1], name === 'deep' ? undefined : ', distilled');
    const back = await sdxl('export', single, again, '--configs', model, '--quiet');
    t.match(back, { status: 0 }, back.err);
    holdShape(t, openModel(again), name, 'and back');
    copyFileSync(join(folders[name], weights), at(`${name}.safetensors`));
    for (const path of [gguf, at(`${name}.safetensors`)]) holdShape(t, openUNetFile(path, base), name, path);
    for (const path of [folders[name], join(folders[name], 'unet')])
      t.match(await sdxl('inspect', path), { status: 0 }, path);
    copyFileSync(join(model, weights), at('sdxl.safetensors'));
    t.match(openUNetFile(at('sdxl.safetensors'), source).config('unet'), {
      transformer_layers_per_block: [name === 'bare' ? 0 : 1, [1, 1], [2, 2]],
      mid_block_type: 'UNetMidBlock2DCrossAttn',
    });
  }
  const rough = relativeError(
    await latentsOf(openModel(folders.bare), first, { q8: true }),
    await latentsOf(openModel(folders.bare), first),
  );
  t.ok(rough > 1e-4 && rough < 1e-3, `in 8-bit integers ${rough} off`);
});

test("the published models are told from SDXL's config by their tensors", (t) => {
  const base = componentConfigs(presets['sdxl-base']).unet;
  const mid_block_type = 'UNetMidBlock2D';
  // How many weights diffusers' UNets have of these configs, on torch's meta device.
  for (const [count, down, up] of [
    [1_331_334_404, [1, [2, 2], [4, 4]], [[4, 4, 10], [2, 1, 1], 1]],
    [745_225_604, [1, [1, 1], [2, 2]], [[2, 2, 2], [1, 1, 1], 1]],
  ] as const) {
    const told = {
      ...{ mid_block_type, transformer_layers_per_block: down },
      reverse_transformer_layers_per_block: up,
    };
    const config = parseUNetConfig({ ...base, ...told });
    const net = unet(config);
    t.equal(parameterCount(net), count);
    for (const original of [true, false]) {
      const prefix = original ? 'model.diffusion_model.' : '';
      const tensors = new Map(
        shapesOf(net).map(([key, shape]) => [
          prefix + (original ? unetKeyInSgm(key, config) : key),
          { shape },
        ]),
      );
      t.match(toldIn(tensors, { prefix, original }, base), told);
      t.same(toldIn(tensors, { prefix, original }, { ...base, ...told }), {}, 'nothing where it is known');
    }
  }
  t.end();
});

test('training', async (t) => {
  const before = device.memory.storages;
  const once: RunInput = { steps: 1, ema: { decay: 0 }, lr_scheduler: { name: 'constant' } };
  for (const name of ['ssd', 'bare'] as const) {
    const input = { ...basic(`${name}-unet`), ...once, model: folders[name] };
    const plan = planOf(await opened(input));
    t.equal(plan.trained_parameters, parameterCount(unet(parseUNetConfig(jsonOf(name)))));
    const tuned = await run(input);
    t.match(
      openComponent(join(tuned.folder, 'unet')).config('unet'),
      recorded.find((each) => each.unet === name)?.config,
    );
    t.match(await sdxl('inspect', join(tuned.folder, 'unet')), { status: 0 });
    // kohya's numbers stay: the blocks on the way up begin at 13.
    const block_lr = Array.from({ length: 23 }, (_, block) => (block < 13 ? 0 : 1e-3));
    const lora = await run({
      ...{ ...basic(`${name}-lora`), ...once, model: folders[name], train: { target: 'lora' } },
      ...{ lora: { rank: 2 }, optimizer: { lr: 1e-3, block_lr } },
    });
    const file = join(lora.folder, 'pytorch_lora_weights.safetensors');
    const { tensors, close } = openSafetensors(file);
    t.ok(
      [...tensors.keys()].every((key) => key.startsWith('unet.up_blocks.')),
      'blocks whose rate is 0 have none',
    );
    close();
    const drawn = await latentsOf(openModel(folders[name]), first, { lora: [{ path: file }] });
    t.ok(maxDifference(drawn, await latentsOf(openModel(folders[name]), first)) > 0);
  }
  const input = { ...basic('ssd-controlnet'), ...control, model: folders.ssd, controlnet: {} };
  const session = await sessionOf(await opened(input));
  const keys = [...session.task.components[0].parameters.keys()].filter((key) =>
    key.startsWith('mid_block.'),
  );
  t.ok(
    keys.length > 0 && keys.every((key) => key.startsWith('mid_block.resnets.0.')),
    'a ControlNet copies the middle block',
  );
  session.release();
  t.equal(device.memory.storages, before, 'live tensors');
});

test('mistakes', async (t) => {
  const [ssd, bare] = [jsonOf('ssd'), jsonOf('bare')];
  const refused: [Record<string, unknown>, RegExp][] = [
    [
      { ...ssd, mid_block_type: 'UNetMidBlock2DSimpleCrossAttn' },
      /"mid_block_type" is "UNetMidBlock2DSimpleCrossAttn", not UNetMidBlock2DCrossAttn or UNetMidBlock2D or null; is this an SDXL UNet\?$/,
    ],
    [
      { ...ssd, transformer_layers_per_block: [1, [2], [1, 3]] },
      /"transformer_layers_per_block" is \[1,\[2\],\[1,3\]\], not a whole number from 0 to 100, a list of 3, or one with lists of 2 in it/,
    ],
    [{ ...ssd, transformer_layers_per_block: [1, [2, -1], 1] }, /"transformer_layers_per_block" is/],
    [
      { ...ssd, reverse_transformer_layers_per_block: null },
      /"reverse_transformer_layers_per_block" is null, not a list of 3 whole numbers from 0 to 100 or lists of 3, which lists in "transformer_layers_per_block" ask for/,
    ],
    [
      { ...bare, reverse_transformer_layers_per_block: [[2, 2], 1, 0] },
      /"reverse_transformer_layers_per_block" is \[\[2,2\],1,0\], not a list of 3 whole numbers from 0 to 100 or lists of 3; is/,
    ],
    [
      { ...bare, reverse_transformer_layers_per_block: 2 },
      /"reverse_transformer_layers_per_block" is 2, not a list/,
    ],
  ];
  for (const [json, message] of refused)
    t.throws(() => parseUNetConfig(json), { name: 'UserError', message });
  const sample = (...argv: string[]) =>
    sdxl(
      ...[
        'sample',
        '--prompt',
        'a fox',
        '--width',
        '64',
        '--height',
        '64',
        '--steps',
        '1',
        '--quiet',
        ...argv,
      ],
    );
  const others = writeLora(
    at('mid.safetensors'),
    (layer, part) => `unet.${layer.replace('resnets.0', 'resnets.1')}.lora_${part}.weight`,
  );
  await refusesEach(t, sample, [
    [
      ['--model', folders.ssd, '--pag-scale', '3'],
      /"mid" names no self-attention of this UNet: give a part of a name, as up or down_blocks\.1/,
    ],
    [
      ['--model', folders.ssd, '--lora', others],
      /match no weight of this model: unet\.mid_block\.resnets\.1/,
    ],
    [['--model', folders.bare, '--lora', loras[0]], /match no weight of this model: /],
    [['--model', folders.bare, '--cache-interval', '2', '--cache-branch-id', '9'], /branches are 0 to 8/],
  ]);
  const adapter = openIPAdapter(writeIPAdapter(at('base.safetensors'), 'plain'), writeEncoder(at('encoder')));
  t.throws(() => loadPipeline(openModel(folders.ssd), { device, dtype: 'float32', ipAdapter: [adapter] }), {
    message:
      /has ip_adapter\.5 of width 32 for a layer of the UNet of 24: take one that was made for this model/,
  });
  const training = { ...basic('bare-controlnet'), ...control, model: folders.bare };
  await t.rejects(async () => sessionOf(await opened(training)), {
    name: 'UserError',
    message: /the UNet has no middle block, which a new ControlNet is begun from/,
  });
  const rates = {
    ...basic('bare-rates'),
    model: folders.bare,
    optimizer: { block_lr: Array(20).fill(1e-4) },
  };
  await t.rejects(async () => sessionOf(await opened(rates)), {
    name: 'UserError',
    message: /block_lr has 20 rates, and the model's UNet 23 blocks/,
  });
});
