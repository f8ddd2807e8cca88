// The models that a run begins with: weights and a vocabulary of its own from a preset, parts from files that it names, another UNet in
// the model's place. What is not trained of them is in the finished model as it was.
import { cpSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { type AnyModule, namedParameters, unload } from '../../engine/module.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { weightEntries } from '../../models/checkpoint/save.ts';
import { buildComponent } from '../../models/formats/components.ts';
import { type ModelPreset, presets } from '../../models/formats/presets.ts';
import { randomModel } from '../../models/formats/random_weights.ts';
import { openSingleFile, openVaeFile } from '../../models/formats/singlefile.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import { parseTextConfig } from '../../models/text/clip.ts';
import { unet as denoiser, parseUNetConfig } from '../../models/unet/unet.ts';
import { parseVaeConfig } from '../../models/vae/vae.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { sdxl } from '../support/command_line.ts';
import { writeComponent } from '../support/controlnet_golden.ts';
import { maxDifference } from '../support/golden.ts';
import { nonEmpty } from '../support/non_empty.ts';
import {
  basic,
  device,
  digest,
  folder,
  locate,
  model,
  pictures,
  resumes,
  run,
} from '../support/small_runs.ts';

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
