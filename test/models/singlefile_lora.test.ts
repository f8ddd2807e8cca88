// Published sizes, single-file checkpoints and LoRA files: the same weights under the original's keys are the
// same model, merged adapters give diffusers' outputs, and files that do not fit are refused with a sentence
// that names what does not.
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import {
  type AnyModule,
  module,
  namedParameters,
  type Parameter,
  parameter,
  parameterCount,
  unload,
} from '../../engine/module.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { type TensorEntry, writeSafetensors } from '../../io/safetensors.ts';
import { type ModelSource, openModel, openWeights } from '../../models/checkpoint/checkpoint.ts';
import { loadParameters } from '../../models/checkpoint/weights.ts';
import { clipBigG, clipL, sdxlBase, sdxlRefiner, sdxlVae } from '../../models/formats/presets.ts';
import { openSingleFile } from '../../models/formats/singlefile.ts';
import { mergeLora } from '../../models/lora/lora.ts';
import { parseTextConfig, textEncoder } from '../../models/text/clip.ts';
import { parseUNetConfig, unet } from '../../models/unet/unet.ts';
import { unetKeyInSgm } from '../../models/unet/unet_keys.ts';
import { parseVaeConfig, vae } from '../../models/vae/vae.ts';
import { allClose, goldenFolder, goldenLora, goldenSingleFile } from '../support/golden.ts';
import { refuses } from '../support/mistake.ts';

const device = openDevice('auto');
const golden = (name: string): string => join(goldenFolder, name);

test('the presets have the published models’ sizes', (t) => {
  t.equal(parameterCount(unet(sdxlBase)), 2_567_463_684, 'base UNet');
  t.equal(parameterCount(unet(sdxlRefiner)), 2_259_526_660, 'refiner UNet');
  t.equal(parameterCount(vae(sdxlVae).module), 83_653_863, 'VAE');
  t.equal(parameterCount(textEncoder(clipL)), 123_060_480, 'CLIP-L');
  t.equal(parameterCount(textEncoder(clipBigG)), 694_659_840, 'OpenCLIP bigG');
  t.end();
});

test('UNet keys in the original’s words', (t) => {
  const spelled: readonly (readonly [typeof sdxlBase | typeof sdxlRefiner, string, string])[] = [
    [sdxlBase, 'conv_in.bias', 'input_blocks.0.0.bias'],
    [sdxlBase, 'down_blocks.0.downsamplers.0.conv.bias', 'input_blocks.3.0.op.bias'],
    [sdxlBase, 'down_blocks.2.resnets.0.conv_shortcut.bias', 'input_blocks.7.0.skip_connection.bias'],
    [sdxlBase, 'mid_block.resnets.1.time_emb_proj.bias', 'middle_block.2.emb_layers.1.bias'],
    [sdxlBase, 'up_blocks.1.upsamplers.0.conv.bias', 'output_blocks.5.2.conv.bias'],
    [sdxlRefiner, 'up_blocks.0.upsamplers.0.conv.bias', 'output_blocks.2.1.conv.bias'],
    [sdxlRefiner, 'up_blocks.2.attentions.2.proj_in.bias', 'output_blocks.8.1.proj_in.bias'],
  ];
  for (const [config, key, want] of spelled) t.equal(unetKeyInSgm(key, config), want);
  for (const config of [sdxlBase, sdxlRefiner]) {
    const keys = [...namedParameters(unet(config)).keys()];
    t.equal(new Set(keys.map((key) => unetKeyInSgm(key, config))).size, keys.length, 'no two keys meet');
  }
  t.end();
});

/** Loads a component of `source` and hands its weights over as numbers, by name. */
function weightsOf(source: ModelSource, component: string): Map<string, Float32Array> {
  const config = source.config(component);
  const builders: Record<string, () => AnyModule> = {
    unet: () => unet(parseUNetConfig(config)),
    vae: () => vae(parseVaeConfig(config)).module,
    text_encoder: () => textEncoder(parseTextConfig(config)),
    text_encoder_2: () => textEncoder(parseTextConfig(config)),
  };
  const model = builders[component]();
  source.load(component, model, device, 'float32');
  const weights = new Map([...namedParameters(model)].map(([name, p]) => [name, p.tensor.floats()]));
  unload(model);
  return weights;
}

const bytesOf = (values: Float32Array | undefined): Buffer =>
  Buffer.from(values?.buffer ?? new ArrayBuffer(0), values?.byteOffset, values?.byteLength);

test('a single file is the same model as its folder', (t) => {
  const before = device.memory.storages;
  for (const folder of ['tiny-sdxl', 'tiny-sdxl-refiner']) {
    const whole = openModel(golden(folder));
    const single = openSingleFile(goldenSingleFile(folder), { configs: golden(folder) });
    for (const component of ['unet', 'vae', 'text_encoder', 'text_encoder_2']) {
      t.equal(single.has(component), whole.has(component), `${folder} has ${component}`);
      if (!whole.has(component)) continue;
      const want = weightsOf(whole, component);
      const got = weightsOf(single, component);
      const differing = [...want].filter(([name, values]) => !bytesOf(values).equals(bytesOf(got.get(name))));
      t.ok(
        want.size > 50 && differing.length === 0,
        `${folder} ${component}: ${differing.length} of ${want.size} differ`,
      );
    }
  }
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

test('files that are no SDXL checkpoint are refused', (t) => {
  refuses(
    t,
    'a LoRA',
    () => openSingleFile(goldenLora('lora/scaled_sgm.safetensors')),
    /not an SDXL checkpoint/,
  );
  refuses(t, 'other sizes', () => openSingleFile(goldenSingleFile('tiny-sdxl')), /16 channels/, /320/);
  refuses(t, 'no file', () => openSingleFile(golden('absent.safetensors')), /does not exist/);
  t.end();
});

test('a checkpoint that does not fit is one error that names everything', (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-checkpoint-'));
  t.teardown(() => rmSync(folder, { recursive: true }));
  const entry = (name: string, shape: number[], values: number[]): TensorEntry => {
    return { name, dtype: 'float32', shape, bytes: encodeNumbers(values, 'float32') };
  };
  const load = (name: string, entries: TensorEntry[]) => {
    const at = join(folder, name);
    mkdirSync(at);
    writeSafetensors(join(at, 'model.safetensors'), entries);
    const weights = openWeights(at);
    const model = module({ a: parameter([2]), b: parameter([2, 2]) }, () => undefined);
    try {
      loadParameters(model, weights, device, 'float32');
    } finally {
      weights.close();
      unload(model);
    }
  };
  const before = device.memory.storages;
  const wrong = [entry('b', [4], [1, 2, 3, 4]), entry('c', [1], [1])];
  refuses(t, 'three faults', () => load('wrong', wrong), /missing a/, /unexpected c/, /misshapen b is \[4\]/);
  const sick = [entry('a', [2], [1, Number.NaN]), entry('b', [2, 2], [1, 2, 3, 4])];
  refuses(t, 'NaN', () => load('nan', sick), /tensor a holds NaN/);
  const infinite = [entry('a', [2], [1, 2]), entry('b', [2, 2], [1, 2, 3, -Infinity])];
  refuses(t, 'infinity', () => load('inf', infinite), /tensor b holds NaN or infinity/);
  mkdirSync(join(folder, 'pickled'));
  writeFileSync(join(folder, 'pickled', 'pytorch_model.bin'), 'x');
  refuses(t, 'a pickle', () => openWeights(join(folder, 'pickled')), /pickle/, /safetensors/);
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

function tinyUNet(folder = 'tiny-sdxl') {
  const source = openModel(golden(folder));
  const unetConfig = parseUNetConfig(source.config('unet'));
  const model = unet(unetConfig);
  source.load('unet', model, device, 'float32');
  return { unet: model, unetConfig };
}

test('every spelling of a LoRA reaches its weight', (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-lora-'));
  t.teardown(() => rmSync(folder, { recursive: true }));
  const source = openModel(golden('tiny-sdxl'));
  const targets = {
    ...tinyUNet(),
    text_encoder: textEncoder(parseTextConfig(source.config('text_encoder'))),
    text_encoder_2: textEncoder(parseTextConfig(source.config('text_encoder_2'))),
  };
  for (const name of ['text_encoder', 'text_encoder_2'] as const)
    source.load(name, targets[name], device, 'float32');
  const ones = (name: string, shape: number[], value: number): TensorEntry => ({
    name,
    dtype: 'float32',
    shape,
    bytes: encodeNumbers(Array<number>(shape.reduce((a, b) => a * b, 1)).fill(value), 'float32'),
  });
  const attn = 'down_blocks.1.attentions.0.transformer_blocks.0.attn1';
  const layer = 'text_model.encoder.layers.1.self_attn.q_proj';
  const cases: readonly (readonly [AnyModule, string, string, string, number[], number[]])[] = [
    [
      targets.unet,
      `${attn}.to_q`,
      `unet.${attn}.to_q.lora_A.weight`,
      `unet.${attn}.to_q.lora_B.weight`,
      [2, 24],
      [24, 2],
    ],
    [
      targets.unet,
      `${attn}.to_q`,
      `base_model.model.${attn}.to_q.lora_A.default.weight`,
      `base_model.model.${attn}.to_q.lora_B.default.weight`,
      [2, 24],
      [24, 2],
    ],
    [
      targets.unet,
      `${attn}.to_out.0`,
      `unet.${attn}.processor.to_out_lora.down.weight`,
      `unet.${attn}.processor.to_out_lora.up.weight`,
      [2, 24],
      [24, 2],
    ],
    [
      targets.unet,
      'down_blocks.0.resnets.0.conv1',
      'lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight',
      'lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight',
      [2, 16, 3, 3],
      [16, 2, 1, 1],
    ],
    [
      targets.text_encoder,
      layer,
      `text_encoder.${layer}.lora_linear_layer.down.weight`,
      `text_encoder.${layer}.lora_linear_layer.up.weight`,
      [2, 32],
      [32, 2],
    ],
    [
      targets.text_encoder,
      layer,
      `text_encoder.${layer.replace('text_model.', '')}.lora_A.weight`,
      `text_encoder.${layer.replace('text_model.', '')}.lora_B.weight`,
      [2, 32],
      [32, 2],
    ],
    [
      targets.text_encoder,
      layer,
      `lora_te1_${layer.replaceAll('.', '_')}.lora_down.weight`,
      `lora_te1_${layer.replaceAll('.', '_')}.lora_up.weight`,
      [2, 32],
      [32, 2],
    ],
    [
      targets.text_encoder_2,
      layer,
      `text_encoder_2.${layer}.lora_A.weight`,
      `text_encoder_2.${layer}.lora_B.weight`,
      [2, 48],
      [48, 2],
    ],
    [
      targets.text_encoder_2,
      layer,
      `lora_te2_${layer.replaceAll('.', '_')}.lora_down.weight`,
      `lora_te2_${layer.replaceAll('.', '_')}.lora_up.weight`,
      [2, 48, 1, 1], // a layer written as a convolution
      [48, 2, 1, 1],
    ],
  ];
  const path = join(folder, 'spelt.safetensors');
  const merges = (
    given: Parameters<typeof mergeLora>[0],
    [model, key, down, up, a, b]: (typeof cases)[0],
  ) => {
    writeSafetensors(path, [ones(down, a, 0.5), ones(up, b, 0.25)]);
    const weight = namedParameters(model).get(`${key}.weight`);
    const want = weight?.tensor.floats().map((x) => x + 3 * 2 * 0.5 * 0.25) ?? [];
    mergeLora(given, path, 3);
    allClose(t, down, weight?.tensor.floats() ?? [], want, { atol: 1e-6, rtol: 0 });
  };
  for (const each of cases) merges(targets, each);
  // The refiner has that encoder alone.
  const flat = `lora_te_${layer.replaceAll('.', '_')}`;
  const only = { ...targets, text_encoder: undefined };
  const names = [`${flat}.lora_down.weight`, `${flat}.lora_up.weight`] as const;
  merges(only, [targets.text_encoder_2, layer, ...names, [2, 48], [48, 2]]);
  refuses(t, 'with two encoders', () => mergeLora(targets, path), /match no weight of this model: lora_te_/);
  const [attention] = cases;
  writeSafetensors(path, [ones(attention[2], [2, 24, 3, 3], 1), ones(attention[3], [24, 2, 1, 1], 1)]);
  refuses(t, 'taps for a layer', () => mergeLora(targets, path), /have another shape than the model/);
  for (const model of [targets.unet, targets.text_encoder, targets.text_encoder_2]) unload(model);
  t.end();
});

test('the alpha that peft keeps in the metadata', (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-lora-'));
  t.teardown(() => rmSync(folder, { recursive: true }));
  const path = join(folder, 'peft.safetensors');
  const [first, second] = [1, 2].map((k) => `down_blocks.1.attentions.0.transformer_blocks.0.attn${k}.to_q`);
  const rank = 4;
  const entry = (name: string, shape: number[]): TensorEntry => ({
    ...{ name, dtype: 'float32', shape },
    bytes: encodeNumbers(Array<number>(24 * rank).fill(0.5), 'float32'),
  });
  const entries = [first, second].flatMap((module) => [
    entry(`unet.${module}.lora_A.weight`, [rank, 24]),
    entry(`unet.${module}.lora_B.weight`, [24, rank]),
  ]);
  const targets = tinyUNet();
  const weights = [first, second].map(
    (module) => namedParameters(targets.unet).get(`${module}.weight`) as Parameter,
  );
  // What each weight gains is its alpha over the rank, or over the rank's root, times the product's rank * 0.5 * 0.5.
  const gains = (metadata: object | string) => {
    const text = typeof metadata === 'string' ? metadata : JSON.stringify(metadata);
    writeSafetensors(path, entries, { lora_adapter_metadata: text });
    const before = weights.map(({ tensor }) => tensor.floats()[0]);
    mergeLora(targets, path);
    return weights.map(({ tensor }, i) => tensor.floats()[0] - before[i]);
  };
  const close = { atol: 1e-5, rtol: 0 };
  const plain = { 'unet.lora_alpha': 8 };
  allClose(t, 'lora_alpha', gains(plain), [2, 2], close);
  const pattern = { ...plain, 'unet.alpha_pattern': { 'attn2.to_q': 2 } };
  allClose(t, 'alpha_pattern', gains(pattern), [2, 0.5], close);
  allClose(t, 'use_rslora', gains({ ...pattern, 'unet.use_rslora': true }), [4, 1], close);
  const expression = { ...plain, 'unet.alpha_pattern': { '.*(attn|ff)2(\\.\\w+)+': 2 } };
  allClose(t, 'a regular expression', gains(expression), [2, 0.5], close);
  for (const [word, says] of [
    ['(.*)*x', /"\(\.\*\)\*x" in .* takes too long to match: write the names of layers there/],
    ['(', /"\(" in .* is no pattern/],
  ] as const)
    refuses(t, word, () => gains({ ...plain, 'unet.alpha_pattern': { [word]: 2 } }), says);
  allClose(t, 'another part', gains({ 'text_encoder.lora_alpha': 8 }), [1, 1], close);
  refuses(t, 'broken', () => gains('{'), /"lora_adapter_metadata" is not a JSON object/);
  refuses(t, 'null', () => gains('null'), /"lora_adapter_metadata" is not a JSON object/);
  refuses(
    t,
    'infinite',
    () => gains('{"unet.lora_alpha": 1e999}'),
    /the alpha of unet\..* is not a finite number/,
  );
  unload(targets.unet);
  t.end();
});

test('the order of a convolution’s taps survives the merge', (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-lora-'));
  t.teardown(() => rmSync(folder, { recursive: true }));
  const path = join(folder, 'conv.safetensors');
  const down = Float32Array.from({ length: 16 * 9 }, (_, i) => i / 144);
  const up = Float32Array.from({ length: 16 }, (_, i) => i - 8);
  const name = 'lora_unet_down_blocks_0_resnets_0_conv1';
  writeSafetensors(path, [
    {
      name: `${name}.lora_down.weight`,
      dtype: 'float32',
      shape: [1, 16, 3, 3],
      bytes: encodeNumbers(down, 'float32'),
    },
    {
      name: `${name}.lora_up.weight`,
      dtype: 'float32',
      shape: [16, 1, 1, 1],
      bytes: encodeNumbers(up, 'float32'),
    },
  ]);
  const targets = tinyUNet();
  const weight = namedParameters(targets.unet).get('down_blocks.0.resnets.0.conv1.weight');
  // Ours is [o, kh, kw, i]; the adapter's product is [o, i, kh, kw].
  const want = weight?.tensor.floats().map((x, at) => {
    const [o, tap, i] = [Math.floor(at / 144), Math.floor(at / 16) % 9, at % 16];
    return x + up[o] * down[i * 9 + tap];
  });
  mergeLora(targets, path);
  allClose(t, 'conv1', weight?.tensor.floats() ?? [], want ?? [], { atol: 1e-6, rtol: 1e-6 });
  unload(targets.unet);
  t.end();
});

test('a LoRA for another model is refused before anything changes', (t) => {
  const refiner = tinyUNet('tiny-sdxl-refiner');
  const weights = () => bytesOf([...namedParameters(refiner.unet).values()][20].tensor.floats());
  const before = weights();
  const run = () => mergeLora(refiner, goldenLora('lora/scaled_kohya.safetensors'));
  refuses(t, 'kohya', run, /LoRA/, /match no weight|another shape/);
  refuses(
    t,
    'a model',
    () => mergeLora(refiner, golden('tiny-sdxl/vae/diffusion_pytorch_model.safetensors')),
    /match no weight/,
    /and \d+ more/,
  );
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-lora-'));
  const empty = join(folder, 'empty.safetensors');
  writeSafetensors(empty, []);
  refuses(t, 'nothing', () => mergeLora(refiner, empty), /LoRA .*empty\.safetensors holds no tensors/);
  rmSync(folder, { recursive: true });
  t.ok(weights().equals(before), 'weights are as they were');
  unload(refiner.unet);
  t.end();
});
