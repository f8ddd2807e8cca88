// Exports that go wrong: a disk that spoils what it keeps, Ctrl-C, and what users ask for that cannot be. Each ends in one sentence and
// leaves nothing behind. (What comes out where all goes well: export.test.ts.)
import {
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { main } from '../../cli/main.ts';
import { openDevice } from '../../engine/device.ts';
import { namedParameters } from '../../engine/module.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import { inTurns } from '../../io/turns.ts';
import { type ModelSource, openModel } from '../../models/checkpoint/checkpoint.ts';
import { exportFolder } from '../../models/formats/export.ts';
import { sdxl } from '../support/command_line.ts';
import { goldenFolder, goldenLora } from '../support/golden.ts';

const golden = (name: string) => join(goldenFolder, name);
const scratch = () => mkdtempSync(join(tmpdir(), 'sdxl-export-'));
const run = (...argv: string[]) => sdxl('export', ...argv);

test('what reads back or computes other than it should is not kept', async (t) => {
  const folder = scratch();
  const source = openModel(golden('tiny-sdxl'));
  let turns = 0;
  const request = {
    save_keys: ['unet'],
    max_shard_size: 1e9,
    device: openDevice('auto'),
    onProgress: ({ done, total }: { done: number; total: number }) => void (turns = done === total ? 1 : 0),
  };
  const made = (from: ModelSource, onTurn?: () => void) =>
    inTurns(exportFolder(from, join(folder, 'x'), request), onTurn);
  const spoil = () => {
    // The last tensor is written, the file has its name, and the first tensor is read again.
    if (turns === 0 || ++turns !== 3) return;
    const file = join(folder, readdirSync(folder)[0], 'unet', 'diffusion_pytorch_model.safetensors');
    const bytes = readFileSync(file);
    bytes[bytes.length - 1] ^= 1;
    writeFileSync(file, bytes);
  };
  await t.rejects(made(source, spoil), /x.unet.*: tensor \S+ reads back other .* check the disk$/);
  const other: ModelSource = {
    ...source,
    load(component, module, ...how) {
      source.load(component, module, ...how);
      namedParameters(module).get('conv_out.bias')?.tensor.set([1, 2, 3, 4]);
    },
  };
  await t.rejects(made(other), /the exported unet computes other numbers than its source; nothing was kept/);
  t.same(readdirSync(folder), [], 'nothing was kept');
  rmSync(folder, { recursive: true });
});

test('Ctrl-C amid an export ends it there, and leaves nothing', async (t) => {
  const folder = scratch();
  const interrupted = async (share: number, ...argv: string[]) => {
    let [left, turns] = [false, 0];
    const err = (text: string) => {
      const [, done, total] = /tensors (\d+)\/(\d+)/.exec(text) ?? [];
      if (left) turns++;
      if (done && Number(done) >= share * Number(total)) left = process.emit('SIGINT', 'SIGINT');
    };
    const status = await main(['export', golden('tiny-sdxl'), ...argv], { live: true, out: () => {}, err });
    return [status, turns, readdirSync(folder)];
  };
  const file = [join(folder, 'x.safetensors'), '--format', 'single-file'];
  const listeners = process.listenerCount('SIGINT');
  for (const out of [[join(folder, 'x')], file]) {
    // What comes last is the bar's end.
    t.same(await interrupted(0.5, ...out), [130, 1, []], 'amid the writing');
    t.same(await interrupted(1, ...out), [130, 1, []], 'after it, while it is read back');
  }
  t.equal(process.listenerCount('SIGINT'), listeners, 'no handler stays');
  rmSync(folder, { recursive: true });
});

test('mistakes leave nothing behind', async (t) => {
  const folder = scratch();
  const lacking = join(folder, 'lacking');
  cpSync(golden('tiny-sdxl'), lacking, { recursive: true });
  const file = join(lacking, 'unet', 'diffusion_pytorch_model.safetensors');
  const unet = openSafetensors(file);
  const all = [...unet.tensors.values()].map(({ name, dtype, shape }) => ({
    name,
    dtype,
    shape,
    bytes: unet.read(name),
  }));
  unet.close();
  writeSafetensors(file, all.slice(1));
  const large = join(folder, 'large');
  cpSync(golden('tiny-sdxl'), large, { recursive: true });
  const bias = {
    name: 'conv_out.bias',
    dtype: 'float32' as const,
    shape: [4],
    bytes: new Uint8Array(Float32Array.of(0, 7e4, 0, 0).buffer),
  };
  writeSafetensors(join(large, 'unet', 'diffusion_pytorch_model.safetensors'), [
    ...all.filter(({ name }) => name !== bias.name),
    bias,
  ]);
  const strange = join(folder, 'strange');
  cpSync(golden('tiny-sdxl'), strange, { recursive: true });
  writeFileSync(join(strange, 'vae', 'config.json'), '{ "_class_name": "AutoencoderDC" }');
  const whole = all.map((each) =>
    each.name === bias.name ? { ...each, dtype: 'int32' as const, bytes: new Uint8Array(16) } : each,
  );
  writeSafetensors(join(strange, 'unet', 'diffusion_pytorch_model.safetensors'), whole);
  const out = join(folder, 'out');
  const lora = goldenLora('lora/plain_diffusers.safetensors');
  const kohya = ['--format', 'lora-kohya'];
  const parts = join(scratch(), 'parts');
  await run(golden('tiny-sdxl'), parts, '--save-keys', 'unet,vae', '--quiet');
  const checkpoint = scratch();
  mkdirSync(join(checkpoint, 'lora'));
  copyFileSync(lora, join(checkpoint, 'lora', 'pytorch_lora_weights.safetensors'));
  writeFileSync(join(checkpoint, 'state.json'), '{}');
  const cases: [label: string, argv: string[], says: RegExp][] = [
    [
      'unknown --save-keys',
      [golden('tiny-sdxl'), out, '--save-keys', 'unet,controlnet'],
      /no controlnet; it has unet, vae, text_encoder, .*scheduler/,
    ],
    [
      'names with spaces between, as diffengine has them',
      [golden('tiny-sdxl'), out, '--save-keys', 'unet', 'vae'],
      /"vae" is a third; put commas between names: --save-keys unet,/,
    ],
    ['a name left out', [golden('tiny-sdxl'), out, '--save-keys', 'unet,'], /names with commas between/],
    ['missing tensor', [lacking, out], /missing add_embedding\.linear_1\.bias/],
    [
      'missing tensor, one file',
      [lacking, `${out}.safetensors`, '--format', 'single-file'],
      /missing add_embedding\.linear_1\.bias/,
    ],
    ['more than float16 holds', [large, out, '--dtype', 'float16'], /conv_out\.bias holds 70000.*bfloat16/],
    ['another class', [strange, out], /strange: vae is of a class that SDXL has not/],
    [
      'whole numbers',
      [strange, out, '--save-keys', 'unet'],
      /tensor conv_out\.bias is int32, not a float type/,
    ],
    ['unknown format', [golden('tiny-sdxl'), out, '--format', 'diffuser'], /did you mean "diffusers"/],
    [
      'unknown type',
      [golden('tiny-sdxl'), out, '--dtype', 'fp32'],
      /--dtype takes .*; did you mean "float32"/,
    ],
    [
      'a folder with the name of a file',
      [golden('tiny-sdxl'), `${out}.gguf`, '--format', 'diffusers'],
      /out\.gguf is the name of a file, and diffusers is a folder; give a name without \.gguf, or --format gguf/,
    ],
    [
      'a pickle',
      [golden('tiny-sdxl'), `${out}.ckpt`],
      /diffusers is a folder; .* or one that ends in \.safetensors or \.gguf/,
    ],
    ['a size that is none', [golden('tiny-sdxl'), out, '--max-shard-size', 'big'], /--max-shard-size takes/],
    ['something in the way', [golden('tiny-sdxl'), lacking], /exists; remove it/],
    [
      'the folder one is in',
      [golden('tiny-sdxl'), '.'],
      /\. is the folder you are in, .* name a new one in it, such as model\n/,
    ],
    [
      'configs for what has its own',
      [golden('tiny-sdxl'), out, '--configs', golden('tiny-sdxl')],
      /--configs .* is for a model that is a single file, or for a LoRA, and a folder has its own; leave/,
    ],
    ['no source', [join(folder, 'absent'), out], /no model at/],
    ['--ema of a model', [golden('tiny-sdxl'), out, '--ema'], /no moving averages/],
    [
      'a part as a single file',
      [golden('tiny-sdxl'), `${out}.safetensors`, '--format', 'single-file', '--save-keys', 'unet'],
      /whole model/,
    ],
    [
      'what is no whole model as a single file',
      [parts, `${out}.safetensors`, '--format', 'single-file'],
      /holds a whole model, and .*parts has no text_encoder_2; export it as a folder/,
    ],
    ['a LoRA as a folder', [lora, out], /is a LoRA/],
    [
      'a LoRA for another model',
      [lora, `${out}.safetensors`, '--format', 'lora-kohya'],
      /have another shape|match no weight/,
    ],
    [
      'a model as a LoRA',
      [golden('tiny-sdxl'), `${out}.safetensors`, '--format', 'lora-kohya'],
      /is not a LoRA; export a whole model as --format diffusers/,
    ],
    ['no LoRA', [join(folder, 'absent.safetensors'), `${out}.safetensors`, ...kohya], /no LoRA at .*absent/],
    ['a folder without one', [folder, `${out}.safetensors`, ...kohya], /holds no LoRA: a folder must have/],
    [
      '--ema of a LoRA',
      [lora, `${out}.safetensors`, ...kohya, '--ema'],
      /no moving averages; leave out --ema/,
    ],
    [
      '--ema of a LoRA whose run kept none',
      [checkpoint, `${out}.safetensors`, ...kohya, '--ema'],
      /no moving averages, as its run kept none; leave out --ema/,
    ],
    [
      'parts of a LoRA',
      [lora, `${out}.safetensors`, ...kohya, '--save-keys', 'unet'],
      /--save-keys is for a model's parts, and lora-kohya is one file; leave it out/,
    ],
    [
      'shards of a file',
      [golden('tiny-sdxl'), `${out}.safetensors`, '--format', 'single-file', '--max-shard-size', '1GB'],
      /--max-shard-size is for .* single-file is one file; leave it out/,
    ],
    [
      'a file that no program would know',
      [golden('tiny-sdxl'), out, '--format', 'single-file'],
      /single-file is one file; give a name that ends in \.safetensors, not .*out/,
    ],
  ];
  const before = process.cwd();
  process.chdir(scratch());
  t.teardown(() => process.chdir(before));
  for (const [label, argv, says] of cases) {
    const { status, err } = await run(...argv, '--quiet');
    t.ok(status === 2 && says.test(err) && err.trim().split('\n').length === 1, `${label}: ${err.trim()}`);
    t.notOk(existsSync(out), `${label}: nothing written`);
  }
  t.same(readdirSync(folder).sort(), ['lacking', 'large', 'strange'], 'no temporary file is left');
  const { status } = await run(large, out, '--dtype', 'bfloat16', '--save-keys', 'unet', '--quiet');
  t.equal(status, 0, 'bfloat16 holds what float16 does not');
  rmSync(folder, { recursive: true });
});
