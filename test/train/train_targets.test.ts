// What can be trained, and on what: adapters on the UNet and on the text encoders, parts of the UNet, a model from a preset, the
// refiner, the VAE; captions of several chunks, and pictures of a class beside those of the subject.
import {
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { type AnyModule, namedParameters, unload } from '../../engine/module.ts';
import { decodeFloats, encodeNumbers } from '../../io/dtype.ts';
import { writePng } from '../../io/image.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import { openModel, openWeights } from '../../models/checkpoint/checkpoint.ts';
import { weightEntries } from '../../models/checkpoint/save.ts';
import { buildComponent } from '../../models/formats/components.ts';
import { type ModelPreset, presets } from '../../models/formats/presets.ts';
import { randomModel } from '../../models/formats/random_weights.ts';
import { openSingleFile, openVaeFile } from '../../models/formats/singlefile.ts';
import { mergeLora } from '../../models/lora/lora.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import { parseTextConfig } from '../../models/text/clip.ts';
import { loadTokenizer } from '../../models/text/tokenizer.ts';
import { unet as denoiser, parseUNetConfig } from '../../models/unet/unet.ts';
import { parseVaeConfig } from '../../models/vae/vae.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { openMaterials } from '../../train/materials.ts';
import type { ObjectiveSettings } from '../../train/objective/objective.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { sdxl } from '../support/command_line.ts';
import { writeComponent } from '../support/controlnet_golden.ts';
import { goldenFolder, maxDifference } from '../support/golden.ts';
import { nonEmpty } from '../support/non_empty.ts';
import {
  basic,
  device,
  digest,
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
    t.ok(Math.abs(moved / rate - 1) < 0.01, `${what}: ${moved}`);
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

/** The golden model's shape, with a vocabulary that is to be learnt. */
function smallPreset(): ModelPreset {
  const json = (component: string) => openModel(model).config(component);
  const shorter = { vocab_size: 600, max_position_embeddings: 20 };
  return {
    unet: parseUNetConfig(json('unet')),
    vae: parseVaeConfig(json('vae')),
    text_encoder: { ...parseTextConfig(json('text_encoder')), ...shorter },
    text_encoder_2: { ...parseTextConfig(json('text_encoder_2')), ...shorter },
    scheduler: json('scheduler'),
    requires_aesthetics_score: false,
  };
}

test('taken up again in another folder, a preset keeps the vocabulary that it was trained with', async (t) => {
  const input: RunInput = { ...basic('vocabulary'), model: smallPreset(), steps: 2 };
  const { folder: checkpoint } = await run(input, { until: 1 });
  const described = join(folder, 'described');
  cpSync(pictures, described, { recursive: true });
  for (let i = 0; i < 6; i++) writeFileSync(join(described, `${i}.txt`), 'wholly unlike words');
  const [was, is] = ['vocabulary', 'vocabulary-on'].map((name) => join(folder, name));
  const dataset = { ...input.dataset, path: described };
  await run({ ...input, output: is, dataset }, { checkpoint });
  const learnt = (output: string) =>
    readFileSync(join(output, 'tokenizers', 'tokenizer', 'merges.txt'), 'utf8');
  t.match(learnt(was), /^#version: 0\.2\n./);
  t.equal(learnt(is), learnt(was));
  rmSync(join(was, 'tokenizers'), { recursive: true });
  await t.rejects(run(input, { checkpoint }), { name: 'UserError', message: /tokenizers is gone, by which/ });
});

test('a model from a preset, with its text encoders and a vocabulary of its own', async (t) => {
  const final = await resumes(t, 'preset', { model: smallPreset(), train: { text_encoders: true } });
  const pipeline = loadPipeline(openModel(final), { device, dtype: 'float32' });
  const [{ ids }] = pipeline.text.encoders.map(({ tokenizer }) => tokenizer.encode('stripes, number 3'));
  t.equal(ids.length, 20, 'tokens as the preset says');
  t.ok(ids.indexOf(ids.reduce((a, b) => Math.max(a, b))) < 8, "the captions' words are merged");
  pipeline.release();
});

test("a preset's parts that are not trained are in the finished model as they began", async (t) => {
  const preset = smallPreset();
  const input = { ...basic('frozen'), model: preset, seed: 5, steps: 1 };
  const { folder: final } = await run(input);
  const begun = randomModel(preset, { seed: 5 });
  for (const name of ['text_encoder', 'text_encoder_2', 'vae']) {
    const { module } = buildComponent(begun.config(name)) as { module: AnyModule };
    begun.load(name, module, device, 'float32');
    const weights = openModel(final).weights(name);
    const own = weightEntries(namedParameters(module));
    t.same(weights.names.toSorted(), own.map((entry) => entry.name).toSorted(), name);
    t.ok(
      own.every(({ name, bytes }) => Buffer.from(weights.bytes(name)).equals((bytes as () => Uint8Array)())),
      `${name}: to the bit`,
    );
    weights.close();
    unload(module);
  }
});

test('what is not trained comes from the files that a run names, and not from what lies beside or lends', async (t) => {
  const entry = (name: string, shape: readonly number[]) => {
    const values = new Float32Array(shape[0] * shape[1]).fill(0.1);
    return { name, dtype: 'float32' as const, shape, bytes: encodeNumbers(values, 'float32') };
  };
  const lora = join(folder, 'texts.safetensors');
  const layer = 'lora_te1_text_model_encoder_layers_0_self_attn_q_proj';
  writeSafetensors(lora, [
    entry(`${layer}.lora_down.weight`, [2, 32]),
    entry(`${layer}.lora_up.weight`, [32, 2]),
  ]);
  // A single file whose text encoder is another than that of the folder which lends it tokenizers and configs.
  const file = join(folder, 'single.safetensors');
  const call = ['export', model, file, '--format', 'single-file', '--lora', lora, '--quiet'];
  t.equal((await sdxl(...call)).status, 0);
  const source = openSingleFile(file, { configs: openModel(model) });
  const coders = join(folder, 'coders');
  cpSync(join(model, 'vae'), coders, { recursive: true });
  const [named] = readdirSync(coders).filter((name) => name.endsWith('.safetensors'));
  renameSync(join(coders, named), join(coders, 'mine.safetensors'));
  for (const other of [named, 'large.bin']) writeFileSync(join(coders, other), 'another');
  const vae = openVaeFile(join(coders, 'mine.safetensors'));
  const input = { ...basic('from-files'), steps: 1, previews: { prompts: [] } };
  const places = { ...locate, model: async () => source, vae: async () => vae };
  const { folder: final } = await run({ ...input, vae: 'named' }, { locate: places });
  t.same(readdirSync(join(final, 'vae')).sort(), ['config.json', named], 'the VAE alone');
  for (const [name, from] of [
    ['text_encoder', source],
    ['text_encoder_2', source],
    ['vae', vae],
  ] as const) {
    const [want, made] = [from, openModel(final)].map((each) => each.weights(name));
    t.ok(
      nonEmpty(made.names).every((key) => maxDifference(made.floats(key), want.floats(key)) === 0),
      name,
    );
    for (const each of [want, made]) each.close();
  }
  const pipeline = loadPipeline(openModel(final), { device, dtype: 'float32' });
  pipeline.release();
});

test("another UNet in the model's place of its own trains as in a model that has it", async (t) => {
  const json = openModel(model).config('unet');
  const shapes = [...namedParameters(denoiser(parseUNetConfig(json)))].map(
    ([key, p]) => [key, p.shape] as const,
  );
  const unet = writeComponent(join(folder, 'another-unet'), 'another', json, shapes);
  const whole = join(folder, 'with-unet');
  const joined = ['export', model, whole, '--unet', unet, '--dtype', 'float32', '--quiet'];
  t.equal((await sdxl(...joined)).status, 0);
  const input = (name: string): RunInput => ({ ...basic(name), steps: 2, train: { target: 'lora' } });
  await run({ ...input('beside'), unet }, { until: 1 });
  const [first] = listCheckpoints(join(folder, 'beside'));
  await run({ ...input('beside'), unet }, { checkpoint: first });
  await run({ ...input('within'), model: whole });
  await run(input('own'));
  const [beside, within, own] = ['beside', 'within', 'own'].map((name) =>
    digest(listCheckpoints(join(folder, name)).at(-1) as string),
  );
  t.equal(beside, within);
  t.not(beside, own);
  for (const [more, message] of [
    [{ model: presets.tiny }, /"unet" stands in a model's place for its own, and "model" is a preset/],
    [{ train: { target: 'vae' } }, /"unet" has no part in target "vae"; leave it out/],
  ] as const)
    t.throws(() => resolveRun({ unet, ...more }, 'x.ts', 'x'), { name: 'UserError', message });
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
