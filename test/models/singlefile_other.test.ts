// Single files as other programs leave them: without a VAE, one that lends its VAE alone, and a
// refiner beside a base.
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openSafetensors, type TensorEntry, writeSafetensors } from '../../io/safetensors.ts';
import { openSingleFile } from '../../models/formats/singlefile.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { contents } from '../support/contents.ts';
import { goldenFolder, goldenSingleFile } from '../support/golden.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-singlefile-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);
const model = join(goldenFolder, 'tiny-sdxl');
const whole = goldenSingleFile('tiny-sdxl');

/** The tiny model's single file of what `isKept` says. */
function changed(name: string, isKept: (name: string) => boolean): string {
  const file = openSafetensors(whole);
  const kept = [...file.tensors.values()]
    .filter((tensor) => isKept(tensor.name))
    .map(({ name, dtype, shape }): TensorEntry => ({ name, dtype, shape, bytes: file.read(name) }));
  file.close();
  writeSafetensors(at(name), kept);
  return at(name);
}

const sample = (...argv: string[]) =>
  sdxl('sample', '--configs', model, '--prompt', 'a fox', '--steps', '1', '--seed', '1', '--quiet', ...argv);
const drawn = async (name: string, ...argv: string[]) => {
  const { status, err } = await sample('--output', at(`${name}.png`), '--save-latents', at(name), ...argv);
  return { status, err, latents: status === 0 ? contents(at(name)) : undefined };
};

test('a file without a VAE says so, and draws with another', async (t) => {
  const isVae = (name: string) => name.startsWith('first_stage_model.');
  const bare = changed('bare.safetensors', (name) => !isVae(name));
  mkdirSync(at('cut'));
  const cut = changed('cut/vae.safetensors', isVae);
  cpSync(join(model, 'vae', 'config.json'), at('cut/config.json'));
  t.match((await sdxl('inspect', cut)).out, /VAE in one file/);
  await refusesEach(t, sample, [
    [['--model', bare], /bare\.safetensors has no VAE in it: give one with --vae/],
  ]);
  const own = await drawn('own', '--model', whole);
  t.equal(own.status, 0, own.err);
  for (const vae of [join(model, 'vae'), whole, cut]) {
    const { status, err, latents } = await drawn('lent', '--model', bare, '--vae', vae);
    t.equal(status, 0, err);
    t.same(latents, own.latents, vae);
  }
});

test("a refiner's file takes a base's tokenizer, and configs of its own", (t) => {
  const path = at('refiner.safetensors');
  writeSafetensors(
    path,
    Object.entries({
      'model.diffusion_model.input_blocks.0.0.weight': [384, 4, 3, 3],
      'conditioner.embedders.0.model.ln_final.weight': [1280],
    }).map(([name, shape]): TensorEntry => {
      const count = shape.reduce((product, n) => product * n, 1);
      return { name, dtype: 'float16', shape, bytes: new Uint8Array(2 * count) };
    }),
  );
  const refiner = openSingleFile(path, { configs: model });
  t.match(refiner.config('unet'), { block_out_channels: [384, 768, 1536, 1536], cross_attention_dim: 1280 });
  t.equal(refiner.modelIndex.requires_aesthetics_score, true);
  t.equal(refiner.folder('tokenizer_2'), join(model, 'tokenizer_2'));
  t.end();
});

test('inspect tells of a folder that has nothing of SDXL', async (t) => {
  const empty = mkdtempSync(at('empty'));
  writeFileSync(join(empty, 'model_index.json'), '{"_class_name": "StableCascadePriorPipeline"}');
  await refusesEach(t, (path) => sdxl('inspect', path), [[[empty], /names no component that SDXL has/]]);
});

test('types that are not read, as int16, are told by inspect and export too', async (t) => {
  /** A copy of the file in which a tensor in float16 is said to be of a type as wide. */
  const other = (path: string, to: string): void => {
    const bytes = readFileSync(path);
    bytes.write('"I16"', bytes.indexOf('"F16"'));
    writeFileSync(to, bytes);
  };
  const copy = at('int16');
  cpSync(model, copy, { recursive: true });
  const unet = join('unet', 'diffusion_pytorch_model.safetensors');
  other(join(model, unet), join(copy, unet));
  other(whole, at('int16.safetensors'));
  const type = /type I16: convert it to one of F32, F16, BF16/;
  await refusesEach(t, (path) => sdxl('inspect', path), [
    [[copy], type],
    [[at('int16.safetensors')], type],
  ]);
  await refusesEach(t, (path) => sdxl('export', path, at('out'), '--quiet'), [[[copy], type]]);
});
