// The cache of moments and embeddings, with the tiny model's VAE and text encoders: what it holds is what the models say,
// and an edit costs exactly one entry.
import {
  cpSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { namedParameters } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import type { Picture } from '../../io/pixels.ts';
import { encodePng } from '../../io/png.ts';
import { type ModelSource, openModel } from '../../models/checkpoint/checkpoint.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import { encodePrompt } from '../../models/prompts.ts';
import { encodePrompts } from '../../models/text/conditioning.ts';
import { withPosterior } from '../../models/vae/autoencoder.ts';
import { survey } from '../../train/data/survey.ts';
import { openMaterials } from '../../train/materials.ts';
import {
  momentsCache,
  picturesAtOnce,
  type Shown,
  shownPicture,
  textCache,
  type View,
} from '../../train/pictures/cache.ts';
import { geometryOf, preparePicture } from '../../train/pictures/picture.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { type Prepared, prepare } from '../../train/tasks/preparation.ts';
import { openDataset } from '../support/datasets.ts';
import { goldenFolder } from '../support/golden.ts';
import { loaded } from '../support/loaded.ts';
import { locate, silent } from '../support/small_runs.ts';

const device = openDevice('cpu');
const source = openModel(join(goldenFolder, 'tiny-sdxl'));
const model = loadPipeline(source, { device, dtype: 'float32' });
const coder = withPosterior(model.vae, source.path);
const configs = [source.config('text_encoder'), source.config('text_encoder_2')];

/** The moments of the VAE as its weights are now. */
const cacheOf = (folder: string, shown: Shown) =>
  momentsCache(folder, coder, loaded([coder.module, coder.config]), shown);
const texts = (second = configs[1]) => {
  const [one, two] = model.text.encoders;
  return loaded([one.encoder, configs[0]], [two.encoder, second]);
};

const picture = (width: number, height: number, salt: number): Picture => {
  const data = Uint8Array.from(
    { length: width * height * 3 },
    (_, i) => (i * 89 + salt * 31 + (i >> 5)) % 256,
  );
  return { width, height, channels: 3, data };
};

/** Three pictures; the views of them that a run with two crops has. */
async function folderWithViews(t: Test, crops = 2) {
  const folder = join(t.testdir({}), 'pictures');
  mkdirSync(folder, { recursive: true });
  for (let i = 0; i < 3; i++) write(folder, i, i);
  const rows = [0, 1, 2].map((i) => `{"file_name": "${i}.png", "text": "a picture ${i}"}`);
  writeFileSync(join(folder, 'metadata.jsonl'), rows.join('\n'));
  return { folder, views: await viewsOf(folder, crops) };
}

const sizeOf = (i: number): [number, number] => (i === 1 ? [32, 48] : [48, 32]);
const write = (folder: string, i: number, salt: number) =>
  writeFileSync(join(folder, `${i}.png`), encodePng(picture(...sizeOf(i), salt)));

async function viewsOf(path: string, crops = 2): Promise<View[]> {
  const { samples } = await survey(await openDataset({ path }), { broken: 'fatal' });
  const options = { center_crop: false };
  return samples.flatMap((sample) =>
    Array.from({ length: crops }, (_, variant) => ({
      ...{ sample, variant },
      geometry: geometryOf(sample.size, [32, 32], options, {
        seed: 1,
        key: sample.key,
        variant,
        flip: false,
      }),
    })),
  );
}

const filesBelow = (folder: string) =>
  readdirSync(folder, { recursive: true, encoding: 'utf8' })
    .map((name) => join(folder, name))
    .filter((name) => statSync(name).isFile())
    .sort();

test("moments are the VAE's, and an edited picture costs one entry", async (t) => {
  const { folder, views } = await folderWithViews(t);
  const at = join(folder, '..', 'cache');
  const before = device.memory.storages;
  const cache = cacheOf(at, shownPicture('bilinear'));
  const progress: number[][] = [];
  t.equal(await cache.fill(views, (...told) => progress.push(told)), 6);
  t.strictSame(progress, [...Array(6).fill([0, 6]), [6, 6]], 'asked after each picture of a batch');
  t.equal(await cache.fill(views), 0, 'all is there');
  t.equal(device.memory.storages, before, 'live tensors');
  for (const view of views) {
    const shown = picture(...sizeOf(Number(view.sample.id[0])), Number(view.sample.id[0]));
    const { mean, logvar } = cache.read(view);
    scope(() => {
      const pixels = tensor(preparePicture(shown, view.geometry, 'bilinear'), [1, 32, 32, 3], { device });
      const want = coder.encode(pixels);
      const worst = (got: Float32Array, values: Float32Array) =>
        got.reduce((most, value, i) => Math.max(most, Math.abs(value - values[i])), 0);
      const off = Math.max(worst(mean, want.mean.floats()), worst(logvar, want.logvar.floats()));
      t.ok(mean.length === want.mean.size && off < 1e-5, `${view.sample.id}: off by ${off}`);
    });
  }
  write(folder, 1, 9);
  const edited = await viewsOf(folder);
  t.equal(await cache.fill(edited), 2, 'both crops of the edited picture');
  t.equal(await cache.fill(await viewsOf(folder, 3)), 3, 'a third crop of each');
  for (const name of ['0.png', '2.png']) utimesSync(join(folder, name), 1, 1);
  t.equal(await cache.fill(await viewsOf(folder)), 0, 'a new date is no edit');
  writeFileSync(
    join(folder, 'metadata.jsonl'),
    readFileSync(join(folder, 'metadata.jsonl'), 'utf8').replace('0"', 'x"'),
  );
  t.equal(await cache.fill(await viewsOf(folder)), 0, 'nor is a new caption');
  t.equal(await cacheOf(at, shownPicture('lanczos')).fill(edited), 6, 'another way of resizing');
  t.equal(await cacheOf(at, shownPicture('bilinear', 'colours')).fill(edited), 6, 'other colours');
});

test('one crop: one edit, one entry', async (t) => {
  const { folder } = await folderWithViews(t, 1);
  const cache = cacheOf(join(folder, '..', 'cache'), shownPicture('bilinear'));
  t.equal(await cache.fill(await viewsOf(folder, 1)), 3);
  write(folder, 2, 7);
  t.equal(await cache.fill(await viewsOf(folder, 1)), 1);
});

test('pictures go through the VAE together up to the pixels of one of 1024 x 1024', (t) => {
  const at: [number, number, number][] = [
    [1024, 1024, 9],
    [512, 512, 9],
    [512, 576, 9],
    [32, 32, 9],
    [2048, 1024, 9],
  ];
  t.same(
    at.map((each) => picturesAtOnce(...each)),
    [1, 4, 3, 9, 1],
  );
  t.end();
});

test('other weights are another cache', async (t) => {
  const { folder, views } = await folderWithViews(t, 1);
  const at = join(folder, '..', 'cache');
  await cacheOf(at, shownPicture('bilinear')).fill(views);
  const bias = namedParameters(coder.module).get('encoder.conv_out.bias')!;
  const values = bias.tensor.bytes();
  const changed = values.slice();
  changed[0] ^= 1;
  bias.tensor.upload(changed);
  t.equal(await cacheOf(at, shownPicture('bilinear')).fill(views), 3, 'the last bit of one weight');
  bias.tensor.upload(
    new Uint8Array(Float32Array.from({ length: values.length / 4 }, () => Number.NaN).buffer),
  );
  const failing = cacheOf(at, shownPicture('bilinear')).fill(views);
  await t.rejects(failing, /moments of 0\.png are not finite.*float32/);
  bias.tensor.upload(values);
  t.equal(await cacheOf(at, shownPicture('bilinear')).fill(views), 0);
});

test('a fill that is cut off goes on where it stopped', async (t) => {
  const { folder, views } = await folderWithViews(t, 1);
  const at = join(folder, '..', 'cache');
  const cache = cacheOf(at, shownPicture('bilinear'));
  const wide = views.map((view, i) => ({
    ...view,
    geometry: {
      ...view.geometry,
      resized: view.sample.size,
      crop: [0, 0] as const,
      target: view.sample.size,
      flip: i > 5,
    },
  }));
  const stop = (done: number) => {
    if (done > 0) throw new Error('stopped');
  };
  await t.rejects(cache.fill(wide, stop), /stopped/);
  const left = filesBelow(at);
  t.ok(left.length > 0 && left.length < 3, `${left.length} of 3 are there`);
  t.equal(await cache.fill(wide), 3 - left.length);
  let asked = 0;
  const elsewhere = cacheOf(join(folder, '..', 'elsewhere'), shownPicture('bilinear'));
  const batch = await viewsOf(folder, 20);
  t.equal(await elsewhere.fill(batch, () => ++asked < 2), 0, 'left in the midst of a batch');
  t.ok(asked < 20, `without waiting for the rest of it: asked ${asked} times`);
  truncateSync(left[0], statSync(left[0]).size - 4);
  writeFileSync(`${left[0]}.tmp`, 'half');
  t.equal(await cache.fill(wide), 1, 'a damaged entry is made anew');
  const shape = new Set(filesBelow(at).map((name) => name.slice(at.length).split('/').length));
  t.strictSame([...shape], [4], 'moments/xx/name');
  write(folder, 0, 5);
  await t.rejects(cacheOf(join(at, 'new'), shownPicture('bilinear')).fill(wide), /0\.png was changed/);
});

test('embeddings are the encoders, and an edited caption costs one entry', async (t) => {
  const at = t.testdir({});
  const before = device.memory.storages;
  const cache = textCache(at, model.text, texts());
  const captions = ['a red fox', 'a blue cat', 'two dogs'];
  t.equal(await cache.fill(captions), 4, 'three and the empty one');
  t.equal(
    await cache.fill(['two dogs', 'A  blue cat', undefined]),
    0,
    'what gives the same tokens is the same',
  );
  t.equal(await cache.fill(['a red fox', 'a blue cat', 'two frogs']), 1);
  t.equal(device.memory.storages, before, 'live tensors');
  scope(() => {
    const options = { guided: true, copies: 1, device, dtype: 'float32' } as const;
    const { context, pooled } = encodePrompts(model.text, { prompt: ['a blue cat'] }, options);
    const [none, told] = [cache.read(undefined), cache.read('a blue cat')];
    const all = [...none.context, ...told.context, ...none.pooled, ...told.pooled];
    const want = [...context.floats(), ...pooled.floats()];
    const off = all.reduce((most, value, i) => Math.max(most, Math.abs(value - want[i])), 0);
    t.ok(all.length === want.length && off < 1e-6, `off by ${off}`);
    t.ok(
      none.context.every((value) => value === 0),
      'left away: zeros',
    );
  });
  const other = textCache(at, { ...model.text, forceZeros: false }, texts());
  t.same(other.read(undefined).pooled, cache.read('').pooled, 'or the empty text, as the model has it');
  t.throws(() => cache.read('never seen'), /is gone from the cache: start again/);
  t.equal(await textCache(at, model.text, texts({ ...configs[1], x: 1 })).fill([]), 1, 'another config');
  // A signal comes between two batches of 16, while the event loop turns.
  const many = Array.from({ length: 40 }, (_, i) => `fox ${i}`);
  let asked = false;
  const stopping = (done: number) => {
    if (done === 16) setImmediate(() => (asked = true));
    return !asked;
  };
  t.equal(await cache.fill(many, stopping), 32, 'signals are heard, and what is made stays');
  t.equal(await cache.fill(many), 8, 'to go on from');
  const long = Array(90).fill('fox').join(' ');
  t.strictSame(cache.tooLong(['a fox', long]), [long]);
});

test('frozen models are read for what the cache has not alone', async (t) => {
  const { folder } = await folderWithViews(t);
  const own = join(folder, '..', 'model');
  cpSync(source.path, own, { recursive: true });
  const before = device.memory.storages;
  const input = {
    model: own,
    output: join(folder, '..', 'run'),
    dataset: { path: folder, resolution: 32 },
    previews: { prompts: [{ prompt: 'a fox', negative_prompt: 'a cat' }, 'a fox'] },
  };
  /** What a run with other settings reads, and what it is told. */
  const readBy = async (more: RunInput = {}) => {
    const read: string[] = [];
    const model = async (): Promise<ModelSource> => {
      const { load, ...rest } = openModel(own);
      return {
        ...rest,
        load(component, ...more) {
          read.push(component);
          load(component, ...more);
        },
      };
    };
    const run = resolveRun({ ...input, ...more }, 'test', 'test');
    const materials = await openMaterials(run, { ...locate, model }, silent);
    const prepared = (await prepare(materials, device, silent, { asked: false })) as Prepared;
    t.equal(device.memory.storages, before, 'live tensors');
    return { read, said: [prepared.texts?.previews, prepared.texts?.read('a picture 1')] };
  };
  const first = await readBy();
  t.same(first.read, ['vae', 'text_encoder', 'text_encoder_2']);
  const want = ['a cat', undefined].map((negative_prompt) => {
    const { truncated: _, ...embeds } = encodePrompt(model, { prompt: 'a fox', negative_prompt });
    return embeds;
  });
  t.strictSame(first.said[0], want, 'previews are told what sampling is');
  t.same(await readBy(), { ...first, read: [] }, 'all is there');
  const texts = ['text_encoder', 'text_encoder_2'];
  t.same((await readBy({ previews: { prompts: ['a dog'] } })).read, texts, 'another preview');
  t.same((await readBy({ dtype: 'bfloat16' })).read, texts, 'another type');
  const rows = readFileSync(join(folder, 'metadata.jsonl'), 'utf8');
  writeFileSync(join(folder, 'metadata.jsonl'), rows.replace('a picture 2', 'a dog'));
  t.same((await readBy()).read, texts, 'another caption');
  const weights = join(own, 'text_encoder_2', 'model.safetensors');
  const { atime, mtime } = statSync(weights);
  utimesSync(weights, 1, 1);
  t.same(await readBy(), { ...first, read: ['text_encoder_2'] }, 'an encoder with a new date is hashed');
  const bytes = readFileSync(weights);
  bytes[bytes.length - 1] ^= 1;
  writeFileSync(weights, bytes);
  utimesSync(weights, atime, mtime);
  const other = await readBy();
  t.same(other.read.sort(), texts, 'one with other weights and its old date makes all anew');
  t.notSame(other.said, first.said);
});

test('the model is let go', (t) => {
  model.release();
  t.equal(device.memory.storages, 0);
  t.end();
});
