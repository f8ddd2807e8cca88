// Adapters from one spelling to another and back: golden files in diffusers' keys, in kohya's, and in the original model's.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import { sdxl } from '../support/command_line.ts';
import { contents } from '../support/contents.ts';
import { goldenFolder, goldenLora } from '../support/golden.ts';

const golden = (name: string) => join(goldenFolder, name);
const scratch = () => mkdtempSync(join(tmpdir(), 'sdxl-export-'));

const run = (...argv: string[]) => sdxl('export', ...argv);

test('LoRA files change their spelling and nothing else', async (t) => {
  const folder = scratch();
  const configs = ['--configs', golden('tiny-sdxl'), '--quiet'];
  const made = async (from: string, name: string, format: string, ...more: string[]) => {
    const out = join(folder, `${name}.safetensors`);
    const { status, err } = await run(from, out, '--format', format, ...configs, ...more);
    t.equal(status, 0, `${name} ${err}`);
    return contents(out);
  };
  const [plain, scaled] = [
    goldenLora('lora/plain_diffusers.safetensors'),
    goldenLora('lora/scaled_diffusers.safetensors'),
  ];
  t.same(await made(plain, 'plain', 'lora-peft'), contents(plain), 'diffusers to diffusers');
  const kohya = goldenLora('lora/scaled_kohya.safetensors');
  t.same(
    await made(scaled, 'kohya', 'lora-kohya', '--dtype', 'float16'),
    contents(kohya),
    'to kohya, alpha from the metadata',
  );
  const sgm = goldenLora('lora/scaled_sgm.safetensors');
  t.same(
    await made(sgm, 'renamed', 'lora-kohya'),
    contents(kohya),
    "the original's block names to diffusers'",
  );
  await made(kohya, 'peft', 'lora-peft');
  const again = await made(join(folder, 'peft.safetensors'), 'again', 'lora-kohya');
  t.same(again, contents(kohya), 'kohya, diffusers, kohya: alpha survives');
  rmSync(folder, { recursive: true });
});

test("LoRA files keep each layer's rank and alpha, of the text encoders too", async (t) => {
  const folder = scratch();
  const layers = [
    ['unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q', 24, 4, 2],
    ['te1_text_model_encoder_layers_0_self_attn_q_proj', 32, 2, 1],
    ['te1_text_model_encoder_layers_0_self_attn_k_proj', 32, 3, 6],
    ['te2_text_model_encoder_layers_0_self_attn_q_proj', 48, 2, 1],
  ] as const;
  const entry = (name: string, shape: readonly number[], value: number) => {
    const bytes = new Uint8Array(new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(value).buffer);
    return { name: `lora_${name}`, dtype: 'float32' as const, shape, bytes };
  };
  const kohya = join(folder, 'kohya.safetensors');
  writeSafetensors(
    kohya,
    layers.flatMap(([name, width, rank, alpha]) => [
      entry(`${name}.lora_down.weight`, [rank, width], 0.1),
      entry(`${name}.lora_up.weight`, [width, rank], 0.2),
      entry(`${name}.alpha`, [], alpha),
    ]),
  );
  const configs = ['--configs', golden('tiny-sdxl')];
  const peft = join(folder, 'peft.safetensors');
  t.match(await run(kohya, peft, '--format', 'lora-peft', ...configs), {
    status: 0,
    err: `${peft}: 4 layers\n`,
  });
  const file = openSafetensors(peft);
  const config = JSON.parse(file.metadata.lora_adapter_metadata) as Record<string, unknown>;
  const words = [...file.tensors.keys()].map((name) =>
    name.replace(/\.(text_model|down_blocks)\..*\.(?=\w+\.\w+\.weight$)/, ' '),
  );
  t.same(
    [...new Set(words)].sort(),
    ['unet lora', 'text_encoder lora_linear_layer', 'text_encoder_2 lora_linear_layer']
      .flatMap((word) => [`${word}.down.weight`, `${word}.up.weight`])
      .sort(),
    "each network's layers under the word by which diffusers knows them",
  );
  file.close();
  const of = (component: string) =>
    ['r', 'lora_alpha', 'rank_pattern', 'alpha_pattern', 'target_modules'].map(
      (key) => config[`${component}.${key}`],
    );
  const layer = (name: string) => `text_model.encoder.layers.0.self_attn.${name}_proj`;
  const [first, second] = [layer('k'), layer('q')];
  t.same(of('text_encoder'), [3, 6, { [second]: 2 }, { [second]: 1 }, [first, second]]);
  t.same(of('text_encoder_2'), [2, 1, {}, {}, [second]]);
  t.same(of('unet'), [4, 2, {}, {}, ['down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q']]);
  const back = join(folder, 'back.safetensors');
  t.equal((await run(peft, back, '--format', 'lora-kohya', ...configs)).status, 0);
  t.same(contents(back), contents(kohya), 'and back');
  rmSync(folder, { recursive: true });
});

test("a file in kohya's spelling says that it is SDXL's, and keeps what its source says", async (t) => {
  const folder = scratch();
  const metadataOf = (path: string) => {
    const file = openSafetensors(path);
    file.close();
    return file.metadata;
  };
  const made = async (from: string, name: string) => {
    const out = join(folder, `${name}.safetensors`);
    const configs = ['--configs', golden('tiny-sdxl'), '--quiet'];
    t.equal((await run(from, out, '--format', 'lora-kohya', ...configs)).status, 0, name);
    return metadataOf(out);
  };
  // What A1111 lists a file by: the base's version, which begins with sdxl_.
  t.match(await made(goldenLora('lora/plain_diffusers.safetensors'), 'style'), {
    ss_base_model_version: 'sdxl_base_v1-0',
    ss_network_module: 'networks.lora',
    ss_network_dim: '4',
    ss_network_alpha: '4',
    'modelspec.architecture': 'stable-diffusion-xl-v1-base/lora',
    'modelspec.title': 'style',
  });
  const kohya = goldenLora('lora/scaled_kohya.safetensors');
  const source = openSafetensors(kohya);
  const entries = [...source.tensors.values()].map(({ name, dtype, shape }) => {
    return { name, dtype, shape, bytes: source.read(name) };
  });
  source.close();
  const tagged = join(folder, 'tagged.safetensors');
  const own = {
    ss_tag_frequency: '{"szn": 3}',
    'modelspec.title': 'Szn',
    ss_base_model_version: 'sdxl_base_v0-9',
  };
  const hashes = { sshs_model_hash: 'ab', 'modelspec.hash_sha256': '0xcd' };
  writeSafetensors(tagged, entries, { ...own, ...hashes });
  const kept = await made(tagged, 'again');
  t.match(kept, own, 'what it says itself goes before');
  t.notOk(kept.sshs_model_hash ?? kept['modelspec.hash_sha256'], "no other file's hash");
  rmSync(folder, { recursive: true });
});
