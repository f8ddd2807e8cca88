// Training data: sources and the survey of their pictures. run_pictures.test.ts has which of them a run shows, data_views.test.ts what
// becomes of each, order.test.ts in what order.

import { rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import sharp from 'sharp';
import { test } from 'tap';
import { keyOf } from '../../train/data/draws.ts';
import { survey } from '../../train/data/survey.ts';
import { folderOf, openDataset, png } from '../support/datasets.ts';
import { refused } from '../support/mistake.ts';

const listed = async (path: string, caption_column = 'text') => {
  const { examples, problems } = await openDataset({ path, caption_column });
  return {
    examples: examples.map(({ id, captions }) => [id, ...captions]),
    problems: problems.map((problem) => problem.replaceAll(path, '.')),
  };
};

test('folders with captions beside the pictures', async (t) => {
  const path = folderOf(t, {
    'b.png': png(),
    'b.txt': '\uFEFFa red fox\r\n\r\n  a fox, red \n',
    'deep/er/a.JPG': png(),
    'deep/er/a.txt': 'deep',
    'c.webp': png(),
    'd.png': png(),
    'd.txt': ' \n',
    'lonely.txt': 'no picture',
    'e.gif': 'GIF89a',
    'notes.md': 'not a picture',
    '.hidden.png': png(),
  });
  t.strictSame(await listed(path), {
    examples: [
      ['b.png', 'a red fox', 'a fox, red'],
      ['deep/er/a.JPG', 'deep'],
    ],
    problems: [
      './e.gif is neither PNG, JPEG nor WebP',
      './c.webp has no caption',
      './d.png has no caption in d.txt',
      './lonely.txt is a caption without a picture',
    ],
  });
  writeFileSync(join(path, 'b.txt'), Buffer.from('\uFEFFred', 'utf16le'));
  symlinkSync('deep', join(path, 'link'));
  symlinkSync('nowhere', join(path, 'broken'));
  t.strictSame((await listed(path)).problems.slice(1, 3), [
    './link is a link to a folder, and such are not followed: move the folder here',
    './b.txt is not text in UTF-8: save it in that encoding',
  ]);
  rmSync(join(path, 'link'));
  writeFileSync(join(path, 'b.txt'), 'red');
  const { examples } = await openDataset({ path });
  t.ok(Buffer.from(await examples[0].read()).equals(Buffer.from(png())), 'the bytes of the file');
});

test('names that other systems read as paths', async (t) => {
  const path = folderOf(t, { 'a\\b.png': png(), 'a\\b.txt': 'blue' });
  const { examples } = await openDataset({ path });
  t.ok(Buffer.from(await examples[0].read()).equals(Buffer.from(png())));
});

test('pictures without a caption are given one where a run has one', async (t) => {
  const path = folderOf(t, {
    'a.png': png(),
    'b.png': png(8, 8, 1),
    'b.txt': 'its own',
    'rows/c.png': png(8, 8, 2),
    'rows/d.png': png(8, 8, 3),
    'rows/metadata.jsonl': '{"file_name": "c.png", "text": null}\n{"file_name": "gone.png", "text": "x"}',
  });
  const { examples, problems } = await openDataset({ path, instance_prompt: 'a photo of sks dog' });
  t.strictSame(
    examples.map(({ id, captions }) => [id, ...captions]),
    [
      ['a.png', 'a photo of sks dog'],
      ['b.png', 'its own'],
      ['rows/c.png', 'a photo of sks dog'],
      ['rows/d.png', 'a photo of sks dog'],
    ],
  );
  t.match(problems, [/gone\.png is not there/]);
  await refused(t, openDataset({ path: join(path, 'empty') }), /no dataset at/);
  for (const [name, rows] of [
    ['metadata.jsonl', '{"file_name": "e.png"}'],
    ['metadata.csv', 'file_name\ne.png\n'],
  ]) {
    const bare = folderOf(t, { 'e.png': png(), [name]: rows });
    const dataset = await openDataset({ path: bare, instance_prompt: 'a dog' });
    t.strictSame(
      [dataset.examples[0].captions, dataset.problems],
      [['a dog'], []],
      `${name} without captions`,
    );
    await refused(t, openDataset({ path: bare }), /has no column "text"/);
  }
});

test('captions in files of another ending', async (t) => {
  const path = folderOf(t, {
    'a.png': png(),
    'a.caption': 'a fox',
    'a.txt': 'other notes',
    'b.png': png(8, 8, 1),
  });
  for (const caption_extension of ['.caption', 'Caption']) {
    const { examples, problems } = await openDataset({ path, caption_extension });
    t.strictSame(
      examples.map(({ id, captions }) => [id, ...captions]),
      [['a.png', 'a fox']],
    );
    t.match(problems, [/b\.png has no caption$/]);
  }
  const other = openDataset({ path, caption_extension: 'tags' });
  await refused(t, other, /a\.png has no caption, but there is a\.caption: see dataset\.caption_extension/);
});

test('images beside pictures whose column has a dot in its name', async (t) => {
  const path = folderOf(t, { 'a.b.png': png(), 'a.b.txt': 'a fox', 'a.b.depth.v2.png': png(8, 8, 1) });
  const { examples, problems } = await openDataset({ path, conditioning_image_column: 'depth.v2' });
  t.strictSame(
    [examples.map(({ id, beside }) => [id, beside?.id]), problems],
    [[['a.b.png', 'a.b.depth.v2.png']], []],
  );
});

test('of a folder for each split the one that is asked for', async (t) => {
  const captioned = (name: string) => ({ [`${name}.png`]: png(), [`${name}.txt`]: name });
  const path = folderOf(t, { ...captioned('train/a'), ...captioned('test/b'), ...captioned('own/c') });
  const chosen = async (of: string, split?: string) => {
    const { examples } = await openDataset({ path: of, ...(split && { split }) });
    return examples.flatMap(({ captions }) => captions);
  };
  t.same(await chosen(path), ['train/a']);
  t.same(await chosen(path, 'test'), ['test/b']);
  t.same(await chosen(path, 'own'), ['own/c'], 'a split of its own, beside such');
  const odd = folderOf(t, { ...captioned('train/a'), ...captioned('v(1.0/b'), ...captioned('v(1x0/c') });
  t.same(await chosen(odd, 'v(1.0'), ['v(1.0/b'], 'a name is no pattern');
  const trains = folderOf(t, { ...captioned('train/a'), ...captioned('ship/b') });
  t.same(await chosen(trains), ['ship/b', 'train/a'], 'pictures of trains');
  const rows = ['train', 'test'].map((name) => `{"file_name": "${name}/a.png", "text": "${name}"}`);
  const whole = { 'train/a.png': png(), 'test/a.png': png(), 'metadata.jsonl': rows.join('\n') };
  t.same(await chosen(folderOf(t, whole)), ['test', 'train'], 'metadata above says what there is');
});

test('folders with metadata', async (t) => {
  const files = { 'train/a.png': png(), 'train/in/b.png': png(), 'train/c.png': png(), 'outside.png': png() };
  const rows = [
    '{"file_name": "a.png", "text": ["one", " two "], "other": 1}',
    '',
    '{"file_name": "./in/b.png", "text": "b"}',
    '{"file_name": "a.png", "text": "three"}',
    '{"file_name": "missing.png", "text": "m"}',
    '{"file_name": "../outside.png", "text": "o"}',
    '{"file_name": "metadata.jsonl", "text": "o"}',
    '{"file_name": "in/b.png", "text": null}',
  ];
  const jsonl = folderOf(t, { ...files, 'outside.txt': 'outer', 'train/metadata.jsonl': rows.join('\r\n') });
  t.strictSame(await listed(jsonl), {
    examples: [
      ['outside.png', 'outer'],
      ['train/a.png', 'one', 'two', 'three'],
      ['train/in/b.png', 'b'],
    ],
    problems: [
      './train/metadata.jsonl:5: missing.png is not there',
      './train/metadata.jsonl:6: ../outside.png is not there',
      './train/metadata.jsonl:7: metadata.jsonl is neither PNG, JPEG nor WebP',
      './train/metadata.jsonl:8: in/b.png has no caption',
      './train/c.png has no row in ./train/metadata.jsonl',
    ],
  });
  const csv = folderOf(t, {
    'a.png': png(),
    'b.png': png(),
    'metadata.csv': '\uFEFFfile_name,caption,n\r\na.png,"a ""fox"",\nred",1\nb.png,plain,\n\n',
  });
  const { examples } = await listed(csv, 'caption');
  t.strictSame(examples, [
    ['a.png', 'a "fox",\nred'],
    ['b.png', 'plain'],
  ]);
  const swapped = folderOf(t, {
    'a.png': png(),
    'b.png': png(),
    'metadata.csv': 'file_name,text\nb.png,b\na.png,a',
  });
  const ids = (await listed(swapped)).examples.map(([id]) => id);
  t.same(ids, ['a.png', 'b.png'], 'in an order of their own');
  const mac = folderOf(t, {
    'a.png': png(),
    'b.png': png(),
    'metadata.csv': 'file_name,text\ra.png,a\rb.png,b\r',
  });
  t.strictSame(
    (await listed(mac)).examples,
    [
      ['a.png', 'a'],
      ['b.png', 'b'],
    ],
    'lines of another system',
  );
  const short = folderOf(t, { 'a.png': png(), 'metadata.csv': 'n,text,file_name,\n,a,a.png,' });
  t.strictSame(
    (await listed(short)).examples,
    [['a.png', 'a']],
    'nothing at the beginning of a row, and a comma at the end of the file',
  );
  t.end();
});

test('what is wrong with a dataset is one sentence', async (t) => {
  await refused(t, openDataset({ path: join(t.testdir({}), 'absent') }), /no dataset at .*absent/);
  await refused(t, openDataset({ path: folderOf(t, {}) }), /no picture with a caption.*metadata\.jsonl/);
  await refused(t, openDataset({ path: folderOf(t, { 'a.png': png() }) }), /\(.*a\.png has no caption\)/);
  const lone = folderOf(t, { 'a.png': png() });
  await refused(t, openDataset({ path: join(lone, 'a.png') }), /a\.png is a file: give the folder/);
  const meta = (name: string, text: string) =>
    openDataset({ path: folderOf(t, { 'a.png': png(), [name]: text }) });
  await refused(t, meta('metadata.jsonl', '\n{"file_name": \n'), /metadata\.jsonl:2 is not a JSON object/);
  await refused(t, meta('metadata.jsonl', '[1]'), /metadata\.jsonl:1 is not a JSON object/);
  await refused(t, meta('metadata.jsonl', '{"file_name": "a.png", "txt": ""}'), /"text"; did you mean "txt"/);
  await refused(t, meta('metadata.jsonl', '{"file_name": "a.png", "text": 5}'), /neither a text nor a list/);
  await refused(t, meta('metadata.jsonl', '{"file_name": 5, "text": "5"}'), /file_name is not a text/);
  await refused(t, meta('metadata.csv', ''), /metadata\.csv is empty/);
  const both = openDataset({
    path: folderOf(t, {
      ...{ 'a.png': png(), 'metadata.csv': 'file_name,text\na.png,a\n' },
      'metadata.jsonl': '{"file_name": "a.png", "text": "b"}\n',
    }),
  });
  t.match((await both).problems, [/has metadata\.csv and metadata\.jsonl, of which one counts/]);
  await refused(
    t,
    meta('metadata.csv', 'file_name,text,,, text\na.png,a,,,b\n'),
    /csv names the column "text" twice/,
  );
  await refused(t, meta('metadata.csv', 'file_name,text\na.png,red, fox\n'), /:2 has 3 fields.*names 2/);
  await refused(t, meta('metadata.csv', 'file_name,text\na.png,"red\n'), /:2 has a quote that does not end/);
  const long = 'file_name,text\na.png,"red\n'.padEnd(2 ** 24, 'word ');
  await refused(t, meta('metadata.csv', long), /:2 has a quote that does not end/);
});

test('a picture that goes away is told, and a fault of ours is none of the dataset', async (t) => {
  const path = folderOf(t, { 'a.png': png(), 'a.txt': 'a' });
  const dataset = await openDataset({ path });
  rmSync(join(path, 'a.png'));
  await refused(t, dataset.examples[0].read(), /a\.png does not exist/);
  await refused(t, survey(dataset, { broken: 'skip' }), /a\.png does not exist.*no picture is left/);
  const faulty = { id: 'a.png', captions: ['a'], read: () => Promise.reject(new TypeError('a fault')) };
  const surveyed = survey({ examples: [faulty], problems: [] }, { broken: 'skip' });
  await t.rejects(surveyed, { name: 'TypeError', message: 'a fault' });
});

test('the survey names broken pictures', async (t) => {
  const jpeg = await sharp({ create: { width: 40, height: 30, channels: 3, background: '#36c' } })
    .jpeg()
    .withMetadata({ orientation: 6 })
    .toBuffer();
  const path = folderOf(t, {
    'a.jpg': jpeg,
    'a.txt': 'a',
    'b.jpg': jpeg.subarray(0, jpeg.length - 60),
    'b.txt': 'b',
    'c.png': 'nonsense',
    'c.txt': 'c',
    'd.txt': 'd',
  });
  const dataset = await openDataset({ path });
  const seen: number[] = [];
  const { samples, skipped } = await survey(dataset, {
    broken: 'skip',
    onProgress: (done) => seen.push(done),
  });
  t.strictSame(seen, [1, 2, 3]);
  t.strictSame(
    samples.map(({ id, size, key }) => [id, ...size, key]),
    [['a.jpg', 40, 30, keyOf('a.jpg')]],
    'the size is the upright one',
  );
  t.match(skipped[0], /d\.txt is a caption without a picture/);
  t.match(skipped[1], /^b\.jpg cannot be read as a picture/);
  t.match(skipped[2], /^c\.png cannot be read as a picture/);
  await refused(
    t,
    survey(dataset, { broken: 'fatal' }),
    /3 things.*d\.txt.*b\.jpg.*c\.png.*broken to "skip"/,
  );
  const texts = (count: number) => Array.from({ length: count }, (_, i) => [`${i}.txt`, 'x'] as const);
  for (const [count, more] of [
    [8, /\(.*0\.txt.*7\.txt is a caption without a picture\)/],
    [9, /7\.txt is a caption without a picture; and 1 more\)/],
  ] as const) {
    const files = { 'p.png': png(), 'p.txt': 'p', ...Object.fromEntries(texts(count)) };
    const many = await openDataset({ path: folderOf(t, files) });
    await refused(t, survey(many, { broken: 'fatal' }), new RegExp(`has ${count} things.*${more.source}`));
  }
  const bad = await openDataset({ path: folderOf(t, { 'c.png': 'nonsense', 'c.txt': 'c' }) });
  await refused(t, survey(bad, { broken: 'skip' }), /no picture is left/);
});
