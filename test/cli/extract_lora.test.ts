// `sdxl export --base`: LoRAs of what differs between two models. The judges are updates that are known, sums in float64, and the tuned
// model's own picture; how near a product of a rank can come is low_rank.test.ts's. And mistakes, which leave nothing.
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { decodeFloats, type FloatDType } from '../../io/dtype.ts';
import { readPicture } from '../../io/image.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { inTurns } from '../../io/turns.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { extractLora } from '../../models/lora/extract_lora.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { contents } from '../support/contents.ts';
import { numbers } from '../support/controlnet_golden.ts';
import { goldenFolder, goldenLora, maxDifference } from '../support/golden.ts';
import { writeInpainting } from '../support/inpainting_golden.ts';
import { nonEmpty } from '../support/non_empty.ts';
import { tinyFiles, writeTiny } from '../support/tiny_model.ts';
import { sizeOf } from '../support/weights_helpers.ts';

const base = join(goldenFolder, 'tiny-sdxl');
const refiner = join(goldenFolder, 'tiny-sdxl-refiner');
const folder = mkdtempSync(join(tmpdir(), 'sdxl-extract-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);

/** What is added to a weight: nothing where it is undefined. */
type Change = (path: string, shape: readonly number[]) => Float32Array | undefined;

/** Writes the base as another model: with what `change` adds, in `dtype`. */
const write = (name: string, change: Change, dtype: FloatDType = 'float32'): string =>
  writeTiny(at(name), dtype, (path, shape, values) => {
    const more = change(path.replace(/\.weight$/, ''), shape);
    return more ? values.map((x, i) => x + more[i]) : values;
  });

/** Layers of every kind, and the rank of what is added to each. */
const changed: Record<string, number> = {
  'unet.conv_in': 2,
  'unet.add_embedding.linear_2': 3,
  'unet.down_blocks.0.resnets.0.conv1': 3,
  'unet.down_blocks.1.resnets.0.conv_shortcut': 1,
  'unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k': 2,
  'text_encoder.text_model.encoder.layers.0.self_attn.q_proj': 3,
  'text_encoder_2.text_model.encoder.layers.1.mlp.fc1': 2,
};

/** What `rank` rows and columns make, as large as some tenths of a weight. */
function update(path: string, [o, ...inputs]: readonly number[], rank: number): Float32Array {
  const c = sizeOf(inputs);
  const [up, down] = [numbers(`${path} up`, [o, rank]), numbers(`${path} down`, [rank, c])];
  return Float32Array.from({ length: o * c }, (_, i) => {
    let sum = 0;
    for (let r = 0; r < rank; r++) sum += up[Math.floor(i / c) * rank + r] * down[r * c + (i % c)];
    return 0.02 * sum;
  });
}

const lowRank: Change = (path, shape) => (changed[path] ? update(path, shape, changed[path]) : undefined);
/** Every linear layer and convolution of UNet and text encoders, wholly. */
const everywhere: Change = (path, shape) =>
  shape.length > 1 && !path.includes('_embedding') ? numbers(path, shape).map((x) => 0.02 * x) : undefined;

interface Layer {
  alpha?: number;
  down: readonly number[];
  up: readonly number[];
  /** B A */
  product: Float32Array;
  dtype: string;
}

/** The layers of a file in peft's or kohya's spelling, under its names. */
function layersOf(path: string): Map<string, Layer> {
  const file = openSafetensors(path);
  const read = (name: string) => decodeFloats(file.read(name), file.tensors.get(name)?.dtype ?? 'float32');
  const found = new Map<string, Layer>();
  for (const { name, shape: down, dtype } of file.tensors.values()) {
    const [, layer, part] =
      /^(.*?)(\.lora_down|\.lora\.down|\.lora_linear_layer\.down)\.weight$/.exec(name) ?? [];
    if (!part) continue;
    const other = `${layer}${part.replace('down', 'up')}.weight`;
    const [a, b, up] = [read(name), read(other), file.tensors.get(other)?.shape ?? []];
    const [o, r] = up;
    const c = a.length / r;
    const product = Float32Array.from({ length: o * c }, (_, i) => {
      let sum = 0;
      for (let k = 0; k < r; k++) sum += b[Math.floor(i / c) * r + k] * a[k * c + (i % c)];
      return sum;
    });
    const alpha = file.tensors.has(`${layer}.alpha`) ? read(`${layer}.alpha`)[0] : undefined;
    found.set(layer, { alpha, down, up, product, dtype });
  }
  file.close();
  return new Map(nonEmpty(found));
}

const run = (...argv: string[]) => sdxl('export', ...argv);
const kohya = ['--format', 'lora-kohya', '--base', base];
const peft = ['--format', 'lora-peft', '--base', base];

test('updates of a low rank come back, and nothing else', async (t) => {
  const tuned = write('low', lowRank);
  const out = at('low.safetensors');
  const { status, err, out: said } = await run(tuned, out, ...kohya, '--rank', '3', '--json');
  t.equal(status, 0, err);
  const { layers, retained, worst, others, format } = JSON.parse(said);
  t.match({ layers, others, format }, { layers: 7, others: 0, format: 'lora-kohya' });
  t.ok(retained > 1 - 1e-9 && worst.retained > 1 - 1e-9, `${retained}, ${worst.retained}`);
  const spelled = (path: string) =>
    path
      .replace(/^unet\./, 'lora_unet_')
      .replace(/^text_encoder\./, 'lora_te1_')
      .replace(/^text_encoder_2\./, 'lora_te2_')
      .replace('add_embedding.linear_2', 'label_emb_0_2')
      .replaceAll('.', '_');
  const found = layersOf(out);
  t.same([...found.keys()].sort(), Object.keys(changed).map(spelled).sort());
  for (const [path, rank] of Object.entries(changed)) {
    const { product, down, up, alpha, dtype } = found.get(spelled(path)) as Layer;
    const want = update(path, [up[0], ...down.slice(1)], rank);
    t.ok(maxDifference(product, want) < 2e-7, `${path}: ${maxDifference(product, want)}`);
    t.same(
      [up[1], down[0], alpha, dtype],
      [3, 3, 3, 'float32'],
      'its rank is alpha, in the type of the model',
    );
    t.same(
      up.slice(2),
      down.slice(2).map(() => 1),
      "a convolution's kernel is A's",
    );
  }
  const file = openSafetensors(out);
  file.close();
  t.match(file.metadata, {
    ss_network_dim: '3',
    ss_network_alpha: '3',
    ss_base_model_version: 'sdxl_base_v1-0',
  });
  t.match(await run(tuned, at('again.safetensors'), ...kohya, '--rank', '3'), {
    status: 0,
    err: /again\.safetensors: 7 layers retain 100\.0 % of what differs in them \(Frobenius norm\), the worst, [\w.]+, 100\.0 %\n$/,
  });
  t.ok(
    readFileSync(out)
      .subarray(-9e3)
      .equals(readFileSync(at('again.safetensors')).subarray(-9e3)),
    'the same bits',
  );
  t.equal((await run(tuned, at('peft.safetensors'), ...peft, '--rank', '3', '--quiet')).status, 0);
  t.equal((await run(out, at('spelled.safetensors'), '--format', 'lora-peft', '--configs', base)).status, 0);
  t.same(contents(at('peft.safetensors')), contents(at('spelled.safetensors')), "peft's spelling");
});

test('what a rank cuts off is told, as it is stored', async (t) => {
  const [wide, large] = ['unet.mid_block.resnets.0.time_emb_proj', 'unet.conv_out'];
  /** Two directions at right angles, 4 and 3 long. */
  const two = ([o, ...inputs]: readonly number[]) => {
    const c = sizeOf(inputs);
    const wave = (n: number, size: number) => (size > 0 ? (n % 2 ? -1 : 1) : 1) / Math.sqrt(Math.abs(size));
    return Float32Array.from({ length: o * c }, (_, i) => {
      const [row, column] = [Math.floor(i / c), i % c];
      return 4 * wave(row, -o) * wave(column, -c) + 3 * wave(row, o) * wave(column, c);
    });
  };
  const norms = /norm\.bias$|token_embedding$/;
  const tuned = write('cut', (path, shape) => {
    if (path === wide || path === large) return two(shape);
    return norms.test(path) ? new Float32Array(sizeOf(shape)).fill(1) : undefined;
  });
  const out = at('cut.safetensors');
  const {
    status,
    err,
    out: said,
  } = await run(
    ...[tuned, out, ...peft, '--rank', '1', '--conv-rank', '64', '--dtype', 'float16', '--quiet', '--json'],
  );
  t.equal(status, 0, err);
  const { retained, worst, layers, others } = JSON.parse(said);
  // Of 25 in each layer the one keeps 16.
  t.equal(worst.layer, wide);
  t.ok(Math.abs(worst.retained - 0.8) < 1e-7, `${worst.retained}`);
  t.ok(Math.abs(retained - Math.sqrt(41 / 50)) < 1e-7, `${retained}`);
  t.ok(layers === 2 && others > 5, `${others} norms, biases and embeddings`);
  const found = layersOf(out);
  const { down, up, dtype } = found.get(large) as Layer;
  t.same(
    [down.slice(1), up, dtype],
    [[16, 3, 3], [4, 4, 1, 1], 'float16'],
    'at most as many as there can be',
  );
  t.match(await run(tuned, at('told.safetensors'), ...peft), {
    err: /; \d+ norms, biases and embeddings differ too, which a LoRA does not hold\n$/,
  });
});

test('several adapters become one, and one of another rank', async (t) => {
  const twice = ['unet.conv_in', 'text_encoder_2.text_model.encoder.layers.1.mlp.fc1'];
  const second = write('second', (path, shape) =>
    twice.includes(path) ? update(`${path} second`, shape, 2) : undefined,
  );
  const [low, other, both, less] = ['low', 'other', 'both', 'less'].map((name) => at(`${name}.safetensors`));
  const made = async (out: string, ...argv: string[]) => {
    const { status, err } = await run(base, out, '--format', 'lora-kohya', '--quiet', ...argv);
    t.equal(status, 0, err);
    return layersOf(out);
  };
  t.equal((await run(second, other, ...kohya, '--rank', '2', '--quiet')).status, 0);
  const [from, to] = [layersOf(low), layersOf(other)];
  const merged = await made(both, '--base', base, '--lora', `${low}:0.5`, '--lora', `${other}:-1`);
  t.same([...merged.keys()].sort(), [...from.keys()].sort());
  for (const [layer, { product }] of merged) {
    const [a, b] = [from, to].map((file) => file.get(layer)?.product ?? new Float32Array(product.length));
    const want = a.map((x, i) => 0.5 * x - b[i]);
    const most = want.reduce((m, x) => Math.max(m, Math.abs(x)), 0);
    t.ok(maxDifference(product, want) < 5e-6 * most, `${layer}: ${maxDifference(product, want)} of ${most}`);
  }
  const cut = await made(less, '--base', base, '--lora', low, '--rank', '2', '--dtype', 'float16');
  for (const [layer, { down, dtype }] of cut)
    t.same([down[0], dtype], [Math.min(2, from.get(layer)?.down[0] ?? 0, down[0]), 'float16'], layer);
  const whole = await run(low, at('none.safetensors'), '--format', 'lora-kohya', '--lora', other);
  t.match(whole, {
    status: 2,
    err: /--lora is merged into a model, and without --base a LoRA is exported as it is/,
  });
});

test("with all ranks it draws the tuned model's picture", async (t) => {
  const tuned = write('all', everywhere);
  const lora = at('all.safetensors');
  t.match(await run(tuned, lora, ...kohya, '--rank', '640', '--quiet'), { status: 0 });
  const drawn = async (name: string, ...argv: string[]) => {
    const settings = ['--prompt', 'a fox', '--steps', '2', '--width', '64', '--height', '64', '--seed', '3'];
    const more = ['--dtype', 'float32', '--output', at(`${name}.png`)];
    t.match(await sdxl('sample', ...argv, ...settings, ...more, '--quiet'), { status: 0 });
    return (await readPicture(at(`${name}.png`))).data;
  };
  const want = await drawn('tuned', '--model', tuned);
  const got = await drawn('lora', '--model', base, '--lora', lora);
  const plain = await drawn('base', '--model', base);
  t.ok(maxDifference(plain, want) > 20, 'which is another than the base has');
  t.ok(maxDifference(got, want) <= 1, `pixels within one level: ${maxDifference(got, want)}`);
});

test('single files, GGUF, UNets alone, and models in other types', async (t) => {
  const tuned = write('half', lowRank, 'float16');
  const [single, gguf] = [at('half-single.safetensors'), at('half.gguf')];
  t.equal((await run(tuned, single, '--format', 'single-file', '--quiet')).status, 0);
  t.equal(
    (await run(tuned, gguf, '--format', 'gguf', '--type', 'f16', '--dtype', 'float16', '--quiet')).status,
    0,
  );
  const made = async (from: string, of: string, name: string, ...more: string[]) => {
    const out = at(`of-${name}.safetensors`);
    const argv = ['--format', 'lora-peft', '--base', of, '--rank', '2', '--quiet', ...more];
    const { status, err } = await run(from, out, ...argv);
    t.equal(status, 0, `${name} ${err}`);
    return contents(out);
  };
  const want = await made(tuned, base, 'folder');
  // Written in float32, the base is no other model.
  const precise = write('precise', () => undefined);
  t.same(await made(single, precise, 'single', '--configs', base), want, 'a single file');
  t.same(await made(gguf, base, 'gguf', '--configs', base), want, 'GGUF');
  const file = (of: string) => join(of, 'unet', tinyFiles.unet);
  const lone = await made(file(tuned), join(base, 'unet'), 'lone', '--save-keys', 'unet');
  const other = await made(base, base, 'other', '--unet', file(tuned));
  const whole = await made(gguf, file(base), 'part', '--save-keys', 'unet', '--configs', base);
  for (const each of [lone, other, whole]) t.same(each, lone, 'a UNet alone');
  t.same(lone, new Map([...want].filter(([name]) => name.startsWith('unet'))));
});

test('mistakes', async (t) => {
  const tuned = write('large', (path, shape) =>
    path === 'unet.conv_in' ? new Float32Array(sizeOf(shape)).fill(1e5) : undefined,
  );
  const broken = write('broken', (path, shape) =>
    path.endsWith('conv_out') ? new Float32Array(sizeOf(shape)).fill(Number.NaN) : undefined,
  );
  // What float16 makes of the base's numbers and a little more is no difference.
  const little: Change = (_, shape) => new Float32Array(sizeOf(shape)).fill(1e-4);
  const rounded = write('rounded', little, 'float16');
  const exact = write('exact', little);
  const inpainting = writeInpainting(at('inpainting'));
  const lora = goldenLora('lora/plain_diffusers.safetensors');
  const out = at('none.safetensors');
  const call = (from: string, ...argv: string[]) => run(from, out, '--quiet', ...argv);
  await refusesEach(t, call, [
    [[base, ...kohya], /no linear layer or convolution of .*tiny-sdxl differs from .*tiny-sdxl's/],
    [[rounded, '--format', 'lora-kohya', '--base', exact], /no linear layer or convolution of .* differs/],
    [[refiner, ...kohya], /is \[64,120\] in .*-refiner and \[64,136\] in .*; give as --base the model/],
    [[inpainting, ...kohya], /unet\.conv_in\.weight is \[16,9,3,3\] in .* and \[16,4,3,3\] in/],
    [
      [tuned, ...kohya, '--dtype', 'float16'],
      /unet\.conv_in holds .*, more than float16 can; export it as bfloat16/,
    ],
    [[broken, ...kohya], /conv_out\.weight holds NaN or infinity; the file is damaged/],
    [
      [tuned, '--base', base],
      /--base is for a LoRA .* this is single-file; give --format lora-kohya or lora-peft/,
    ],
    [
      [tuned, '--format', 'lora-kohya'],
      /is not a LoRA; .* name the model that it was tuned from with --base/,
    ],
    [
      [tuned, '--format', 'lora-kohya', '--rank', '8'],
      /--rank is of a LoRA that is extracted; name the model/,
    ],
    [[lora, ...kohya], /is a LoRA, and --base is beside a whole tuned model; leave it out/],
    [[tuned, ...kohya, '--rank', '0'], /--rank takes a whole number from 1, not "0"/],
    [[tuned, ...kohya, '--conv-rank', 'x'], /--conv-rank takes a whole number from 1, not "x"/],
    [
      [tuned, ...kohya, '--save-keys', 'vae'],
      /--save-keys: a LoRA is of unet, text_encoder, text_encoder_2, not vae/,
    ],
    [[tuned, '--format', 'lora-kohya', '--base', at('nowhere')], /no model at .*nowhere/],
  ]);
  t.notOk(existsSync(out), 'nothing is written');
  const request = { save_keys: [], rank: 4, device: openDevice('cpu') };
  const before = readdirSync(folder);
  const work = extractLora(openModel(base), openModel(at('low')), out, 'lora-kohya', request);
  let turns = 0;
  const leave = () => {
    if (++turns === 20) throw new Error('stopped');
  };
  await t.rejects(inTurns(work, leave), /stopped/);
  t.same(readdirSync(folder), before, 'who leaves in between leaves nothing');
});
