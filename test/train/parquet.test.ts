// Datasets in parquet, on files that pyarrow 25 wrote (golden/parquet): ten rows of an image struct and a caption, of which row
// 3 has no caption and row 7 no picture; pairs of pictures with labels; and datasets of the hub, against a small hub of our own on 127.0.0.1.

import { createHash } from 'node:crypto';
import { copyFileSync, existsSync, mkdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import zlib from 'node:zlib';
import { type Test, test } from 'tap';
import { UserError } from '../../io/errors.ts';
import { decodePicture } from '../../io/image.ts';
import { openParquet } from '../../io/parquet.ts';
import { chooseFiles } from '../../train/data/split.ts';
import { survey } from '../../train/data/survey.ts';
import { openDataset } from '../support/datasets.ts';
import { packageRoot } from '../support/golden.ts';
import { refused } from '../support/mistake.ts';

const folder = join(packageRoot, 'test', 'golden', 'parquet');
const at = (name: string) => join(folder, `${name}.parquet`);

/** Whether the bytes are picture `salt`. */
async function isPicture(bytes: Uint8Array, salt: number): Promise<boolean> {
  const { width, height, data } = await decodePicture(bytes, 'row');
  return (
    width === 8 && height === 6 && data.every((value, i) => value === (i * 89 + salt * 31 + (i >> 5)) % 256)
  );
}

for (const name of ['snappy', 'gzip-indexed', 'brotli']) {
  test(`${name}: pictures and captions`, async (t) => {
    const { examples, problems } = await openDataset({ path: at(name) });
    t.strictSame(problems, [`${name}.parquet#00000003 has no caption`]);
    const all = await openDataset({ path: at(name), instance_prompt: 'a thing' });
    t.strictSame([all.problems, all.examples[3].captions], [[], ['a thing']], 'or the one that a run gives');
    const given = await openDataset({ path: at(name), caption_column: 'absent', instance_prompt: 'a thing' });
    t.equal(given.examples.length, 10);
    t.ok(
      given.examples.every(({ captions: [only, ...others] }) => only === 'a thing' && !others.length),
      'it is enough where there is no column of captions',
    );
    t.equal(examples.length, 9);
    for (const row of [9, 0, 5, 6, 4, 8, 1, 2]) {
      const id = `${name}.parquet#0000000${row}`;
      const example = examples.find((found) => found.id === id)!;
      t.strictSame(example.captions, [`picture ${row}, ü 狐`]);
      t.ok(await isPicture(await example.read(), row), id);
    }
    const { samples, skipped } = await survey({ examples, problems }, { broken: 'skip' });
    t.equal(samples.length, 8);
    t.match(skipped[1], /#00000007 has no picture in "image"/);
  });
}

test('neighbours in a row group are decoded once, and two groups are kept', async (t) => {
  const table = await openParquet(at('snappy'));
  t.strictSame([table.rows, table.columns], [10, ['image', 'text', 'width']]);
  const [a, b] = await Promise.all([table.readValue('text', 0), table.readValue('text', 1)]);
  t.strictSame([a, b], ['picture 0, ü 狐', 'picture 1, ü 狐']);
  const image = await table.readValue('image', 0);
  t.equal(await table.readValue('image', 0), image, 'the same object again');
  await table.readValue('image', 4);
  t.equal(await table.readValue('image', 0), image, 'two are kept');
  await table.readValue('image', 4);
  await table.readValue('image', 8);
  t.not(await table.readValue('image', 0), image, 'and no third');
  await t.rejects(table.readValue('image', 10), /no row 10/);
});

test('other columns, and lists of captions', async (t) => {
  const path = at('lists');
  const { examples } = await openDataset({ path, image_column: 'img', caption_column: 'caption' });
  t.strictSame(
    examples.map(({ captions }) => captions),
    [0, 1, 2].map((i) => [`one ${i}`, `two ${i}`]),
  );
  t.ok(await isPicture(await examples[2].read(), 2), 'a column of bare bytes');
  await refused(t, openDataset({ path }), /no column "image"; did you mean "img"/);
  await refused(
    t,
    openDataset({ path, image_column: 'img' }),
    /no column "text"; its columns are img, caption/,
  );
  const beside = { caption_column: 'text', conditioning_image_column: 'image' };
  const [{ beside: image }] = (await openDataset({ path: at('snappy'), ...beside })).examples;
  t.ok(image && (await isPicture(await image.read(), 0)), 'a column of conditioning images');
  await refused(
    t,
    openDataset({ path: at('snappy'), conditioning_image_column: 'images' }),
    /no column "images"; did you mean "image"/,
  );
  const wrong = await openDataset({ path: at('snappy'), image_column: 'text' });
  await refused(t, wrong.examples[0].read(), /no picture in "text".*bytes/);
  await refused(t, openDataset({ path: at('snappy'), caption_column: 'width' }), /"width" is neither a text/);
});

test('pairs of which a column of labels says which picture is preferred, as Pick-a-Pic has them', async (t) => {
  const path = at('pairs');
  const columns = {
    image_column: 'jpg_0',
    rejected_image_column: 'jpg_1',
    label_column: 'label_0',
    caption_column: 'caption',
  };
  const { examples, problems } = await openDataset({ path, ...columns });
  t.same(problems, []);
  t.same(
    examples.map(({ captions, beside }) => [captions[0], beside?.kind]),
    [0, 1, 3].map((row) => [`pair ${row}`, 'rejected picture']),
    'a tie is left out',
  );
  // Rows hold pictures (0, 1), (2, 4), (5, 6), (8, 9) with labels 1, 0, 0.5, 0.
  for (const [i, [preferred, rejected]] of [
    [0, 1],
    [4, 2],
    [9, 8],
  ].entries()) {
    const { read, beside } = examples[i];
    t.ok(await isPicture(await read(), preferred), `row ${i}: the preferred picture`);
    t.ok(beside && (await isPicture(await beside.read(), rejected)), `row ${i}: the other`);
  }
  t.match(examples[1].beside?.id, /#00000001 \(jpg_0\)$/, 'messages name its column');
  const unlabelled = await openDataset({ path, ...columns, label_column: '' });
  t.equal(unlabelled.examples.length, 4, 'without labels the first is always preferred');
  t.ok(await isPicture(await unlabelled.examples[1].read(), 2));
  await refused(
    t,
    openDataset({ path, ...columns, label_column: 'label' }),
    /no column "label"; did you mean "label_0"/,
  );
  await refused(
    t,
    openDataset({ path, ...columns, label_column: 'caption' }),
    /#00000000: "caption" is not a number from 0 to 1: 1 prefers the first picture/,
  );
});

test('what is damaged is one sentence', async (t) => {
  const broken = join(t.testdir({}), 'broken.parquet');
  copyFileSync(at('snappy'), broken);
  truncateSync(broken, 3000);
  await refused(
    t,
    openDataset({ path: broken }),
    /broken\.parquet cannot be read as parquet.*download it again/,
  );
  writeFileSync(broken, '');
  await refused(t, openDataset({ path: broken }), /cannot be read as parquet/);
  const bytes = readFileSync(at('gzip-indexed'));
  bytes.fill(0xff, 100, 400);
  writeFileSync(broken, bytes);
  const { examples } = await openDataset({ path: broken });
  await refused(t, Promise.all(examples.map((example) => example.read())), /cannot be read as parquet/);
  const bomb = readFileSync(at('gzip-indexed'));
  bomb.set(zlib.gzipSync(Buffer.alloc(100_000), { level: 9 }), bomb.indexOf(Buffer.of(0x1f, 0x8b, 8)));
  writeFileSync(broken, bomb);
  const packed = await openParquet(broken);
  await refused(t, packed.readColumn(packed.columns[0]), /larger than \d{1,4} bytes/);
  const zstd = openDataset({ path: at('zstd') });
  if ('zstdDecompressSync' in zlib) t.equal((await zstd).examples.length, 3, 'Zstandard');
  else await refused(t, zstd, /ZSTD.*use Node 22\.15/);
  await refused(t, openDataset({ path: at('lz4') }), /LZ4_RAW\): write it with another compression/);
});

test('a footer with any of its bytes damaged is one sentence, or none', async (t) => {
  const bytes = readFileSync(at('lists'));
  const path = join(t.testdir({}), 'damaged.parquet');
  const columns = { image_column: 'img', caption_column: 'caption' };
  let refusals = 0;
  for (let i = bytes.length - 8 - bytes.readUInt32LE(bytes.length - 8); i < bytes.length - 8; i++) {
    const damaged = Buffer.from(bytes);
    damaged[i] ^= 1 + (i % 7);
    writeFileSync(path, damaged);
    const read = openDataset({ path, ...columns }).then((dataset) => survey(dataset, { broken: 'skip' }));
    const error = await read.then(
      () => undefined,
      (reason: unknown) => reason,
    );
    if (error !== undefined) refusals++;
    if (error && !(error instanceof UserError)) t.fail(`byte ${i}: ${error}`);
  }
  // An error that nobody hears fails the whole file.
  await new Promise((resolve) => setTimeout(resolve, 20));
  t.ok(refusals > 50, `${refusals} were refused`);
});

test('the files of a split', (t) => {
  const names = ['README.md', 'data/train-00000-of-00001-ab.parquet', 'data/test-00000-of-00001.parquet'];
  t.strictSame(chooseFiles(names, 'train'), { kind: 'parquet', names: [names[1]] });
  t.strictSame(chooseFiles(names, 'test').names, [names[2]]);
  t.strictSame(chooseFiles(names, 'validation').names, []);
  for (const word of ['train', 'test', 'validation', 'valid', 'val', 'dev', 'eval'])
    t.same(chooseFiles([`${word}/0.parquet`, 'x.parquet'], 'own').names, [], `${word} tells splits apart`);
  t.same(chooseFiles(['own-0.parquet', 'x.parquet'], 'own').names, ['own-0.parquet'], 'a split of its own');
  t.same(chooseFiles(['trains/0.parquet', 'x.parquet'], 'train').names.length, 2, 'a part of a word is none');
  t.strictSame(
    chooseFiles(['a.parquet', 'b.parquet'], 'train').names,
    ['a.parquet', 'b.parquet'],
    'undivided',
  );
  t.strictSame(chooseFiles(['default/train/0000.parquet', 'default/test/0000.parquet'], 'train').names, [
    'default/train/0000.parquet',
  ]);
  const pictures = ['train/a.png', 'train/metadata.jsonl', 'test/train.png', 'README.md', '.gitattributes'];
  t.strictSame(chooseFiles(pictures, 'train'), { kind: 'pictures', names: pictures.slice(0, 2) });
  t.strictSame(
    chooseFiles(['test.png', 'train.png', 'train.txt'], 'train').names.length,
    3,
    'pictures of trains',
  );
  const above = ['data/metadata.csv', 'data/train/a.png', 'data/test/b.png', 'data/note.txt'];
  t.same(chooseFiles(above, 'train').names, above, 'metadata above the folders of splits');
  t.same(chooseFiles(['a.png', 'a.TAGS', 'a.txt'], 'train', '.tags').names, ['a.png', 'a.TAGS'], 'captions');
  t.end();
});

/** A hub whose repositories hold the given files, and an empty cache. */
async function fakeHub(t: Test, repositories: Record<string, Record<string, Buffer>>): Promise<string[]> {
  const requests: string[] = [];
  const sha = 'c'.repeat(40);
  const server = createServer((request, response) => {
    const url = decodeURIComponent((request.url ?? '').split('?')[0]);
    requests.push(url);
    for (const [place, files] of Object.entries(repositories)) {
      const [id, revision] = place.split('@');
      if (url === `/api/datasets/${id}/revision/${revision}`) {
        const siblings = Object.entries(files).map(([rfilename, bytes]) => ({
          rfilename,
          size: bytes.length,
          blobId: createHash('sha1').update(`blob ${bytes.length}\0`).update(bytes).digest('hex'),
        }));
        response.end(JSON.stringify({ sha, siblings }));
        return;
      }
      const name = url.slice(`/datasets/${id}/resolve/${sha}/`.length);
      if (url.startsWith(`/datasets/${id}/resolve/`) && files[name]) {
        response.end(files[name]);
        return;
      }
    }
    response.writeHead(404, { 'x-error-code': 'RepoNotFound' }).end();
  });
  await new Promise<void>((ready) => server.listen(0, '127.0.0.1', ready));
  t.teardown(() => {
    server.closeAllConnections();
    server.close();
  });
  for (const name of ['HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'HF_TOKEN', 'HF_HUB_OFFLINE'])
    delete process.env[name];
  process.env.HF_HOME = t.testdir({});
  process.env.HF_ENDPOINT = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  return requests;
}

test('datasets of the hub', async (t) => {
  const parquet = readFileSync(at('snappy'));
  const png = Buffer.from(
    await (
      await openDataset({ path: at('lists'), image_column: 'img', caption_column: 'caption' })
    ).examples[0].read(),
  );
  const rows = Buffer.from('{"file_name": "a.png", "text": "a"}');
  const requests = await fakeHub(t, {
    'o/table@main': { 'data/train-0.parquet': parquet, 'data/test-0.parquet': parquet, 'README.md': rows },
    'o/folder@main': { 'train/a.png': png, 'train/metadata.jsonl': rows, 'test/b.png': png },
    'o/above@main': {
      'metadata.jsonl': Buffer.from(
        '{"file_name": "train/a.png", "text": "a"}\n{"file_name": "test/b.png", "text": "b"}',
      ),
      'train/a.png': png,
      'test/b.png': png,
    },
    'o/tags@main': { 'a.png': png, 'a.tags': Buffer.from('a') },
    'o/zipped@main': { 'all.zip': png },
    'o/zipped@refs/convert/parquet': { 'default/train/0000.parquet': parquet },
    'o/nothing@main': { 'all.zip': png },
  });
  const progress: number[] = [];
  const table = await openDataset({ path: 'o/table' }, ({ done, total }) => progress.push(done / total));
  t.equal(table.examples.length, 9);
  t.equal(table.examples[0].id, 'data/train-0.parquet#00000000');
  t.ok(await isPicture(await table.examples[0].read(), 0));
  t.equal(progress.at(-1), 1);
  t.notOk(
    requests.some((url) => /test-0|README/.test(url)),
    'only what is needed',
  );
  t.ok(existsSync(join(process.env.HF_HOME ?? '', 'hub', 'datasets--o--table', 'refs', 'main')));
  const pictures = await openDataset({ path: 'o/folder' });
  t.strictSame(pictures.problems, []);
  t.strictSame(
    pictures.examples.map(({ id, captions }) => [id, ...captions]),
    [['a.png', 'a']],
  );
  const above = await openDataset({ path: 'o/above' });
  t.strictSame(above.problems, []);
  t.strictSame(
    above.examples.map(({ id, captions }) => [id, ...captions]),
    [
      ['test/b.png', 'b'],
      ['train/a.png', 'a'],
    ],
    'metadata above the folders of splits speaks for all, as in a folder here',
  );
  const tags = await openDataset({ path: 'o/tags', caption_extension: 'tags' });
  t.strictSame(tags.examples[0].captions, ['a'], 'captions of another extension');
  t.equal((await openDataset({ path: 'o/zipped' })).examples.length, 9, "the hub's own parquet branch");
  await refused(
    t,
    openDataset({ path: 'o/nothing' }),
    /no folder o\/nothing is here, and .*right kind of dataset/,
  );
  await refused(t, openDataset({ path: 'o/absent' }), /the hub has no dataset o\/absent/);
  process.env.HF_HUB_OFFLINE = '1';
  t.equal((await openDataset({ path: 'o/table' })).examples.length, 9, 'offline');
  t.equal((await openDataset({ path: 'o/zipped' })).examples.length, 9, "offline from the hub's own branch");
  await refused(
    t,
    openDataset({ path: 'o/never' }),
    /HF_HUB_OFFLINE is set and o\/never is not .*: unset it/,
  );
  delete process.env.HF_HUB_OFFLINE;
});

test('a local folder of parquet files', async (t) => {
  const place = join(t.testdir({}), 'data');
  mkdirSync(place);
  copyFileSync(at('lists'), join(place, 'train-00001.parquet'));
  copyFileSync(at('lists'), join(place, 'train-00000.parquet'));
  const columns = { image_column: 'img', caption_column: 'caption' };
  const { examples } = await openDataset({ path: place, ...columns });
  t.strictSame(
    examples.map(({ id }) => id),
    [0, 1].flatMap((file) => [0, 1, 2].map((row) => `train-0000${file}.parquet#0000000${row}`)),
  );
  await refused(
    t,
    openDataset({ path: place, split: 'test', ...columns }),
    /no parquet file of the split "test"/,
  );
});
