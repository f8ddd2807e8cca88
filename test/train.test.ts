// Training as a whole, on the tiny golden model and a folder of a few pictures: a run leaves everything it promises; a run
// that is stopped and resumed ends in the same bytes as one that is not; batches split or accumulated see the same draws.
import { createHash } from 'node:crypto';
import {
  appendFileSync,
  copyFileSync,
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
import { findLibrary } from '../engine/cpu/build.ts';
import { type Device, nativeDevice, openDevice } from '../engine/device.ts';
import type { Driver, Exchange } from '../engine/driver.ts';
import { decodeFloats } from '../io/dtype.ts';
import { readPicture, writePng } from '../io/image.ts';
import { openSafetensors } from '../io/safetensors.ts';
import { openModel } from '../models/checkpoint.ts';
import { parseTextConfig } from '../models/clip.ts';
import { mergeLora } from '../models/lora.ts';
import { loadPipeline } from '../models/pipeline.ts';
import { loadTokenizer } from '../models/tokenizer.ts';
import { parseUNetConfig } from '../models/unet.ts';
import { parseVaeConfig } from '../models/vae.ts';
import { listCheckpoints } from '../train/checkpoint.ts';
import { loadRuns } from '../train/load_run.ts';
import { readLog } from '../train/log.ts';
import type { ObjectiveSettings } from '../train/objective.ts';
import { type RunInput, resolveRun } from '../train/run.ts';
import { openMaterials, openSession } from '../train/session.ts';
import { type Outcome, train } from '../train/trainer.ts';
import { goldenFolder, packageRoot } from './golden.ts';

const device = openDevice('auto');
const model = join(goldenFolder, 'tiny-sdxl');
const folder = mkdtempSync(join(tmpdir(), 'sdxl-train-'));
const pictures = join(folder, 'pictures');
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

mkdirSync(pictures);
for (let i = 0; i < 6; i++) {
  const data = Uint8Array.from({ length: 3 * 40 * 48 }, (_, at) => (at * (i + 3)) % 251);
  writePng(join(pictures, `${i}.png`), { width: 48, height: 40, channels: 3, data });
  writeFileSync(join(pictures, `${i}.txt`), `picture ${i}\nstripes, number ${i}, colours\n`);
}

const silent = { line() {}, progress() {} };
const locate = {
  model: async (path: string) => openModel(path),
  vae: async (path: string) => openModel(path),
};

interface How {
  /** Asks to stop at that step. */
  until?: number;
  during?: string;
  checkpoint?: string;
  /** Devices that take passes in turn with the first. */
  further?: readonly Device[];
}

/** Trains in this process. */
async function run(
  input: RunInput,
  { until, during = 'training', checkpoint, further }: How = {},
): Promise<Outcome> {
  const resolved = resolveRun(input, 'test', 'test');
  const session = openSession(await openMaterials(resolved, locate, silent), device, further);
  const stop = { asked: false };
  const progress = (label: string, done: number) => {
    if (label === during && until !== undefined && done >= until) stop.asked = true;
  };
  try {
    return await train(session, { ...silent, progress }, stop, checkpoint);
  } finally {
    session.release();
  }
}

/** What the log says of each update: step, loss, validation loss. */
const losses = (output: string) =>
  readLog(join(output, 'log.jsonl')).map(({ step, loss, validation_loss }) => [step, loss, validation_loss]);

/** Everything that decides how a run goes on: weights, averages, optimizer. */
function digest(checkpoint: string): string {
  const hash = createHash('sha256');
  for (const name of readdirSync(checkpoint, { recursive: true, encoding: 'utf8' }).sort())
    if (name.endsWith('.safetensors')) hash.update(name).update(readFileSync(join(checkpoint, name)));
  return hash.digest('hex');
}

const basic = (output: string): RunInput => ({
  output: join(folder, output),
  model,
  seed: 3,
  steps: 5,
  batch_size: 2,
  gradient_accumulation_steps: 2,
  dataset: {
    path: pictures,
    resolution: 32,
    random_flip: true,
    crops: 2,
    caption_dropout_rate: 0.3,
    cache: join(folder, 'cache'),
  },
  optimizer: { lr: 1e-3 },
  lr_scheduler: { name: 'cosine', warmup_steps: 1 },
  ema: { decay: 0.9 },
  checkpoints: { every_steps: 2, keep: 2 },
});

test('a run leaves what it promises, and a resumed one the same bytes', async (t) => {
  const before = device.memory.storages;
  const previews = { prompts: ['stripes', 'a picture'], num_inference_steps: 2, every_steps: 2 };
  const validation = { samples: 4, every_steps: 2 };
  const whole = { ...basic('whole'), previews, validation };
  const { folder: final } = await run(whole);
  const output = whole.output as string;
  t.same(
    listCheckpoints(output).map((path) => path.slice(-8)),
    ['00000004', '00000005'],
    'the newest two checkpoints',
  );
  t.equal(readLog(join(output, 'log.jsonl')).length, 5, 'a line an update');
  t.match(readFileSync(join(output, 'loss.svg'), 'utf8'), /<polyline/, 'a loss curve');
  const sheet = await readPicture(join(output, 'previews.png'));
  t.same([sheet.width, sheet.height], [4 + 2 * 36, 4 + 3 * 36], 'three rows of two previews');
  t.ok(readdirSync(join(output, 'tensorboard')).length === 1, 'an event file');
  loadPipeline(openModel(final), { device, dtype: 'float32' }).release();
  t.pass('the finished model opens');

  const broken = { ...basic('broken'), previews, validation };
  const first = await run(broken, { until: 3 });
  t.equal(first.stopped, true);
  t.equal(first.position.step, 3, 'stopped after the update');
  t.match(first.folder, /step-00000003$/, 'and saved there');
  // What a run that is killed later leaves beside its last checkpoint.
  appendFileSync(join(broken.output as string, 'log.jsonl'), '{"step":4,"loss":9}\n{"step":5,"lo');
  const drawn = join(broken.output as string, 'previews', 'step-00000099');
  mkdirSync(drawn);
  await run(broken, { checkpoint: first.folder });
  t.notOk(existsSync(drawn), 'what comes later is forgotten');
  const newest = (path: string) => listCheckpoints(path).at(-1) as string;
  t.equal(
    digest(newest(broken.output as string)),
    digest(newest(output)),
    'the same weights, optimizer and EMA',
  );
  t.same(losses(broken.output as string), losses(output), 'the same losses, each once');
  t.same(
    losses(output).flatMap(([step, , measured]) => (measured === undefined ? [] : [step])),
    [2, 4, 5],
    'the validation loss is measured when it is due, and at the end',
  );
  t.equal(device.memory.storages, before, 'live tensors');
});

test('a batch and its halves see the same draws', async (t) => {
  const losses = async (output: string, batch_size: number, gradient_accumulation_steps: number) => {
    const input = { ...basic(output), batch_size, gradient_accumulation_steps, steps: 3 };
    await run(input);
    return readLog(join(input.output as string, 'log.jsonl')).map(({ loss }) => loss);
  };
  const [whole, halves] = [await losses('four', 4, 1), await losses('two', 2, 2)];
  whole.forEach((loss, i) => {
    t.ok(Math.abs(loss - halves[i]) < 1e-5 * loss, `update ${i + 1}: ${loss} and ${halves[i]}`);
  });
});

test('the validation loss sees the same draws each time, with the averaged weights', async (t) => {
  for (const target of ['unet', 'vae'] as const) {
    const still = `still-${target}`;
    const task: RunInput = { train: { target }, validation: { samples: 6, every_steps: 1 }, steps: 3 };
    await run({ ...basic(still), ...task, optimizer: { lr: 0 } });
    const [first, ...others] = losses(join(folder, still));
    const same = others.every(([, , measured]) => measured === first[2]);
    t.ok(first[2] && same, `${target}: weights that stand still have one validation loss, ${first[2]}`);
    t.not(others[0][1], first[1], 'while the updates differ in theirs');
    const moved = async (output: string, decay: number) => {
      await run({ ...basic(output), ...task, ema: { decay } });
      return losses(join(folder, output))[2];
    };
    const [own, averaged] = [await moved(`own-${target}`, 0), await moved(`averaged-${target}`, 0.9)];
    t.equal(own[1], averaged[1], 'an average changes no update');
    t.not(own[2], averaged[2], 'but the validation loss is its own');
  }
});

test('a run stopped while it prepares leaves what is prepared, and nothing else', async (t) => {
  const input = { ...basic('early'), steps: 1 };
  const cached = { ...input, dataset: { ...input.dataset, cache: join(folder, 'early-cache') } };
  for (const during of ['encoding pictures', 'encoding captions']) {
    const { stopped, folder: saved, position } = await run(cached, { during, until: 1 });
    t.same([stopped, saved, position.step], [true, '', 0], during);
    t.same(listCheckpoints(input.output as string), [], 'no checkpoint');
  }
  t.equal((await run(cached)).stopped, false, 'and begins anew');
});

/** Trains a run whole, and again stopped at the first update and resumed: the same checkpoint, or the names that differ. */
async function resumes(
  t: { equal(a: unknown, b: unknown, message: string): unknown },
  name: string,
  more: RunInput,
) {
  const input = (output: string): RunInput => ({ ...basic(output), steps: 3, ...more });
  const whole = await run(input(`${name}-whole`));
  const first = await run(input(`${name}-broken`), { until: 1 });
  await run(input(`${name}-broken`), { checkpoint: first.folder });
  const [a, b] = ['whole', 'broken'].map(
    (end) => listCheckpoints(join(folder, `${name}-${end}`)).at(-1) as string,
  );
  t.equal(digest(a), digest(b), `${name}: resumed bit for bit`);
  return whole.folder;
}

test('LoRA with gradient checkpointing', async (t) => {
  const final = await resumes(t, 'lora', {
    train: { target: 'lora', gradient_checkpointing: true },
    lora: { rank: 2, alpha: 4, targets: ['to_q', 'conv1'] },
    previews: { prompts: ['stripes'], num_inference_steps: 1 },
  });
  const pipeline = loadPipeline(openModel(model), { device, dtype: 'float32' });
  const targets = {
    unet: pipeline.unet,
    unetConfig: pipeline.unetConfig,
    text_encoder: undefined,
    text_encoder_2: undefined,
  };
  t.ok(mergeLora(targets, join(final, 'pytorch_lora_weights.safetensors')) > 10, 'its file merges');
  pipeline.release();
});

test('LoRA on the text encoders too, as diffusers and sdxl sample read it', async (t) => {
  const output = await run({
    ...basic('lora-texts-file'),
    train: { target: 'lora', text_encoders: true },
    lora: { rank: 2, alpha: 4 },
    ema: { decay: 0 },
    steps: 2,
  });
  const path = join(output.folder, 'pytorch_lora_weights.safetensors');
  const file = openSafetensors(path);
  const config = JSON.parse(file.metadata.lora_adapter_metadata) as Record<string, unknown>;
  for (const name of ['unet', 'text_encoder', 'text_encoder_2'])
    t.same([config[`${name}.r`], config[`${name}.lora_alpha`]], [2, 4], name);
  t.same(config['text_encoder_2.target_modules'], ['q_proj', 'k_proj', 'v_proj', 'out_proj']);
  const key = (part: string) =>
    `text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_${part}.weight`;
  const [a, b] = ['A', 'B'].map((part) => decodeFloats(file.read(key(part)), 'float32'));
  t.ok(b.some((x) => x !== 0) && a.some((x) => x !== 0), 'it has learnt');
  t.notSame(
    [...a],
    [...decodeFloats(file.read(key('A').replace('encoder', 'encoder_2')), 'float32')],
    'two encoders begin with other numbers',
  );
  const last = [...file.tensors.keys()]
    .filter((name) => /^text_encoder\..*layers\.\d+\..*lora_B/.test(name))
    .at(-1) as string;
  t.ok(
    decodeFloats(file.read(last), 'float32').every((x) => x === 0),
    "nobody reads the first encoder's last layer, and it stays",
  );
  file.close();
  const pipeline = loadPipeline(openModel(model), { device, dtype: 'float32' });
  const [text_encoder, text_encoder_2] = pipeline.text.encoders.map(({ encoder }) => encoder);
  const { unet, unetConfig } = pipeline;
  t.ok(mergeLora({ unet, unetConfig, text_encoder, text_encoder_2 }, path) > 16, 'its names are known');
  pipeline.release();
});

test('captions of several chunks', async (t) => {
  const long = join(folder, 'long');
  mkdirSync(long);
  const { chunksOf } = loadTokenizer(openModel(model).folder('tokenizer'));
  for (const chunks of [1, 2, 3]) {
    let text = 'stripes';
    while (chunksOf(text) < chunks) text += ', stripes';
    copyFileSync(join(pictures, `${chunks}.png`), join(long, `${chunks}.png`));
    writeFileSync(join(long, `${chunks}.txt`), text);
  }
  const { dataset } = basic('long');
  const more = (max_token_length: number): RunInput => ({
    dataset: { ...dataset, path: long, max_token_length, caption_dropout_rate: 0 },
    batch_size: 3,
    gradient_accumulation_steps: 1,
  });
  const told: string[] = [];
  const materials = (tokens: number) =>
    openMaterials(resolveRun({ ...basic('long'), ...more(tokens) }, 'test', 'test'), locate, silent);
  for (const [tokens, count] of [
    [75, 2],
    [150, 1],
    [225, 0],
  ]) {
    const session = openSession(await materials(tokens), device);
    told.length = 0;
    await session.task.fillCache?.({ ...silent, line: (text) => told.push(text) }, { asked: false });
    t.equal(told.length, count, `${tokens}: ${count} are cut off`);
    const { context } = await session.task.prepare({ bucket: 0, samples: [0, 1, 2] }, 0);
    t.same(context.shape.slice(0, 2), [3, (77 * tokens) / 75]);
    t.same(session.task.blank({ bucket: 0, samples: [0, 1, 2] }).context.shape, context.shape);
    session.release();
  }
  await resumes(t, 'long', { ...more(150), train: { target: 'lora', text_encoders: true } });
});

test('prior preservation: pictures of the class beside, weighed by prior_loss_weight', async (t) => {
  const classes = join(folder, 'class');
  mkdirSync(classes);
  for (let i = 0; i < 9; i++) {
    const data = Uint8Array.from({ length: 3 * 40 * 48 }, (_, at) => (at * (i + 20)) % 241);
    writePng(join(classes, `${i}.png`), { width: 48, height: 40, channels: 3, data });
  }
  const { dataset } = basic('prior');
  const more: RunInput = {
    dataset: { ...dataset, class_data_dir: classes, class_prompt: 'a pattern', caption_dropout_rate: 0 },
    objective: { prior_loss_weight: 0.25, snr_gamma: 5 },
  };
  const materials = await openMaterials(
    resolveRun({ ...basic('prior'), ...more }, 'test', 'test'),
    locate,
    silent,
  );
  const { pictures, updatesPerEpoch } = materials;
  t.equal(pictures.samples.length, 6 + 9);
  t.equal(updatesPerEpoch, 3, 'six of each in updates of four');
  const session = openSession(materials, device);
  await session.task.fillCache?.(silent, { asked: false });
  const [own, prior] = [false, true].map((of) =>
    pictures.samples.findIndex((each) => (each.prior ?? false) === of),
  );
  const weights = async (objective: Partial<ObjectiveSettings>, samples: number[]) => {
    Object.assign(session.run.objective, objective);
    return [...((await session.task.prepare({ bucket: 0, samples }, 0)).weights.values as Float32Array)];
  };
  const alone = await weights({ prior_loss_weight: 1 }, [own, prior]);
  t.same(
    await weights({ prior_loss_weight: 0.25 }, [own, prior]),
    [alone[0], 0.25 * alone[1]],
    "beside min-SNR's",
  );
  t.ok(alone.every((weight) => weight > 0 && weight <= 1));
  t.same(pictures.samples[prior].captions, ['a pattern']);
  t.not(pictures.samples[prior].key, pictures.samples[own].key, 'of one name, but with other draws');
  session.release();
  await resumes(t, 'prior', more);
});

test('chosen parts in bfloat16 with float32 masters', async (t) => {
  const final = await resumes(t, 'parts', { dtype: 'bfloat16', train: { parts: ['attn2'] } });
  const [before, after] = [openModel(model), openModel(final)].map((source) => source.weights('unet'));
  const changed = after.names.filter((name) => {
    const [a, b] = [before.floats(name), after.floats(name)];
    return a.some((x, i) => Math.abs(x - b[i]) > 0.01 * Math.abs(x) + 1e-6);
  });
  t.ok(
    changed.length > 0 && changed.every((name) => name.includes('attn2')),
    `${changed.length} weights changed`,
  );
  for (const weights of [before, after]) weights.close();
});

test('a model from a preset, with its text encoders and a vocabulary of its own', async (t) => {
  const json = (component: string) => openModel(model).config(component);
  const shorter = { vocab_size: 600, max_position_embeddings: 20 };
  const final = await resumes(t, 'preset', {
    model: {
      unet: parseUNetConfig(json('unet')),
      vae: parseVaeConfig(json('vae')),
      text_encoder: { ...parseTextConfig(json('text_encoder')), ...shorter },
      text_encoder_2: { ...parseTextConfig(json('text_encoder_2')), ...shorter },
      scheduler: json('scheduler'),
      requires_aesthetics_score: false,
    },
    train: { text_encoders: true },
  });
  const pipeline = loadPipeline(openModel(final), { device, dtype: 'float32' });
  const [{ ids }] = pipeline.text.encoders.map(({ tokenizer }) => tokenizer.encode('stripes, number 3'));
  t.equal(ids.length, 20, 'tokens as the preset says');
  t.ok(ids.indexOf(ids.reduce((a, b) => Math.max(a, b))) < 8, "the captions' words are merged");
  pipeline.release();
});

test('the refiner, which has one text encoder and an aesthetic score', async (t) => {
  const refiner = join(goldenFolder, 'tiny-sdxl-refiner');
  const plain = basic('refiner');
  const dataset = { ...plain.dataset, resolution: 64 };
  const input = { ...plain, model: refiner, dataset, ema: { decay: 0 }, steps: 0, epochs: 1, log_every: 5 };
  const { folder: final, position } = await run(input);
  t.same(position, { step: 2, epoch: 1, update: 0 }, 'six pictures, four to an update');
  t.same(
    losses(input.output as string).map(([step]) => step),
    [2],
    'the log has the last update, though it is no fifth',
  );
  loadPipeline(openModel(final), { device, dtype: 'float32' }).release();
  t.same(openModel(final).modelIndex, openModel(refiner).modelIndex);
});

/** A second device, between which and the first tensors are copied by the host. */
function another(): Device {
  const library = findLibrary();
  const other = 'path' in library ? nativeDevice(library.path) : openDevice('reference');
  const exchanges = new Map<Exchange, Driver>();
  for (const { driver } of [device, other]) {
    const exchange: Exchange = {
      mark: () => 0n,
      after() {},
      finish() {},
      copy(to, from, source, bytes) {
        const carried = new Uint8Array(bytes);
        exchanges.get(source)?.download(from, 0, carried);
        driver.upload(to, 0, carried);
      },
    };
    exchanges.set(exchange, driver);
    Object.assign(driver, { exchange });
  }
  return other;
}

// An update is of two passes, but each epoch's last one of a single one.
test('two devices end in the bytes of one, whatever is trained, and resume on one or two', async (t) => {
  const further = [another()];
  const held = () => [device, ...further].map(({ memory }) => memory.storages);
  const before = held();
  const tasks: Record<string, RunInput> = {
    unet: { train: { gradient_checkpointing: true } },
    parts: { dtype: 'bfloat16', train: { parts: ['attn2'] } },
    lora: { train: { target: 'lora' }, lora: { rank: 2, alpha: 4, targets: ['to_q', 'conv1'] } },
    texts: { train: { text_encoders: true } },
    'lora-texts': {
      train: { target: 'lora', text_encoders: true },
      lora: { rank: 2, text_encoder_targets: ['q_proj', 'fc1'] },
      optimizer: { lr: 1e-3, text_encoder_lr: 1e-4 },
    },
    vae: { train: { target: 'vae' } },
  };
  const newest = (output: string) => digest(listCheckpoints(join(folder, output)).at(-1) as string);
  for (const [name, task] of Object.entries(tasks)) {
    const input = (ending: string): RunInput => ({ ...basic(`${name}-${ending}`), steps: 3, ...task });
    await run(input('one'));
    const { folder: checkpoint } = await run(input('two'), { until: 1, further });
    if (name === 'unet') {
      await run(input('joined'), { checkpoint, further });
      t.equal(newest('unet-joined'), newest('unet-one'), 'the second joins in again');
    }
    await run(input('two'), { checkpoint });
    t.equal(newest(`${name}-two`), newest(`${name}-one`), name);
    t.same(losses(join(folder, `${name}-two`)), losses(join(folder, `${name}-one`)), `${name}: losses`);
  }
  t.same(held(), before, 'live tensors');
  t.ok(further[0].memory.peak > 0, 'the second device had its passes');
});

test('every recipe in configs/ is a run', async (t) => {
  const recipes = readdirSync(join(packageRoot, 'configs')).filter((name) => /^(?!emoji).*\.ts$/.test(name));
  t.ok(recipes.length >= 3);
  for (const name of recipes) {
    const [recipe] = await loadRuns(join(packageRoot, 'configs', name), ['dataset.path=here']);
    t.equal(recipe.dataset.path, 'here', name);
  }
});

test('a VAE', async (t) => {
  const output = join(folder, 'vae');
  await run({
    ...basic('vae'),
    train: { target: 'vae' },
    steps: 2,
  });
  t.ok(existsSync(join(output, 'previews.png')));
  const { scaling_factor } = JSON.parse(readFileSync(join(output, 'final', 'vae', 'config.json'), 'utf8'));
  t.ok(scaling_factor > 0 && scaling_factor !== 0.13025, 'the scale is measured');
});
