// Which of a model's weight files are read, where it has several for one component.
import { copyFileSync, cpSync, mkdtempSync, readFileSync, rmSync, truncateSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { resolveHub } from '../../io/hub.ts';
import { readPicture } from '../../io/image.ts';
import { componentFiles, locateModel, locateVae, neededFiles } from '../../models/locate/locate.ts';
import { withUNet } from '../../models/locate/locate_unet.ts';
import { sdxl } from '../support/command_line.ts';
import { goldenFolder, goldenSingleFile } from '../support/golden.ts';
import { hubOf } from '../support/small_hub.ts';

test('the files that a hub model is asked for', (t) => {
  const from = (...all: string[]) => neededFiles(all);
  const unet = 'unet/diffusion_pytorch_model';
  const other = ['README.md', 'sd_xl_base_1.0.safetensors', 'unet/model.onnx', 'vae_1_0/config.json'];
  const needed = [
    'model_index.json',
    'unet/config.json',
    'tokenizer/merges.txt',
    'scheduler/scheduler_config.json',
  ];
  t.same(from(...other, ...needed), needed);
  t.same(from(`${unet}.safetensors`, `${unet}.fp16.safetensors`), [`${unet}.safetensors`], 'plain weights');
  t.same(from(`${unet}.fp16.safetensors`, `${unet}.non_ema.safetensors`), [`${unet}.fp16.safetensors`]);
  const shards = [1, 2].map((i) => `${unet}-0000${i}-of-00002.safetensors`);
  t.same(from(...shards, `${unet}.fp16-00001-of-00002.safetensors`), shards, 'shards');
  const fp16 = [`${unet}.fp16.safetensors`, 'vae/diffusion_pytorch_model.fp16.safetensors'];
  t.same(neededFiles([`${unet}.safetensors`, ...fp16], 'fp16'), fp16, 'the variant');
  const mixed = [`${unet}.safetensors`, fp16[0], 'vae/diffusion_pytorch_model.safetensors'];
  t.same(neededFiles(mixed, 'fp16'), mixed.slice(1), 'plain weights of a component without the variant');
  t.same(neededFiles(mixed.slice(1), 'fp16'), mixed.slice(1));
  t.throws(
    () => neededFiles([`${unet}.safetensors`, ...fp16], 'bf16'),
    /no such weights, only plain ones and fp16/,
  );
  const index = `${unet}.safetensors.index.json`;
  t.same(from(...shards, index), [...shards, index]);
  t.end();
});

test('a cache that has no more than tokenizers holds no model', async (t) => {
  const repo = {
    'model_index.json': '{}',
    tokenizer: { 'vocab.json': '{}' },
    unet: { 'config.json': '{}' },
  };
  await hubOf(t, t.testdir({ repo }));
  await resolveHub('o/n', { files: ['tokenizer/vocab.json'] });
  process.env.HF_HUB_OFFLINE = '1';
  t.teardown(() => delete process.env.HF_HUB_OFFLINE);
  await t.rejects(locateModel('o/n'), {
    message: /^HF_HUB_OFFLINE is set and o\/n is not \(wholly\) in .*: unset it to download$/,
  });
  delete process.env.HF_HUB_OFFLINE;
  await locateModel('o/n');
  process.env.HF_HUB_OFFLINE = '1';
  await t.resolves(locateModel('o/n'), 'downloaded since');
});

test('the files that a ControlNet on the hub is asked for', (t) => {
  const weights = 'diffusion_pytorch_model';
  const all = [
    `${weights}.safetensors`,
    `${weights}.fp16.safetensors`,
    `${weights}.fp16.bin`,
    'out_bird.png',
  ];
  const [plain, fp16] = all;
  t.same(componentFiles(['README.md', 'config.json', ...all], 'ControlNet'), ['config.json', plain]);
  t.same(componentFiles(all, 'ControlNet', 'fp16'), ['config.json', fp16], 'the variant');
  t.same(componentFiles(all, 'ControlNet', 'bf16'), ['config.json', plain], 'that the base alone has');
  t.same(componentFiles([fp16, `${weights}_V2.safetensors`], 'ControlNet'), ['config.json', fp16]);
  t.throws(() => componentFiles(['config.json', `${weights}.bin`], 'ControlNet'), {
    message: /no diffusion_pytorch_model\.saf/,
  });
  t.end();
});

test('a UNet of another model', async (t) => {
  const [base, refiner] = ['tiny-sdxl', 'tiny-sdxl-refiner'].map((name) => join(goldenFolder, name));
  for (const [model, unet, message] of [
    [
      refiner,
      base,
      /tiny-sdxl takes 80 features of text and that of .*tiny-sdxl-refiner 48: take one that was/,
    ],
    [
      base,
      refiner,
      /tiny-sdxl-refiner takes 48 features of text and that of .*tiny-sdxl 80: take one that was/,
    ],
  ] as const)
    await t.rejects(withUNet(await locateModel(model), unet), { name: 'UserError', message });
});

test('one file of a repository, for a model, a VAE and a UNet', async (t) => {
  const folder = t.testdir({ repo: { deep: {} } });
  const model = join(goldenFolder, 'tiny-sdxl');
  const single = goldenSingleFile('tiny-sdxl');
  copyFileSync(single, join(folder, 'repo', 'deep', 'base.safetensors'));
  copyFileSync(join(model, 'vae', 'config.json'), join(folder, 'repo', 'config.json'));
  const asked = await hubOf(t, folder);
  const path = 'owner/name/deep/base.safetensors';
  const source = await locateModel(path, { configs: model });
  t.same(asked, ['deep/base.safetensors'], 'it alone is downloaded');
  t.ok(readFileSync(source.path).equals(readFileSync(single)));
  t.ok((await locateVae(path, { configs: model })).has('vae'));
  t.ok((await withUNet(source, path)).has('unet'));
  t.same(asked.length, 1, 'once');
  for (const locate of [locateModel, locateVae, (at: string) => withUNet(source, at)]) {
    await t.rejects(locate('owner/name/none.safetensors'), {
      message:
        'there is no file owner/name/none.safetensors, and owner/name on the hub has no none.safetensors',
    });
    await t.rejects(locate('owner/name/deep'), {
      message: /^no (model|VAE|UNet) at owner\/name\/deep; give/,
    });
  }
});

test('a VAE on the hub, alone in its variant or inside a model, with its progress', async (t) => {
  const coder = join(goldenFolder, 'tiny-sdxl', 'vae');
  const weights = (variant: string) => `diffusion_pytorch_model${variant}.safetensors`;
  const half = t.testdir({ repo: {}, whole: { repo: { 'model_index.json': '{}', unet: {}, vae: {} } } });
  const whole = join(half, 'whole');
  for (const [from, to] of [
    ['config.json', join('repo', 'config.json')],
    [weights(''), join('repo', weights('.fp16'))],
    ['config.json', join('whole', 'repo', 'vae', 'config.json')],
    [weights(''), join('whole', 'repo', 'vae', weights(''))],
    [weights(''), join('whole', 'repo', 'vae', weights('.fp16'))],
    [weights(''), join('whole', 'repo', 'unet', weights('.fp16'))],
  ])
    copyFileSync(join(coder, from), join(half, to));
  for (const [folder, variant, wanted] of [
    [half, undefined, ['config.json', weights('.fp16')]],
    [half, 'fp16', ['config.json', weights('.fp16')]],
    [whole, undefined, ['model_index.json', 'vae/config.json', `vae/${weights('')}`]],
    [whole, 'fp16', ['model_index.json', 'vae/config.json', `vae/${weights('.fp16')}`]],
  ] as const) {
    rmSync(join(folder, 'cache'), { recursive: true, force: true });
    const asked = await hubOf(t, folder);
    const told = new Set<string>();
    const source = await locateVae('o/n', { variant, onProgress: (path) => told.add(path) });
    t.same(asked.sort(), wanted);
    t.same([...told], ['o/n'], 'progress is told');
    t.ok(source.has('vae'));
  }
});

test("a folder's variant", async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-variant-'));
  const [model, half, output] = ['model', 'half', 'x.png'].map((name) => join(folder, name));
  cpSync(join(goldenFolder, 'tiny-sdxl'), model, { recursive: true });
  await sdxl('export', model, half, '--save-keys', 'all', '--dtype', 'float16', '--quiet');
  const sample = (from: string, ...argv: string[]) =>
    sdxl(
      ...['sample', '--model', from, '--prompt', 'x', '--steps', '2', '--seed', '1', '--quiet'],
      ...['--width', '32', '--height', '32', '--output', output, ...argv],
    );
  await sample(half);
  const want = await readPicture(output);
  for (const component of ['unet', 'vae', 'text_encoder', 'text_encoder_2']) {
    const name = component.startsWith('text') ? 'model' : 'diffusion_pytorch_model';
    const plain = join(model, component, `${name}.safetensors`);
    cpSync(join(half, component, `${name}.safetensors`), join(model, component, `${name}.fp16.safetensors`));
    truncateSync(plain, 100); // not to be read
  }
  const { status, err } = await sample(model, '--variant', 'fp16');
  t.equal(status, 0, err);
  t.same((await readPicture(output)).data, want.data, 'the picture of the float16 weights');
  t.match((await sample(model)).err, /safetensors/, 'plain weights are read where none is named');
  t.match((await sample(model, '--variant', 'bf16')).err, /no weights of the variant bf16, only .*fp16/);
  const coder = join('vae', 'diffusion_pytorch_model');
  rmSync(join(model, `${coder}.fp16.safetensors`));
  cpSync(join(half, `${coder}.safetensors`), join(model, `${coder}.safetensors`));
  rmSync(output);
  const mixed = await sample(model, '--variant', 'fp16');
  t.equal(mixed.status, 0, mixed.err);
  t.same((await readPicture(output)).data, want.data, 'with a VAE that has plain weights alone');
  t.match(
    (await sample(goldenSingleFile('tiny-sdxl'), '--variant', 'fp16')).err,
    /is one file; leave it out/,
  );
  rmSync(folder, { recursive: true });
});
