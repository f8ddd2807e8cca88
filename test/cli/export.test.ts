// Exports against the golden models: the same weights as a folder and as one file, written by the libraries themselves, must
// come out of each other. (Adapters: export_lora.test.ts; what goes wrong: export_mistakes.test.ts.)
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { decodeFloats } from '../../io/dtype.ts';
import { writePng } from '../../io/image.ts';
import { readJson } from '../../io/json.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import { openWeights } from '../../models/checkpoint/checkpoint.ts';
import { openSingleFile } from '../../models/formats/singlefile.ts';
import { sdxl } from '../support/command_line.ts';
import { contents, digestOf } from '../support/contents.ts';
import { goldenFolder, goldenSingleFile } from '../support/golden.ts';
import { nonEmpty } from '../support/non_empty.ts';

const golden = (name: string) => join(goldenFolder, name);
const scratch = () => mkdtempSync(join(tmpdir(), 'sdxl-export-'));

const run = (...argv: string[]) => sdxl('export', ...argv);

function componentContents(folder: string): Map<string, string> {
  const weights = openWeights(folder);
  const found = new Map(
    weights.names.map((n) => [n, `${weights.info(n)?.shape}: ${digestOf(weights.floats(n))}`]),
  );
  weights.close();
  return found;
}

const components: Record<string, string[]> = {
  'tiny-sdxl': ['unet', 'vae', 'text_encoder', 'text_encoder_2'],
  'tiny-sdxl-refiner': ['unet', 'vae', 'text_encoder_2'],
};

test('folders and single files come out of each other', async (t) => {
  const folder = scratch();
  for (const [model, names] of Object.entries(components)) {
    const single = join(folder, `${model}.safetensors`);
    const made = await run(golden(model), single, '--dtype', 'float16', '--json');
    t.equal(made.status, 0, `by the ending one file ${made.err}`);
    const said = { out: single, format: 'single-file', dtype: 'float16', forward: names };
    t.match(JSON.parse(made.out), { ...said, tensors: contents(single).size }, 'every component ran');
    const [got, want] = [contents(single), contents(goldenSingleFile(model))];
    t.same([...got.keys()].sort(), [...want.keys()].sort(), `${model}: the keys`);
    t.ok(
      [...want].every(([name, values]) => got.get(name) === values),
      `${model}: shapes and numbers`,
    );

    const back = join(folder, model);
    const args = ['--configs', golden(model), '--quiet'];
    t.equal((await run(goldenSingleFile(model), back, ...args)).status, 0);
    for (const name of names) {
      const [ours, theirs] = [
        componentContents(join(back, name)),
        componentContents(join(golden(model), name)),
      ];
      // transformers 5 leaves out a prefix that published files have and that we write.
      const spelled = (key: string) => (theirs.has(key) ? key : key.replace(/^text_model\./, ''));
      t.equal(ours.size, theirs.size, `${model} ${name}: as many tensors`);
      t.ok(
        [...ours].every(([key, values]) => theirs.get(spelled(key)) === values),
        `${model} ${name}: numbers`,
      );
    }
    const text = readFileSync(join(back, 'text_encoder_2', 'config.json'), 'utf8');
    t.match(text, /"initializer_factor": 1\.0,/, `${model}: what Python reads as a float stays one`);
    const index = readJson(join(back, 'model_index.json')) as Record<string, unknown>;
    const wanted = readJson(join(golden(model), 'model_index.json')) as Record<string, unknown>;
    for (const name of names) t.same(index[name], wanted[name], `${model}: model_index.json names ${name}`);
  }
  rmSync(folder, { recursive: true });
});

test("a single file of a config that leaves diffusers' defaults out", async (t) => {
  const folder = scratch();
  const model = join(folder, 'model');
  cpSync(golden('tiny-sdxl'), model, { recursive: true });
  const file = join(model, 'unet', 'config.json');
  const { layers_per_block, ...config } = readJson(file) as Record<string, unknown>;
  t.equal(layers_per_block, 2);
  writeFileSync(file, JSON.stringify(config));
  const out = join(folder, 'single.safetensors');
  const { status, err } = await run(model, out, '--format', 'single-file', '--dtype', 'float16', '--quiet');
  t.equal(status, 0, err);
  t.same(contents(out), contents(goldenSingleFile('tiny-sdxl')));
  rmSync(folder, { recursive: true });
});

test('large weights are sharded, and chosen parts are a folder of their own', async (t) => {
  const out = join(scratch(), 'model');
  const { status, err } = await run(
    golden('tiny-sdxl'),
    out,
    '--save-keys',
    'unet,scheduler',
    '--max-shard-size',
    '500kB',
  );
  t.equal(status, 0, err);
  t.same(readdirSync(out).sort(), ['model_index.json', 'scheduler', 'unet']);
  const named = readJson(join(out, 'model_index.json')) as Record<string, unknown>;
  t.same(
    [named.vae, named.unet],
    [
      [null, null],
      ['diffusers', 'UNet2DConditionModel'],
    ],
    'what is left out',
  );
  const shards = readdirSync(join(out, 'unet')).filter((name) => name.endsWith('.safetensors'));
  t.ok(shards.length > 2, `${shards.length} shards`);
  const index = readJson(join(out, 'unet', 'diffusion_pytorch_model.safetensors.index.json')) as {
    metadata: { total_size: number };
    weight_map: Record<string, string>;
  };
  t.equal(index.metadata.total_size, 714_660 * 2);
  t.ok(Object.values(index.weight_map).every((file) => shards.includes(file)));
  const [got, want] = [componentContents(join(out, 'unet')), componentContents(golden('tiny-sdxl/unet'))];
  t.same(got, want);
  const plain = await run(golden('tiny-sdxl'), join(out, '..', 'plain'), '--save-keys', 'scheduler');
  t.match(plain, { status: 0, err: /plain: no weights, the rest as it was\n$/ });
  rmSync(join(out, '..'), { recursive: true });
});

test('a training checkpoint: trained parts or their averages, the rest from the model it began with', async (t) => {
  const folder = scratch();
  const checkpoint = join(folder, 'step-00000001');
  for (const [target, factor] of [
    ['unet', 2],
    ['ema/unet', 3],
  ] as const) {
    mkdirSync(join(checkpoint, target), { recursive: true });
    cpSync(golden('tiny-sdxl/unet/config.json'), join(checkpoint, target, 'config.json'));
    const from = openSafetensors(golden('tiny-sdxl/unet/diffusion_pytorch_model.safetensors'));
    const entries = [...from.tensors.values()].map(({ name, shape, dtype }) => {
      const values = decodeFloats(from.read(name), dtype).map((value) => value * factor);
      return { name, shape, dtype: 'float32' as const, bytes: new Uint8Array(values.buffer) };
    });
    from.close();
    writeSafetensors(join(checkpoint, target, 'diffusion_pytorch_model.safetensors'), entries);
  }
  const began = {
    ...{ model: golden('tiny-sdxl'), vae: '', train: { target: 'unet' } },
    objective: { prediction_type: 'epsilon' },
  };
  writeFileSync(join(checkpoint, 'state.json'), JSON.stringify({ run: began }));
  const first = (path: string) => {
    const weights = openWeights(path);
    const value = weights.floats(weights.names[0]).at(-1) as number;
    weights.close();
    return value;
  };
  const own = first(golden('tiny-sdxl/unet'));
  for (const [name, factor, flags] of [
    ['last', 2, []],
    ['averaged', 3, ['--ema', '--save-keys', 'all']],
  ] as const) {
    const out = join(folder, name);
    const { status, err } = await run(checkpoint, out, '--quiet', ...flags);
    t.equal(status, 0, err);
    t.equal(first(join(out, 'unet')), own * factor, name);
    t.ok(existsSync(join(out, 'vae', 'config.json')) && existsSync(join(out, 'tokenizer', 'merges.txt')));
  }
  rmSync(join(checkpoint, 'ema'), { recursive: true });
  const { status, err } = await run(checkpoint, join(folder, 'none'), '--ema', '--quiet');
  t.equal(status, 2);
  t.match(err, /^error: .* has no moving averages, as its run kept none; leave out --ema\n$/);
  rmSync(folder, { recursive: true });
});

test('what the trainer itself saves: adapters, and a model from random weights', async (t) => {
  const folder = scratch();
  const pictures = join(folder, 'pictures');
  mkdirSync(pictures);
  for (const i of [0, 1]) {
    const data = Uint8Array.from({ length: 3 * 32 * 32 }, (_, at) => (at * (i + 3)) % 255);
    writePng(join(pictures, `${i}.png`), { width: 32, height: 32, channels: 3, data });
    writeFileSync(join(pictures, `${i}.txt`), `picture ${i}`);
  }
  const trained = async (name: string, keys: object): Promise<string> => {
    const output = join(folder, name);
    const run = { output, steps: 1, dataset: { path: pictures, resolution: 32 }, ...keys };
    const file = join(folder, `${name}.ts`);
    const text = `import { defineRun, presets } from 'sdxl';\nconst run = ${JSON.stringify(run)};\n`;
    const model = 'model' in keys ? 'run.model' : 'presets.tiny';
    writeFileSync(file, `${text}export default defineRun({ ...run, model: ${model} });\n`);
    const { status, err } = await sdxl('train', file, '--quiet');
    t.equal(status, 0, err);
    return output;
  };
  const lora = await trained('lora', { model: golden('tiny-sdxl'), train: { target: 'lora' } });
  for (const [name, from] of [
    ['final', 'final'],
    ['checkpoint', 'checkpoints/step-00000001'],
  ]) {
    const out = join(folder, `${name}.safetensors`);
    const { out: about } = await sdxl('inspect', join(lora, from));
    t.match(about, /LoRA.*\n.*\n {2}rank 8; layers: \d+ in unet/, `${name}: a folder that holds an adapter`);
    const args = ['--format', 'lora-kohya', '--configs', golden('tiny-sdxl'), '--quiet'];
    const { status, err } = await run(join(lora, from), out, ...args);
    t.equal(status, 0, `${name} ${err}`);
    t.ok(
      nonEmpty(contents(out).keys()).every((key) => key.startsWith('lora_unet_')),
      `${name}: kohya's keys`,
    );
    const drawn = ['-p', 'picture 1', '-W', '32', '-H', '32', '--steps', '1', '-o', join(folder, 'x.png')];
    const beside = ['sample', '-m', golden('tiny-sdxl'), '--lora', join(lora, from), '--quiet'];
    t.equal((await sdxl(...beside, ...drawn)).status, 0, `${name}: sample takes the folder`);
    const alone = await sdxl('sample', '-m', join(lora, from), ...drawn);
    t.match(alone.err, /^error: .* holds a LoRA, which sdxl sample takes as --lora .*made for\n$/);
  }

  const vae = golden('tiny-sdxl/vae');
  const objective = { prediction_type: 'v_prediction' };
  const made = await trained('scratch', {
    vae,
    objective,
    train: { text_encoders: true },
    ema: { decay: 0.9 },
  });
  const out = join(folder, 'exported');
  // By a link from elsewhere: the run's tokenizers lie beside its checkpoints.
  const latest = join(folder, 'latest');
  symlinkSync(join(made, 'checkpoints', 'step-00000001'), latest);
  const { status, err } = await run(latest, out, '--ema', '--quiet');
  t.equal(status, 0, err);
  const index = readJson(join(out, 'model_index.json')) as Record<string, unknown>;
  t.equal(index._class_name, 'StableDiffusionXLPipeline');
  t.ok(
    existsSync(join(out, 'scheduler', 'scheduler_config.json')),
    'a preset has a scheduler and no folder of it',
  );
  for (const name of ['unet', 'vae', 'text_encoder', 'text_encoder_2']) {
    const [ours, final] = [componentContents(join(out, name)), componentContents(join(made, 'final', name))];
    t.same(ours, final, `${name} is what the finished run has`);
  }
  t.same(
    readJson(join(out, 'scheduler', 'scheduler_config.json')),
    readJson(join(made, 'final', 'scheduler', 'scheduler_config.json')),
  );
  const drawn = [
    'sample',
    '-m',
    out,
    '-p',
    'picture 1',
    '--steps',
    '1',
    '-o',
    join(folder, 'x.png'),
    '--quiet',
  ];
  t.equal((await sdxl(...drawn)).status, 0, 'it draws');
  const checkpoint = join(made, 'checkpoints', 'step-00000001');
  t.match((await sdxl('inspect', checkpoint)).out, /text_encoder .*\n.*text_encoder_2 .*\n.*unet /);
  for (const [path, says] of [
    [made, /is the folder of a run; give what it has made, .*scratch.final\n$/],
    [
      checkpoint,
      /is a checkpoint of training; make a model of it with sdxl export .* FOLDER, and give that\n$/,
    ],
  ] as const)
    t.match((await sdxl('sample', '-m', path, '-p', 'x')).err, says);
  t.match((await sdxl('inspect', made)).err, /is the folder of a run; give what it has made, /);

  const trainedOn = { ...objective, zero_terminal_snr: true };
  const tuned = await trained('tuned', { model: golden('tiny-sdxl'), objective: trainedOn });
  const single = join(folder, 'tuned.safetensors');
  const file = await run(
    ...[join(tuned, 'checkpoints', 'step-00000001'), single, '--format', 'single-file', '--quiet'],
  );
  t.equal(file.status, 0, file.err);
  t.ok(
    ['v_pred', 'ztsnr'].every((mark) => contents(single).has(mark)),
    'it says how it predicts',
  );
  const scheduler = openSingleFile(single, { configs: golden('tiny-sdxl') }).config('scheduler');
  t.match(scheduler, { prediction_type: 'v_prediction', rescale_betas_zero_snr: true });
  rmSync(folder, { recursive: true });
});
