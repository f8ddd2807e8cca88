// What can be trained, and on what: adapters on the UNet and on the text encoders, parts of the UNet, the refiner, the VAE; captions of
// several chunks, and pictures of a class beside those of the subject.
import { copyFileSync, existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { decodeFloats } from '../../io/dtype.ts';
import { writePng } from '../../io/image.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { openModel, openWeights } from '../../models/checkpoint/checkpoint.ts';
import { mergeLora } from '../../models/lora/lora.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import { loadTokenizer } from '../../models/text/tokenizer.ts';
import { openMaterials } from '../../train/materials.ts';
import type { ObjectiveSettings } from '../../train/objective/objective.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { goldenFolder, maxDifference } from '../support/golden.ts';
import {
  basic,
  device,
  folder,
  locate,
  losses,
  model,
  pictures,
  resumes,
  run,
  sessionOf,
  silent,
} from '../support/small_runs.ts';

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
  const other = decodeFloats(file.read(key('A').replace('encoder', 'encoder_2')), 'float32');
  const draws = (values: Float32Array, width: number) =>
    values.slice(0, a.length).map((x) => x * width ** 0.5);
  t.ok(maxDifference(draws(a, 32), draws(other, 48)) > 0.5, 'two encoders begin with other numbers');
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

test("the text encoders' own learning rate, and that of B", async (t) => {
  // AdamW's first step moves each weight that has a gradient by the learning rate.
  const numbers = (path: string, names: RegExp) => {
    const weights = openWeights(path);
    const found = weights.names.filter((name) => names.test(name)).map((name) => weights.floats(name));
    weights.close();
    return found.flatMap((values) => [...values]);
  };
  const greatest = (moved: readonly number[]) => moved.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  const trained = (target: 'unet' | 'lora', loraplus_lr_ratio = 1) =>
    run({
      ...basic(`rates-${target}-${loraplus_lr_ratio}`),
      lora: { loraplus_lr_ratio },
      ...{ steps: 1, ema: { decay: 0 }, lr_scheduler: { name: 'constant' } },
      optimizer: { lr: 1e-3, text_encoder_lr: 1e-4, weight_decay: 0 },
      train: { target, text_encoders: true },
    });
  const near = (moved: number, rate: number, what: string) =>
    t.ok(Math.abs(moved / rate - 1) < 2e-3, `${what}: ${moved}`);
  const whole = (await trained('unet')).folder;
  const adapters = (await trained('lora')).folder;
  const plus = (await trained('lora', 8)).folder;
  for (const [component, rate] of [
    ['unet', 1e-3],
    ['text_encoder', 1e-4],
    ['text_encoder_2', 1e-4],
  ] as const) {
    const [before, after] = [model, whole].map((path) => numbers(join(path, component), /./));
    near(greatest(after.map((x, i) => x - before[i])), rate, component);
    // Half of an adapter begins at zero.
    near(
      greatest(numbers(adapters, new RegExp(`^${component}\\..*lora_B`))),
      rate,
      `adapters of ${component}`,
    );
    near(
      greatest(numbers(plus, new RegExp(`^${component}\\..*lora_B`))),
      8 * rate,
      `B of LoRA+, ${component}`,
    );
  }
});

test('captions of several chunks', async (t) => {
  const long = join(folder, 'long');
  mkdirSync(long);
  const { chunksOf } = loadTokenizer(openModel(model).folder('tokenizer'));
  for (const chunks of [1, 2, 3]) {
    let text = 'stripes';
    while (chunksOf(text).length < chunks) text += ', stripes';
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
    told.length = 0;
    const session = await sessionOf(await materials(tokens), { ...silent, line: (text) => told.push(text) });
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
  const session = await sessionOf(materials);
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
  const begun = { ...basic('prior-moved'), ...more };
  const { folder: checkpoint } = await run(begun, { until: 1 });
  const class_data_dir = join(folder, 'class-moved');
  renameSync(classes, class_data_dir);
  const { stopped } = await run({ ...begun, dataset: { ...begun.dataset, class_data_dir } }, { checkpoint });
  t.notOk(stopped, 'a class is compared by its pictures, not by its path');
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
