// Training data: sources, the survey, geometry, buckets and captions (order.test.ts has what comes after). Expected numbers are by hand or by
// torchvision's formulas; the pixels of resizing are held to Pillow in pictures.test.ts.
import { mkdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import sharp from 'sharp';
import { type Test, test } from 'tap';
import { UserError } from '../io/errors.ts';
import { decodePicture } from '../io/image.ts';
import type { Picture } from '../io/pixels.ts';
import { encodePng } from '../io/png.ts';
import type { Size } from '../models/conditioning.ts';
import { bucketSizes, nearestBucket } from '../train/data/buckets.ts';
import { allCaptions, captionOf } from '../train/data/caption.ts';
import { geometryOf, preparePicture, readPixels, timeIdsOf } from '../train/data/picture.ts';
import { keyOf, openDataset } from '../train/data/source.ts';
import { survey } from '../train/data/survey.ts';
import { fill } from '../train/fields.ts';
import { openPictures } from '../train/pictures.ts';
import { fields, resolveRun } from '../train/run.ts';

/** What a run has that says nothing of its dataset. */
const defaults = fill(fields, {}, 'defaults').dataset;

/** A picture in which every pixel differs from its neighbours. */
function patterned(width: number, height: number, salt = 0): Picture {
  const data = Uint8Array.from(
    { length: width * height * 3 },
    (_, i) => (i * 89 + salt * 31 + (i >> 5)) % 256,
  );
  return { width, height, channels: 3, data };
}

const png = (width = 8, height = 8, salt = 0) => encodePng(patterned(width, height, salt));

function folderOf(t: Test, files: Record<string, string | Uint8Array>): string {
  const folder = t.testdir({});
  for (const [name, content] of Object.entries(files)) {
    mkdirSync(dirname(join(folder, name)), { recursive: true });
    writeFileSync(join(folder, name), content);
  }
  return folder;
}

const listed = async (path: string, caption_column = 'text') => {
  const { examples, problems } = await openDataset({ path, caption_column });
  return {
    examples: examples.map(({ id, captions }) => [id, ...captions]),
    problems: problems.map((problem) => problem.replaceAll(path, '.')),
  };
};

async function refused(t: Test, promise: Promise<unknown>, pattern: RegExp): Promise<void> {
  const error = await promise.then(
    () => new Error('nothing was thrown'),
    (reason: unknown) => reason,
  );
  const sentence = error instanceof UserError && !error.message.includes('\n');
  t.ok(sentence && pattern.test(error.message), `${pattern}: ${error}`);
}

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
});

test('folders that say how often their pictures are shown', async (t) => {
  const path = folderOf(t, {
    '3_ohwx man/a.png': png(),
    '3_ohwx man/deep/b.png': png(8, 8, 1),
    '1_dog/c.png': png(8, 8, 2),
    'plain/2_d.png': png(8, 8, 3),
  });
  const shown = async (folder_repeats: boolean) => {
    const dataset = { path, resolution: 8, instance_prompt: 'x', folder_repeats };
    const { samples } = await openPictures(resolveRun({ dataset }, 'a run', 'x'), 8, {
      line() {},
      progress() {},
    });
    t.equal(new Set(samples.map(({ key }) => key)).size, samples.length, 'each with draws of its own');
    return samples.map(({ id }) => id);
  };
  t.strictSame(await shown(false), [
    '1_dog/c.png',
    '3_ohwx man/a.png',
    '3_ohwx man/deep/b.png',
    'plain/2_d.png',
  ]);
  t.strictSame(await shown(true), [
    '1_dog/c.png',
    ...['', ' (2)', ' (3)'].map((copy) => `3_ohwx man/a.png${copy}`),
    ...['', ' (2)', ' (3)'].map((copy) => `3_ohwx man/deep/b.png${copy}`),
    'plain/2_d.png',
  ]);
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
  await refused(t, meta('metadata.csv', 'file_name,text\na.png,red, fox\n'), /:2 has 3 fields.*names 2/);
  await refused(t, meta('metadata.csv', 'file_name,text\na.png,"red\n'), /:2 has a quote that does not end/);
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

test('what is transparent lies on white', async (t) => {
  const rgba = Uint8Array.from([10, 20, 30, 255, 10, 20, 30, 0, 100, 0, 200, 128, 0, 0, 0, 51]);
  const want = (alpha: number, value: number) => (value * alpha + 255 * (255 - alpha)) / 255;
  const raw = { width: 4, height: 1, channels: 4 } as const;
  const deep = Uint16Array.from(rgba, (value) => value * 257);
  const { encode } = await import('fast-png');
  const files: [string, Uint8Array][] = [
    ['8 bits', await sharp(rgba, { raw }).png().toBuffer()],
    ['WebP', await sharp(rgba, { raw }).webp({ lossless: true, exact: true }).toBuffer()],
    ['16 bits', encode({ width: 4, height: 1, channels: 4, depth: 16, data: deep })],
  ];
  for (const [label, file] of files) {
    const { data, channels } = await decodePicture(file, label, { onWhite: true });
    const worst = Math.max(
      ...data.map((value, i) => {
        const pixel = Math.floor(i / 3);
        return Math.abs(value - want(rgba[4 * pixel + 3], rgba[4 * pixel + (i % 3)]));
      }),
    );
    t.ok(channels === 3 && worst <= 1, `${label}: off by ${worst}`);
  }
  const grey = encode({ width: 2, height: 1, channels: 2, data: Uint8Array.of(40, 255, 40, 0) });
  const { data } = await decodePicture(grey, 'grey', { onWhite: true });
  t.strictSame([...data], [40, 40, 40, 255, 255, 255], 'grey with alpha');
  const center = { ...defaults, center_crop: true };
  const whole = geometryOf([1, 4], [1, 4], center, { seed: 0, key: 0, variant: 0 });
  const pixels = await readPixels(files[0][1], 'as a model sees it', whole, 'bilinear');
  t.strictSame([...pixels.subarray(3, 6)], [1, 1, 1], 'and so do the pixels for the VAE');
});

const where = { seed: 7, key: 11, variant: 0 };

test('geometry covers the target and nothing more', (t) => {
  const center = { ...defaults, center_crop: true };
  const cases: [Size, Size, Size, readonly [number, number]][] = [
    // torchvision: int(1024 * 1500 / 1000), crop at int(round((1536 - 1024) / 2))
    [
      [1000, 1500],
      [1024, 1024],
      [1024, 1536],
      [0, 256],
    ],
    [
      [1500, 1000],
      [1024, 1024],
      [1536, 1024],
      [256, 0],
    ],
    [
      [333, 500],
      [512, 512],
      [512, 768],
      [0, 128],
    ],
    [
      [64, 67],
      [64, 64],
      [64, 67],
      [0, 2],
    ],
    [
      [64, 69],
      [64, 64],
      [64, 69],
      [0, 2],
    ],
    [
      [64, 65],
      [64, 64],
      [64, 65],
      [0, 0],
    ],
    [
      [64, 71],
      [64, 64],
      [64, 71],
      [0, 4],
    ],
    [
      [832, 1216],
      [832, 1216],
      [832, 1216],
      [0, 0],
    ],
    [
      [1000, 1000],
      [832, 1216],
      [1216, 1216],
      [192, 0],
    ],
    [
      [3, 2],
      [1024, 1024],
      [1536, 1024],
      [256, 0],
    ],
  ];
  for (const [original, target, resized, crop] of cases) {
    t.strictSame(geometryOf(original, target, center, where), {
      original,
      resized,
      crop,
      target,
      flip: false,
    });
  }
  let flips = 0;
  const lefts = new Set<number>();
  for (let key = 0; key < 4000; key++) {
    const { crop, flip } = geometryOf(
      [64, 72],
      [64, 64],
      { center_crop: false, random_flip: true },
      { ...where, key },
    );
    if (flip) flips++;
    lefts.add(crop[1]);
    if (crop[0] !== 0) t.fail(`a crop at ${crop}`);
  }
  t.ok(Math.abs(flips - 2000) < 130, `${flips} of 4000 are mirrored`);
  t.strictSame([...lefts].sort(), [0, 1, 2, 3, 4, 5, 6, 7, 8], 'every place is reached');
  t.end();
});

test('time ids tell of the crop that is seen', (t) => {
  const picture = patterned(20, 12);
  const options = { center_crop: false, random_flip: true };
  let [mirrored, plain] = [0, 0];
  for (let key = 0; key < 40; key++) {
    const geometry = geometryOf([12, 20], [8, 8], options, { ...where, key });
    const same = { ...geometry, resized: [12, 20] as Size }; // no resizing, so that pixels can be named
    const got = preparePicture(picture, same, 'bilinear');
    const [h, w, top, left, targetH, targetW] = timeIdsOf(same);
    t.strictSame([h, w, targetH, targetW], [12, 20, 8, 8]);
    const at = (y: number, x: number, c: number) => picture.data[(y * 20 + (same.flip ? 19 - x : x)) * 3 + c];
    const want = Float32Array.from({ length: 192 }, (_, i) => {
      const [y, x, c] = [Math.floor(i / 24), Math.floor(i / 3) % 8, i % 3];
      return 2 * Math.fround(at(top + y, left + x, c) / 255) - 1;
    });
    t.ok(
      got.every((value, i) => value === want[i]),
      `${same.flip ? 'mirrored' : 'plain'}, left ${left}`,
    );
    same.flip ? mirrored++ : plain++;
  }
  t.ok(mirrored > 5 && plain > 5);
  const geometry = geometryOf([100, 50], [64, 64], { ...options, random_flip: false }, where);
  t.strictSame(timeIdsOf(geometry, 6), [100, 50, geometry.crop[0], 0, 6], 'the refiner takes a score');
  t.end();
});

test('buckets', (t) => {
  const sizes = bucketSizes(1024, true, 32);
  t.equal(sizes.length, 40, "the paper's forty");
  t.ok(sizes.every(([h, w]) => h % 64 === 0 && w % 64 === 0 && h * w >= 0.89 * 2 ** 20 && h * w <= 2 ** 20));
  const nearest = (h: number, w: number) => sizes[nearestBucket([h, w], sizes)];
  t.strictSame(nearest(3000, 3000), [1024, 1024]);
  t.strictSame(nearest(100, 1000), [512, 2048]);
  t.strictSame(nearest(1000, 100), [2048, 512]);
  t.strictSame(nearest(2000, 3000), [832, 1216]);
  t.strictSame(nearest(3000, 2000), [1216, 832]);
  t.strictSame(nearest(1080, 1920), [768, 1344]);
  t.strictSame(bucketSizes(1024, false, 32), [[1024, 1024]]);
  const small = bucketSizes(64, true, 8);
  t.ok(small.every(([h, w]) => h % 8 === 0 && w % 8 === 0 && h * w <= 80 * 64));
  t.equal(new Set(small.map(String)).size, small.length, 'no size twice');
  t.end();
});

test('captions', (t) => {
  const captions = ['one', 'two', 'three'];
  const many = Array.from({ length: 3000 }, (_, key) => ({ seed: 3, epoch: 0, key }));
  const counted = (options: Partial<typeof defaults>, choices: string[]) => {
    const counts = new Map<string | undefined, number>();
    for (const at of many) {
      const caption = captionOf(choices, { ...defaults, ...options }, at);
      counts.set(caption, (counts.get(caption) ?? 0) + 1);
    }
    return counts;
  };
  const even = counted({}, captions);
  t.ok(
    captions.every((caption) => Math.abs((even.get(caption) ?? 0) - 1000) < 110),
    'a list is drawn from evenly',
  );
  const dropped = counted({ caption_dropout_rate: 0.1 }, ['one']).get(undefined) ?? 0;
  t.ok(Math.abs(dropped - 300) < 66, `${dropped} of 3000 dropped`);
  const shuffled = counted({ shuffle_caption: true, keep_tokens: 1 }, ['a , b,c,, d']);
  t.strictSame(
    [...shuffled.keys()].sort(),
    ['a, b, c, d', 'a, b, d, c', 'a, c, b, d', 'a, c, d, b', 'a, d, b, c', 'a, d, c, b'],
    'the first tag stays, the others take every order',
  );
  t.ok([...shuffled.values()].every((count) => Math.abs(count - 500) < 90));
  const thinned = counted({ caption_tag_dropout_rate: 0.5, caption_separator: ';' }, ['a;b']);
  t.ok(
    ['a; b', 'a', 'b', ''].every((text) => Math.abs((thinned.get(text) ?? 0) - 750) < 100),
    'tags fall out',
  );
  const at = { seed: 3, epoch: 5, key: 9 };
  const written = ' a ,b,, c';
  t.equal(captionOf([written], defaults, at), written, 'what is not drawn from stays as it is written');
  t.equal(captionOf(captions, defaults, at), captionOf(captions, defaults, at));
  t.strictSame(allCaptions([{ captions }, { captions: ['two', 'four'] }], defaults), [...captions, 'four']);
  t.equal(allCaptions([{ captions }], { ...defaults, shuffle_caption: true }), undefined);
  t.end();
});
