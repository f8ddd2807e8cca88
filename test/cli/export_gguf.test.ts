// Exports to GGUF: blocks to the byte as gguf's own, a whole model as stable-diffusion.cpp converts one, a UNet alone as ComfyUI-GGUF's
// tools do, all of it read back by our reader (whose numbers are gguf's: gguf.test.ts). What goes wrong leaves nothing behind.
import { cpSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { main } from '../../cli/main.ts';
import { openDevice } from '../../engine/device.ts';
import { namedParameters } from '../../engine/module.ts';
import { decodeFloats, encodeNumbers, type FloatDType } from '../../io/dtype.ts';
import { quantisers } from '../../io/ggml_quantise.ts';
import { openGguf } from '../../io/gguf.ts';
import { readJson } from '../../io/json.ts';
import { inTurns } from '../../io/turns.ts';
import { type ModelSource, openModel } from '../../models/checkpoint/checkpoint.ts';
import type { WeightInfo, WeightSource } from '../../models/checkpoint/weights.ts';
import { buildComponent, type Component } from '../../models/formats/components.ts';
import { exportGguf, ggufTypes } from '../../models/formats/export_gguf.ts';
import { presets } from '../../models/formats/presets.ts';
import { randomModel } from '../../models/formats/random_weights.ts';
import { openUNetFile } from '../../models/formats/unet_file.ts';
import type { TextConfig } from '../../models/text/clip.ts';
import { sdxl } from '../support/command_line.ts';
import { goldenLines, goldenLora } from '../support/golden.ts';
import {
  golden,
  isQuantised,
  loaded,
  model,
  ofQ8,
  parts,
  plainFile,
  sameModel,
  sizeOf,
  unetPrefix,
  type Weight,
  whole,
} from '../support/weights_helpers.ts';

const scratch = () => mkdtempSync(join(tmpdir(), 'sdxl-gguf-'));
const run = (...argv: string[]) => sdxl('export', ...argv, '--format', 'gguf');

test("blocks are gguf's, to the byte", (t) => {
  const recorded = goldenLines<{ type: string; blocks: string; values: string }>('gguf_quantised');
  t.same(
    recorded.map(({ type }) => type),
    Object.keys(quantisers),
  );
  for (const { type, blocks, values } of recorded) {
    const numbers = decodeFloats(Buffer.from(values, 'hex'), 'float32');
    t.equal(Buffer.from(quantisers[type](numbers)).toString('hex'), blocks, type);
  }
  t.end();
});

/** Names that stable-diffusion.cpp's convert leaves as they are. */
const kept = /\.bias$|time_embed\.|label_emb\.|embedding/;
const takes = (name: string, weight: Weight): boolean => isQuantised(name, weight) && !kept.test(name);

test('a whole model: the types of stable-diffusion.cpp, the numbers of the source', async (t) => {
  const folder = scratch();
  const quantised = new Map([...golden].filter(([name, weight]) => takes(name, weight)));
  t.ok(quantised.size > 100, `${quantised.size} matrices`);
  for (const type of ggufTypes) {
    const out = join(folder, `${type}.gguf`);
    const { status, err, out: said } = await run(model, out, '--type', type, '--dtype', 'float16', '--json');
    t.equal(status, 0, err);
    t.match(JSON.parse(said), { format: 'gguf', type, forward: parts, tensors: golden.size }, type);
    const { tensors, metadata, close } = openGguf(out);
    t.same(metadata, {}, 'none, as convert writes none');
    t.same([...tensors.keys()].sort(), [...golden.keys()].sort());
    for (const [name, weight] of golden) {
      const plain = /^b?f\d/.test(type);
      const taken = plain ? !kept.test(name) : takes(name, weight);
      const { storedAs, shape } = tensors.get(name) as { storedAs: string; shape: readonly number[] };
      const right = storedAs === (taken ? type.toUpperCase() : 'F16') && shape.join() === weight.shape.join();
      if (!right) t.fail(`${type} ${name}: ${storedAs} [${shape}]`);
    }
    close();
  }
  sameModel(t, whole(join(folder, 'f32.gguf')), whole(join(folder, 'f16.gguf')));
  const q8 = new Map(golden);
  for (const [name, weight] of quantised)
    q8.set(name, { ...weight, values: ofQ8(quantisers.Q8_0(weight.values)) });
  sameModel(t, whole(join(folder, 'q8_0.gguf')), whole(plainFile('q8.safetensors', q8)));
  const fine = await run(model, join(folder, 'own.gguf'), '--quiet');
  t.equal(fine.status, 0, fine.err);
  sameModel(t, whole(join(folder, 'own.gguf')), openModel(model));
  rmSync(folder, { recursive: true });
});

test("a UNet alone, as ComfyUI-GGUF's tools lay one out", async (t) => {
  const folder = scratch();
  const source = openModel(model);
  for (const [type, feedForward, fileType] of [
    ['q8_0', 'Q8_0', '7'],
    ['q5_0', 'Q5_1', '8'],
    ['q4_0', 'Q4_1', '2'],
    ['bf16', 'BF16', '32'],
  ] as const) {
    const out = join(folder, `${type}.gguf`);
    const { status, err } = await run(model, out, '--save-keys', 'unet', '--type', type, '--quiet');
    t.equal(status, 0, err);
    const file = openGguf(out);
    const { 'general.architecture': kind, 'general.file_type': number } = file.metadata;
    t.same([kind, number, file.metadata['general.quantization_version']], ['sdxl', fileType, '2']);
    const unet = [...golden].filter(([name]) => name.startsWith(unetPrefix));
    t.equal(file.tensors.size, unet.length);
    const block = 'middle_block.1.transformer_blocks.0';
    const rest = type === 'bf16' ? 'BF16' : 'F16';
    for (const [name, as] of [
      ['input_blocks.0.0.weight', 'F32'], // 576 numbers
      ['input_blocks.4.0.out_layers.3.weight', rest], // [24, 24, 3, 3] are no whole rows of 256
      ['input_blocks.1.0.in_layers.2.weight', type.toUpperCase()], // [16, 16, 3, 3] are
      [`${block}.attn2.to_k.weight`, type.toUpperCase()],
      [`${block}.ff.net.2.weight`, feedForward],
      ['middle_block.1.norm.weight', 'F32'],
      ['time_embed.2.weight', rest],
      ['label_emb.0.0.weight', rest],
    ])
      t.equal(file.tensors.get(name)?.storedAs, as, `${type} ${name}`);
    for (const [name, { shape }] of unet)
      t.same(file.tensors.get(name.slice(unetPrefix.length))?.shape, shape, `${name}: its own shape`);
    file.close();
  }
  const [q8, exact] = [openUNetFile(join(folder, 'q8_0.gguf'), source), source].map((each) =>
    loaded(each, 'unet', 'float32'),
  );
  const key = 'down_blocks.0.resnets.0.conv1.weight';
  const { values } = golden.get(`${unetPrefix}input_blocks.1.0.in_layers.2.weight`) as Weight;
  const want = ofQ8(quantisers.Q8_0(values));
  const numbers = (bits: string | undefined) =>
    [...decodeFloats(Buffer.from(bits as string, 'base64'), 'float32')].sort();
  t.same(numbers(q8.get(key)), [...want].sort(), 'blocks run on where rows of the weight end');
  t.not(q8.get(key), exact.get(key));
  t.equal(q8.get('conv_in.weight'), exact.get('conv_in.weight'));
  rmSync(folder, { recursive: true });
});

/** The tiny model with some of a UNet's numbers changed where they are read. */
const changed = (change: (name: string, values: Float32Array) => void): ModelSource => {
  const source = openModel(model);
  return {
    ...source,
    weights(component) {
      const weights = source.weights(component);
      const floats = (name: string) => {
        const values = weights.floats(name);
        change(name, values);
        return values;
      };
      const bytes = (name: string) => encodeNumbers(floats(name), weights.info(name)?.dtype as FloatDType);
      return { ...weights, floats, bytes };
    },
  };
};

test('what reads back or computes other than it should is not kept', async (t) => {
  const folder = scratch();
  const request = { save_keys: [], type: 'q8_0', device: openDevice('auto') } as const;
  const made = (source: ModelSource, more: object = {}, onTurn?: () => void) =>
    inTurns(exportGguf(source, join(folder, 'x.gguf'), { ...request, ...more }), onTurn);
  let written = 0;
  const onProgress = ({ done, total }: { done: number; total: number }) => void (written = done / total);
  const spoil = () => {
    const [name] = readdirSync(folder);
    if (written < 1 || readdirSync(folder).length > 1) return;
    written = 0;
    const bytes = readFileSync(join(folder, name));
    bytes[bytes.length - 40] ^= 1;
    writeFileSync(join(folder, name), bytes);
  };
  await t.rejects(made(openModel(model), { onProgress }, spoil), /reads back other .* check the disk$/);
  const other: ModelSource = {
    ...openModel(model),
    load(component, module, ...how) {
      openModel(model).load(component, module, ...how);
      namedParameters(module).get('conv_out.bias')?.tensor.set([1, 2, 3, 4]);
    },
  };
  await t.rejects(made(other), /the exported unet computes other numbers .* nothing was kept/);
  const plain = changed(() => {});
  const numbered: ModelSource = {
    ...plain,
    weights(component) {
      const weights = plain.weights(component);
      const info = (name: string) => ({ ...(weights.info(name) as WeightInfo), dtype: 'int32' as const });
      return { ...weights, info };
    },
  };
  await t.rejects(made(numbered), /tensor \S+ is int32, not a float type$/);
  const wild = changed((name, values) => {
    if (name === 'mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight') values[3] = Number.NaN;
  });
  const refused = /^--type q8_0: no weight of random weights has rows of whole blocks of 32 .* as f16$/;
  await t.rejects(made(narrowModel()), { name: 'UserError', message: refused });
  await t.rejects(made(wild), /to_q\.weight holds NaN, which q8_0 cannot; export it as f32$/);
  t.same(readdirSync(folder), [], 'nothing was kept');
  rmSync(folder, { recursive: true });
});

/** A model of widths that no block fits, of zeros. */
function narrowModel(): ModelSource {
  const { tiny } = presets;
  const text = { hidden_size: 40, intermediate_size: 120, num_attention_heads: 4 };
  const base = randomModel(
    {
      ...tiny,
      unet: { ...tiny.unet, block_out_channels: [12, 20, 28], norm_num_groups: 4 },
      text_encoder: { ...(tiny.text_encoder as TextConfig), ...text },
      text_encoder_2: { ...tiny.text_encoder_2, ...text },
    },
    { seed: 1 },
  );
  const weights = (component: string): WeightSource => {
    const parameters = namedParameters((buildComponent(base.config(component)) as Component).module);
    const floats = (name: string) => new Float32Array(sizeOf(parameters.get(name)?.shape ?? []));
    return {
      ...{ where: base.path, names: [...parameters.keys()], floats, close() {} },
      info: (name) => ({
        ...{ dtype: 'float32', storedAs: 'F32', bytes: 4 * floats(name).length },
        shape: parameters.get(name)?.shape ?? [],
      }),
      bytes: (name) => encodeNumbers(floats(name), 'float32'),
    };
  };
  return { ...base, weights };
}

test('how a model predicts is marked, as in a single file', async (t) => {
  const folder = scratch();
  const source = join(folder, 'model');
  cpSync(model, source, { recursive: true });
  const scheduler = join(source, 'scheduler', 'scheduler_config.json');
  const config = { ...(readJson(scheduler) as object), prediction_type: 'v_prediction' };
  writeFileSync(scheduler, JSON.stringify(config));
  const out = join(folder, 'x.gguf');
  const { status, err } = await run(source, out, '--type', 'q8_0', '--dtype', 'bfloat16', '--quiet');
  t.equal(status, 0, err);
  t.match(whole(out).config('scheduler'), { prediction_type: 'v_prediction' });
  rmSync(folder, { recursive: true });
});

test('Ctrl-C amid an export to GGUF leaves nothing', async (t) => {
  const folder = scratch();
  for (const share of [0.5, 1]) {
    const err = (text: string) => {
      const [, done, total] = /tensors (\d+)\/(\d+)/.exec(text) ?? [];
      if (done && Number(done) >= share * Number(total)) process.emit('SIGINT', 'SIGINT');
    };
    const argv = ['export', model, join(folder, 'x.gguf'), '--type', 'q4_1'];
    t.equal(await main(argv, { live: true, out: () => {}, err }), 130);
    t.same(readdirSync(folder), [], `${share}`);
  }
  rmSync(folder, { recursive: true });
});

test('mistakes of an export to GGUF', async (t) => {
  const folder = scratch();
  const out = join(folder, 'x.gguf');
  const lora = goldenLora('lora/plain_diffusers.safetensors');
  const narrow = join(folder, 'narrow');
  const { status } = await sdxl('export', model, narrow, '--save-keys', 'vae', '--quiet');
  t.equal(status, 0);
  const cases: [label: string, argv: string[], says: RegExp][] = [
    [
      'a name of another format',
      [model, join(folder, 'x.safetensors')],
      /gguf is one file; .* ends in \.gguf/,
    ],
    ['a type that is none', [model, out, '--type', 'q4_k'], /--type takes f32, f16, .*not "q4_k"/],
    ['a LoRA', [lora, out], /is a LoRA; export it as --format lora-peft or lora-kohya/],
    [
      'some parts',
      [model, out, '--save-keys', 'unet,vae'],
      /holds a whole model; export unet, vae, .* together/,
    ],
    [
      'a model without a UNet',
      [narrow, out],
      /holds a whole model, and .* has no unet and no text_encoder_2/,
    ],
    ['a UNet that is not there', [narrow, out, '--save-keys', 'unet'], /has no unet/],
    ['shards', [model, out, '--max-shard-size', '1GB'], /--max-shard-size is for .* gguf is one file/],
  ];
  for (const [label, argv, says] of cases) {
    const { status, err } = await run(...argv, '--quiet');
    t.ok(status === 2 && says.test(err) && err.trim().split('\n').length === 1, `${label}: ${err.trim()}`);
    t.notOk(existsSync(out), `${label}: nothing written`);
  }
  const typed = await sdxl('export', model, join(folder, 'y'), '--type', 'q8_0');
  t.match(typed, { status: 2, err: /^error: --type is of GGUF, and this is diffusers; give --format gguf/ });
  const merged = await run(model, out, '--lora', lora, '--type', 'q8_0', '--quiet');
  t.equal(merged.status, 0, merged.err);
  const again = await run(model, out, '--quiet');
  t.match(again, { status: 2, err: /exists; remove it/ });
  t.same(readdirSync(folder).sort(), ['narrow', 'x.gguf']);
  rmSync(folder, { recursive: true });
});
