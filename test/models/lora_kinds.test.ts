// Adapters of every kind against LyCORIS, kohya, peft and diffusers (golden/adapters.jsonl, golden/oft.jsonl): the merged weights, of
// files whose numbers a formula gives; and files that are refused.
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { type Device, openDevice } from '../../engine/device.ts';
import { type AnyModule, namedParameters, type Parameter, unload } from '../../engine/module.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { toStoredLayout } from '../../models/checkpoint/weights.ts';
import { inspect } from '../../models/inspect.ts';
import { exportLora } from '../../models/lora/export_lora.ts';
import { mergeLora } from '../../models/lora/lora.ts';
import type { LoraTargets } from '../../models/lora/lora_file.ts';
import { parseTextConfig, textEncoder } from '../../models/text/clip.ts';
import { parseUNetConfig, unet } from '../../models/unet/unet.ts';
import { allClose, goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { refuses } from '../support/mistake.ts';
import { devices } from '../support/models_golden.ts';

interface Golden {
  case: string;
  /** In the file's order: a tensor's shape, or what a scalar is. */
  keys: [name: string, shape: number[] | number][];
  scale: number;
  /** peft's: in the file's metadata as diffusers has it, or beside the file. */
  metadata?: object;
  config?: object;
  /** Every stride-th number of a merged weight, float32 in base64, in torch's order. */
  expect: [
    component: 'unet' | (typeof encoders)[number],
    parameter: string,
    stride: number,
    values: string,
  ][];
}

const cases = [...goldenLines<Golden>('adapters'), ...goldenLines<Golden>('oft')];

const encoders = ['text_encoder', 'text_encoder_2'] as const;

/** The UNet, and those text encoders that a case changes. */
function loaded(device: Device, golden?: Golden): LoraTargets {
  const source = openModel(join(goldenFolder, 'tiny-sdxl'));
  const load = <M extends AnyModule>(name: string, model: M): M => {
    source.load(name, model, device, 'float32');
    return model;
  };
  const config = source.config('unet');
  const targets: LoraTargets = {
    unet: load('unet', unet(parseUNetConfig(config))),
    unetConfig: parseUNetConfig(config),
  };
  for (const name of encoders.filter((each) => golden?.expect.some(([component]) => component === each)))
    targets[name] = load(name, textEncoder(parseTextConfig(source.config(name))));
  return targets;
}

function free({ unet, text_encoder, text_encoder_2 }: LoraTargets): void {
  for (const model of [unet, text_encoder, text_encoder_2]) if (model) unload(model);
}

/** The k-th tensor of a file; lengths of DoRA are positive. */
function numbers(k: number, shape: readonly number[], name: string): Float32Array {
  const shift = /dora_scale|magnitude/.test(name) ? 50 : -50;
  return Float32Array.from(
    { length: shape.reduce((a, b) => a * b, 1) },
    (_, i) => (((37 * i + 11 * k) % 101) + shift) / 64,
  );
}

/** Writes a file of a case into a folder of its own. */
function write(t: Test, { keys, metadata, config }: Pick<Golden, 'keys' | 'metadata' | 'config'>): string {
  const folder = t.testdir({});
  mkdirSync(folder, { recursive: true });
  const path = join(folder, config ? 'adapter_model.safetensors' : 'adapter.safetensors');
  let k = 0;
  const entries = keys.map(([name, given]) => {
    const [shape, values] = typeof given === 'number' ? [[], [given]] : [given, numbers(k++, given, name)];
    return { name, shape, dtype: 'float32' as const, bytes: encodeNumbers(values, 'float32') };
  });
  const kept = metadata && { lora_adapter_metadata: JSON.stringify(metadata) };
  writeSafetensors(path, entries, { format: 'pt', ...kept });
  if (config) writeFileSync(join(folder, 'adapter_config.json'), JSON.stringify(config));
  return path;
}

/** In torch's order. */
function weightOf(parameter: Parameter): Float32Array {
  const { tensor, layout, shape } = parameter;
  const bytes = tensor.bytes();
  return new Float32Array((layout === 'conv' ? toStoredLayout(bytes, shape, 4) : bytes).buffer);
}

function compare(t: Test, models: LoraTargets, golden: Golden): void {
  for (const [component, name, stride, values] of golden.expect) {
    const parameter = namedParameters(models[component] as AnyModule).get(name) as Parameter;
    const got = weightOf(parameter).filter((_, i) => i % stride === 0);
    const want = new Float32Array(new Uint8Array(Buffer.from(values, 'base64')).buffer);
    allClose(t, `${golden.case}: ${component} ${name}`, got, want, { atol: 1e-6, rtol: 2e-6 });
  }
}

for (const device of devices) {
  test(`adapters of every kind on ${device.name}`, (t) => {
    const before = device.memory.storages;
    for (const golden of cases) {
      const models = loaded(device, golden);
      mergeLora(models, write(t, golden), golden.scale);
      compare(t, models, golden);
      free(models);
    }
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });
}

const device = openDevice('auto');
const attention = 'lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q';
const convolution = 'lora_unet_down_blocks_0_resnets_0_conv1';

const caseOf = (name: string): Golden => cases.find((golden) => golden.case === name) as Golden;

test('a file mixes kinds by layer', (t) => {
  const path = write(t, caseOf('kinds by layer'));
  const { kind, lora, problems } = inspect(path);
  t.equal(kind, "DoRA and LoHa and LoKr and LoRA and whole difference, kohya's keys");
  t.same(lora?.kinds, { LoHa: 1, LoKr: 1, 'whole difference': 2, DoRA: 1, LoRA: 1 });
  t.same([lora?.ranks, lora?.layers, problems], [[2, 3, 4], { lora_unet: 4, lora_te2: 1, lora_te1: 1 }, []]);
  t.end();
});

test('a LoRA with a bias beside', (t) => {
  const models = loaded(device);
  const parameters = namedParameters(models.unet);
  const of = (name: string) => parameters.get(`down_blocks.0.resnets.0.conv1.${name}`)?.tensor.floats() ?? [];
  const [weight, bias] = [of('weight'), of('bias')];
  const path = write(t, {
    keys: [
      [`${convolution}.diff_b`, [16]],
      [`${convolution}.lora_down.weight`, [1, 16, 3, 3]],
      [`${convolution}.lora_up.weight`, [16, 1, 1, 1]],
    ],
  });
  t.equal(mergeLora(models, path, 0.5), 1, 'layers');
  const want = bias.map((x, i) => x + 0.5 * numbers(0, [16], '')[i]);
  allClose(t, 'bias', of('bias'), want, { atol: 1e-6, rtol: 0 });
  t.ok(maxDifference(of('weight'), weight) > 0, 'weight');
  free(models);
  t.end();
});

function countsForAll(t: Test, of: string): void {
  const golden = caseOf(of);
  const path = write(t, golden);
  const models = loaded(device, golden);
  const [component, name, stride, values] = golden.expect[1];
  const parameter = namedParameters(models[component] as AnyModule).get(name) as Parameter;
  const strided = () => weightOf(parameter).filter((_, i) => i % stride === 0);
  const before = strided();
  const whole = new Float32Array(new Uint8Array(Buffer.from(values, 'base64')).buffer);
  mergeLora(models, path, 0);
  t.same(strided(), before, `${of}: at 0 the model itself`);
  mergeLora(models, path, 0.25);
  const want = before.map((x, i) => x + 0.25 * (whole[i] - x));
  allClose(t, `${of}: a quarter`, strided(), want, { atol: 1e-6, rtol: 2e-6 });
  free(models);
}

test('the scale of a DoRA, and of an OFT that stretches rows, counts for its whole change', (t) => {
  for (const name of ['DoRA, by outputs', 'diag-oft, constrained and rescaled']) countsForAll(t, name);
  t.end();
});

test('other spellings of every kind', (t) => {
  const spelled = (name: string, format: 'lora-kohya' | 'lora-peft', models: LoraTargets) => {
    const path = write(t, caseOf(name));
    const out = join(path, '..', 'out.safetensors');
    exportLora(path, out, format, models);
    return out;
  };
  const agree: [string, 'lora-kohya' | 'lora-peft', string][] = [
    ['LoHa of peft', 'lora-kohya', "LoHa, kohya's keys"],
    ['LoKr of peft, Tucker', 'lora-kohya', "LoKr, kohya's keys"],
    ['DoRA of diffusers, rank-stabilised', 'lora-kohya', "DoRA, kohya's keys"],
    ['DoRA, by outputs', 'lora-peft', "DoRA, diffusers' (peft) keys"],
    ['LoKr with DoRA', 'lora-kohya', "LoKr with DoRA, kohya's keys"],
    ['whole differences', 'lora-kohya', "whole difference, kohya's keys"],
    ['norms', 'lora-kohya', "whole difference, kohya's keys"],
    ['diag-oft, constrained and rescaled', 'lora-kohya', "OFT, kohya's keys"],
    ['OFT of kohya', 'lora-kohya', "OFT, kohya's keys"],
    ['diag-oft of LyCORIS 2.0', 'lora-kohya', "OFT, kohya's keys"],
  ];
  for (const [name, format, kind] of agree) {
    const models = loaded(device, caseOf(name));
    const out = spelled(name, format, models);
    t.equal(inspect(out).kind, kind, name);
    mergeLora(models, out, caseOf(name).scale);
    compare(t, models, caseOf(name));
    free(models);
  }
  const models = loaded(device, caseOf('kinds by layer'));
  const refused: [string, 'lora-kohya' | 'lora-peft', RegExp][] = [
    ['LoHa', 'lora-peft', /hold no LoHa with hada_w1_a, .*lora-kohya/],
    ['DoRA, by inputs', 'lora-peft', /hold no DoRA over inputs/],
    ['LoCon, Tucker', 'lora-peft', /hold no LoRA with lora_mid/],
    [
      'LoKr of peft, both whole',
      'lora-kohya',
      /two whole factors times 0\.\d+, which kohya's spelling cannot/,
    ],
    ['diag-oft', 'lora-peft', /hold no OFT with oft_blocks/],
    ['OFT of peft', 'lora-kohya', /has peft's OFT, which turns what a layer is given/],
  ];
  for (const [name, format, words] of refused)
    refuses(t, `${name} as ${format}`, () => spelled(name, format, models), words);
  // LyCORIS without kohya's trainer.
  const alone: Golden['keys'] = [[`${attention.replace('lora_unet', 'lycoris')}.diff`, [24, 24]]];
  t.equal(mergeLora(models, write(t, { keys: alone })), 1, 'lycoris_');
  free(models);
  t.end();
});

test('what is no whole adapter, or of another kind, is refused by name', (t) => {
  const models = loaded(device);
  const up: Golden['keys'] = [[`${attention}.lora_up.weight`, [24, 2]]];
  const whole: Golden['keys'] = [...up, [`${attention}.lora_down.weight`, [2, 24]]];
  const kron = (w1: number[], w2: number[]): Golden['keys'] => [
    [`${convolution}.lokr_w1`, w1],
    [`${convolution}.lokr_w2`, w2],
  ];
  const cases: [string, Golden['keys'], RegExp][] = [
    ['half a LoRA', up, /have not all .*attn1_to_q \(no lora_down\); the file is damaged/],
    ['alpha alone', [[`${attention}.alpha`, 2]], /attn1_to_q \(only alpha\)/],
    ['half a factor', [[`${convolution}.lokr_w1`, [4, 4]]], /conv1 \(no lokr_w2_a, lokr_w2_b, no lokr_w2\)/],
    [
      'a core too many',
      [...kron([4, 4], [4, 4, 3, 3]), [`${convolution}.lokr_t2`, [2, 2, 3, 3]]],
      /lokr_w2 and lokr_t2/,
    ],
    ['two kinds', [...whole, [`${attention}.diff`, [24, 24]]], /\(LoRA and whole difference at once\)/],
    ['a factor that does not divide', kron([5, 4], [3, 4, 3, 3]), /another shape than the model: .*conv1/],
    ['other taps', kron([4, 4], [4, 4, 1, 1]), /another shape than the model: .*conv1/],
    ['a bias that is not there', [[`${attention}.diff_b`, [24]]], /another shape than the model: .*to_q/],
    [
      'a short DoRA',
      [...whole, [`${attention}.dora_scale`, [20, 1]]],
      /another shape than the model: .*to_q/,
    ],
    ['an unknown part', [...whole, [`${attention}.hada_w3_a`, [24, 2]]], /match no weight .*hada_w3_a/],
    [
      'a part twice',
      [...whole, [`${attention}.lora_A.weight`, [2, 24]]],
      /match no weight .*to_q.lora_(down|A)/,
    ],
    [
      'BOFT of LyCORIS',
      [[`${attention}.oft_blocks`, [3, 4, 6, 6]]],
      /oft_blocks is a tensor of BOFT, which is not supported; LoRA, /,
    ],
    [
      'OFT of old',
      [[`${attention}.oft_r`, [4, 6, 6]]],
      /oft_r is a tensor of OFT as peft wrote it up to 0.15, which is not supported/,
    ],
    ['OFT that does not divide', [[`${attention}.oft_blocks`, [4, 5, 5]]], /another shape .*to_q/],
    [
      'OFT with a short rescale',
      [
        [`${attention}.oft_blocks`, [4, 6, 6]],
        [`${attention}.rescale`, [20, 1]],
      ],
      /another shape than the model: .*to_q/,
    ],
    [
      'OFT of no length',
      [
        [`${attention}.oft_blocks`, [4, 6, 6]],
        [`${attention}.alpha`, Number.NaN],
      ],
      /alpha of .*to_q is not a finite number/,
    ],
    [
      'two OFTs',
      [
        [`${attention}.oft_blocks`, [4, 6, 6]],
        [`${attention}.oft_diag`, [4, 6, 6]],
      ],
      /to_q \(oft_blocks and oft_diag\)/,
    ],
    ['rescale alone', [[`${attention}.rescale`, [24, 1]]], /to_q \(only rescale\)/],
    [
      'OFT of peft without its config',
      [['base_model.model.conv_in.oft_R.weight', [9, 6]]],
      /told by its adapter_config.json, and there is none of OFT beside the file/,
    ],
    [
      'OFT of peft of another size',
      [['base_model.model.conv_in.oft_R.weight', [8, 6]]],
      /another shape than the model: conv_in/,
    ],
    [
      'OFT of peft of no side',
      [['base_model.model.conv_in.oft_R.weight', [9, 7]]],
      /another shape than the model: conv_in/,
    ],
    ['BOFT', [['base_model.model.conv_in.boft_R', [1, 2, 4, 4]]], /boft_R is a tensor of BOFT/],
    [
      'IA3',
      [
        [`${attention}.weight`, [24]],
        [`${attention}.on_input`, 1],
      ],
      /on_input is a tensor of IA3/,
    ],
    [
      'alpha that is no number',
      [...whole, [`${attention}.alpha`, Number.NaN]],
      /alpha of .*to_q is not a finite number/,
    ],
  ];
  const down = Float32Array.from({ length: 48 }, (_, i) => (i === 47 ? Number.NaN : 0));
  const spoilt = join(t.testdir({}), 'spoilt.safetensors');
  const entry = (part: string, shape: number[], values: Float32Array) => ({
    ...{ name: `${attention}.${part}.weight`, shape, dtype: 'float32' as const },
    bytes: encodeNumbers(values, 'float32'),
  });
  writeSafetensors(spoilt, [entry('lora_A', [2, 24], down), entry('lora_B', [24, 2], new Float32Array(48))]);
  refuses(
    t,
    'NaN',
    () => mergeLora(models, spoilt),
    /1 of its names have NaN or infinity .*to_q; the file is damaged/,
  );
  for (const [label, keys, words] of cases) {
    const path = write(t, { keys });
    refuses(t, label, () => mergeLora(models, path), words);
    if (/BOFT|of old|IA3|half|too many|two/.test(label))
      t.ok(
        inspect(path).problems.length > 0,
        `${label}: ${inspect(path).kind}: ${inspect(path).problems[0]}`,
      );
  }
  free(models);
  t.end();
});
