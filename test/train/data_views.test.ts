// What a run sees of pictures: entries spread over all, buckets, crops and their time ids, captions, and what is transparent.
import sharp from 'sharp';
import { test } from 'tap';
import { decodePicture } from '../../io/image.ts';
import type { Size } from '../../models/text/conditioning.ts';
import { allCaptions, captionOf } from '../../train/data/caption.ts';
import { bucketSizes, nearestSize, openBuckets } from '../../train/pictures/buckets.ts';
import { geometryOf, preparePicture, readPixels, timeIdsOf } from '../../train/pictures/picture.ts';
import { spread, viewIn, viewsOf } from '../../train/pictures/pictures.ts';
import { fill } from '../../train/run/fields.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import { fields } from '../../train/run/run_fields.ts';
import { patterned } from '../support/datasets.ts';

/** What a run has that says nothing of its dataset. */
const defaults = fill(fields, {}, 'defaults').dataset;

test('entries spread over all, not over the first', (t) => {
  const ten = Array.from({ length: 10 }, (_, i) => i);
  t.same(spread(ten, 6), [0, 1, 3, 5, 6, 8]);
  t.same(spread(ten, 3), [0, 3, 6]);
  t.same(spread(ten, 12), ten);
  t.same(spread(ten, 0), []);
  t.same(spread([], 4), []);
  t.end();
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
  const whole = geometryOf([1, 4], [1, 4], center, { seed: 0, key: 0, variant: 0, flip: false });
  const pixels = await readPixels(files[0][1], 'as a model sees it', whole, 'bilinear');
  t.strictSame([...pixels.subarray(3, 6)], [1, 1, 1], 'and so do the pixels for the VAE');
});

test('alpha is shown as the picture is, and the colours beneath with it', async (t) => {
  const raw = { width: 40, height: 30, channels: 4 } as const;
  const rgba = Uint8Array.from({ length: 40 * 30 * 4 }, (_, i) => (i * i * 7 + (i >> 5)) % 256);
  const file = await sharp(rgba, { raw }).png().toBuffer();
  const drop = (from: (pixel: number, c: number) => number) =>
    sharp(
      Uint8Array.from({ length: 40 * 30 * 3 }, (_, i) => rgba[from(Math.floor(i / 3), i % 3)]),
      { raw: { ...raw, channels: 3 } },
    )
      .png()
      .toBuffer();
  const colours = await drop((pixel, c) => 4 * pixel + c);
  const alpha = await drop((pixel) => 4 * pixel + 3);
  for (let key = 0; key < 4; key++) {
    const place = { seed: 1, key, variant: 0, flip: key % 2 === 1 };
    const geometry = geometryOf([30, 40], [16, 16], defaults, place);
    const beneath = await readPixels(file, 'rgba', geometry, 'lanczos', 'colours');
    t.strictSame(beneath, await readPixels(colours, 'rgb', geometry, 'lanczos'), `colours, ${geometry.flip}`);
    const grey = await readPixels(alpha, 'alpha as grey', geometry, 'lanczos', 'conditioning');
    const got = await readPixels(file, 'rgba', geometry, 'lanczos', 'alpha');
    t.strictSame(
      got,
      grey.filter((_, i) => i % 3 === 0),
      `alpha, ${geometry.flip}`,
    );
  }
  t.end();
});

const where = { seed: 7, key: 11, variant: 0, flip: false };

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
  const lefts = new Set<number>();
  for (let key = 0; key < 400; key++) {
    const { crop } = geometryOf([64, 72], [64, 64], { center_crop: false }, { ...where, key });
    lefts.add(crop[1]);
    if (crop[0] !== 0) t.fail(`a crop at ${crop}`);
  }
  t.strictSame([...lefts].sort(), [0, 1, 2, 3, 4, 5, 6, 7, 8], 'every place is reached');
  t.end();
});

test('each epoch draws anew which pictures are mirrored, of a single crop too', (t) => {
  const read = () => Promise.reject(new Error('no pixels are read'));
  const samples = Array.from({ length: 40 }, (_, key) => ({
    ...{ id: `${key}`, key, hash: '', captions: [''], size: [64, 72] as const, read },
  }));
  const pictures = {
    samples,
    buckets: [[64, 64]] as Size[],
    bucketOf: samples.map(() => 0),
    hash: '',
    captionsHash: '',
  };
  for (const [crops, random_flip] of [
    [1, true],
    [3, true],
    [3, false],
  ] as const) {
    const own = resolveRun({ dataset: { crops, random_flip } }, 'test', 'test');
    const all = { ...pictures, validationImages: [] };
    const prepared = new Set(viewsOf(all, own).map((view) => JSON.stringify(view)));
    t.equal(prepared.size, 40 * crops * (random_flip ? 2 : 1));
    let flips = 0;
    for (let epoch = 0; epoch < 100; epoch++)
      for (const i of samples.keys()) {
        const view = viewIn(epoch, i, all, own);
        if (!prepared.has(JSON.stringify(view))) t.fail(`epoch ${epoch} shows what is not prepared`);
        if (view.geometry.flip) flips++;
      }
    // Of 4000 draws; for each picture, of 100.
    t.ok(random_flip ? Math.abs(flips - 2000) < 130 : flips === 0, `${flips} of 4000 are mirrored`);
    const ofOne = Array.from({ length: 100 }, (_, epoch) => viewIn(epoch, 7, all, own).geometry.flip);
    const times = ofOne.filter((flip) => flip).length;
    t.ok(random_flip ? Math.abs(times - 50) < 17 : times === 0, `${times} of 100 epochs mirror a picture`);
  }
  t.end();
});

test('time ids tell of the crop that is seen', (t) => {
  const picture = patterned(20, 12);
  const options = { center_crop: false };
  for (let key = 0; key < 40; key++) {
    const geometry = geometryOf([12, 20], [8, 8], options, { ...where, key, flip: key % 2 === 1 });
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
  }
  const geometry = geometryOf([100, 50], [64, 64], options, where);
  t.strictSame(timeIdsOf(geometry, 6), [100, 50, geometry.crop[0], 0, 6], 'the refiner takes a score');
  t.end();
});

test('buckets', (t) => {
  const sizes = bucketSizes(1024, true, 32);
  t.equal(sizes.length, 40, "the paper's forty");
  t.ok(sizes.every(([h, w]) => h % 64 === 0 && w % 64 === 0 && h * w >= 0.89 * 2 ** 20 && h * w <= 2 ** 20));
  const nearest = (h: number, w: number) => nearestSize([h, w], sizes);
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

test('sizes of their own for pictures that would be enlarged', (t) => {
  const sizing = { resolution: 1024, aspect_ratio_buckets: true, bucket_no_upscale: true };
  const shown = (size: Size, of = sizing as Parameters<typeof openBuckets>[0]) => {
    const { buckets, bucketsOf } = openBuckets(of, 32);
    return bucketsOf(size).map((bucket) => buckets[bucket]);
  };
  t.strictSame(shown([1024, 1024]), [[1024, 1024]], 'one that is as large as its bucket is not enlarged');
  t.strictSame(shown([3000, 2000]), [[1216, 832]]);
  t.strictSame(shown([1215, 832]), [[1184, 832]], 'one row too few');
  t.strictSame(shown([700, 500]), [[672, 480]]);
  t.strictSame(shown([20, 70]), [[32, 64]], 'a side below a step');
  // 500 x 3000 has 1.43 times the area: 418.01 x 2508.05.
  t.strictSame(shown([500, 3000]), [[416, 2496]], 'a narrow one has no more pixels than others');
  const enlarging = { ...sizing, bucket_no_upscale: false };
  t.strictSame(shown([500, 3000], enlarging), [[512, 2048]]);
  const several = { ...sizing, resolution: [1024, 512] };
  t.strictSame(
    shown([3000, 2000], several),
    [
      [1216, 832],
      [608, 416],
    ],
    'one for each resolution',
  );
  t.strictSame(shown([450, 450], several), [[448, 448]], 'but none twice');
  const { buckets } = openBuckets(several, 32);
  t.equal(new Set(buckets.map(String)).size, buckets.length, 'no size is listed twice');
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
  // What kohya's own lines make of these.
  for (const [caption, made] of [
    ['{a|b|} {{x|y}} {c}{}', [' {x|y} c{}', 'a {x|y} c{}', 'b {x|y} c{}']],
    ['{a{{|b}}} {d|e}', ['a{ d', 'a{ e', 'b} d', 'b} e']],
    ['{a {b|c} d}', ['a {b d}', 'c d}']],
  ] as const) {
    const drawn = counted({ enable_wildcard: true }, [caption]);
    t.strictSame([...drawn.keys()].sort(), made);
    t.ok(
      [...drawn.values()].every((count) => Math.abs(count - 3000 / made.length) < 110),
      'evenly',
    );
    t.strictSame([...counted({}, [caption]).keys()], [caption], 'only where that is asked for');
  }
  const wild = { enable_wildcard: true, shuffle_caption: true };
  t.equal(counted(wild, ['{a, b|c}, d']).size, 6 + 2, 'tags of an alternative are shuffled too');
  t.equal(allCaptions([{ captions: ['{a|b}'] }], { ...defaults, enable_wildcard: true }), undefined);
  const kept = { shuffle_caption: true, keep_tokens: 5, keep_tokens_separator: '|||' };
  t.strictSame(
    [...counted(kept, ['a, b ||| c, d,||| e']).keys()].sort(),
    ['a, b, c, d, e', 'a, b, d, c, e'],
    'what stands before and behind the separators stays',
  );
  t.strictSame([...counted(kept, ['a, b']).keys()], ['a, b'], 'a caption without one has its first tags');
  const separated = { ...defaults, keep_tokens_separator: '|||' };
  const shown = 'a, b, c, d';
  t.equal(captionOf(['a, b ||| c|||d'], separated, { seed: 3, epoch: 5, key: 9 }), shown);
  t.strictSame(allCaptions([{ captions: ['a, b ||| c|||d', 'e'] }], separated), [shown, 'e']);
  const at = { seed: 3, epoch: 5, key: 9 };
  const written = ' a ,b,, c';
  t.equal(captionOf([written], defaults, at), written, 'what is not drawn from stays as it is written');
  t.equal(captionOf(captions, defaults, at), captionOf(captions, defaults, at));
  t.strictSame(allCaptions([{ captions }, { captions: ['two', 'four'] }], defaults), [...captions, 'four']);
  t.equal(allCaptions([{ captions }], { ...defaults, shuffle_caption: true }), undefined);
  t.end();
});
