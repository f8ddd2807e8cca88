// Pictures: resizing against Pillow and processing against diffusers (golden area `image`), PNG and every other kind of file.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { deflateSync } from 'node:zlib';
import { decode } from 'fast-png';
import sharp from 'sharp';
import { test } from 'tap';
import { cudaDevice, openDevice } from '../../engine/device.ts';
import { toPixels } from '../../engine/ops/pixels.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import {
  decodeAlpha,
  preprocess,
  preprocessMask,
  readMask,
  readPicture,
  toGrey,
  toPictures,
  writePng,
} from '../../io/image.ts';
import type { Picture, Pixels } from '../../io/pixels.ts';
import { encodePng, pngText, readPngText } from '../../io/png.ts';
import { type ResizeFilter, resize } from '../../io/resize.ts';
import { channelsLast } from '../../models/vae/latents.ts';
import { allClose, goldenArea, goldenFolder, maxDifference } from '../support/golden.ts';
import { at, exact, folder, randomNumbers, sameBytes } from '../support/io_helpers.ts';
import { nonEmpty } from '../support/non_empty.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

const golden = goldenArea('image');

function goldenPicture(tensor: string): Picture {
  const [height, width] = golden.shape(tensor);
  return { width, height, channels: 3, data: golden.bytes(tensor) };
}

test('resize: Pillow, to the bit', (t) => {
  const resized = golden.cases.filter((found) => found.id.startsWith('resize_'));
  for (const { id, inputs, expect } of nonEmpty(resized)) {
    const [, filter, width, height] = /^resize_([a-z]+)_(\d+)x(\d+)$/.exec(id) ?? [];
    const picture = goldenPicture(inputs?.picture ?? '');
    const got = resize(picture, Number(width), Number(height), filter as ResizeFilter);
    const want = golden.bytes(expect.y.tensor);
    t.ok(sameBytes(got.data, want), `${id}: largest difference ${maxDifference(got.data, want)}`);
  }
  const picture = goldenPicture('picture');
  t.ok(sameBytes(resize(picture, picture.width, picture.height, 'lanczos').data, picture.data), 'same size');
  for (const filter of ['lanczos', 'bicubic', 'bilinear', 'nearest'] as const) {
    for (const [width, height] of [
      [37, 91],
      [picture.width, 20],
      [picture.width, picture.height],
    ]) {
      const window = { left: 5, top: 3, width: 11, height: 14 };
      const whole = resize(picture, width, height, filter);
      const want = Uint8Array.from({ length: 11 * 14 * 3 }, (_, i) => {
        const [y, x] = [Math.floor(i / 33), Math.floor(i / 3) % 11];
        return whole.data[((3 + y) * width + 5 + x) * 3 + (i % 3)];
      });
      const got = resize(picture, width, height, filter, window);
      t.strictSame([got.width, got.height], [11, 14]);
      t.ok(sameBytes(got.data, want), `${filter} to ${width} x ${height}: a window is a part of the whole`);
    }
  }
  const line: Picture = { width: 60_000, height: 1, channels: 3, data: new Uint8Array(180_000).fill(7) };
  const window = { left: 30_000_000, top: 0, width: 64, height: 64 };
  t.ok(
    resize(line, 61_440_000, 1024, 'lanczos', window).data.every((value) => value === 7),
    'all width',
  );
  const grey = resize(toGrey(picture), 24, 16, 'lanczos');
  t.strictSame([grey.channels, grey.data.length], [1, 24 * 16], 'grey pictures');
  t.end();
});

test('resize: one channel as the first of three', (t) => {
  const { width, height, data } = goldenPicture('picture');
  const window = { left: 5, top: 3, width: 20, height: 11 };
  for (const filter of ['lanczos', 'bicubic', 'bilinear', 'nearest'] as const) {
    const to = <P extends Pixels>(from: P) => resize(from, 37, 29, filter, window);
    const want = to({ width, height, channels: 3, data });
    const got = to({ width, height, channels: 1, data: data.filter((_, i) => i % 3 === 0) });
    t.strictSame([got.width, got.height, got.channels, want.channels], [20, 11, 1, 3]);
    t.ok(
      sameBytes(
        got.data,
        want.data.filter((_, i) => i % 3 === 0),
      ),
      filter,
    );
  }
  t.end();
});

test('pixels: VaeImageProcessor', (t) => {
  const cases = new Map(golden.cases.map((found) => [found.id, found]));
  for (const id of ['preprocess', 'preprocess_exact']) {
    const { inputs, expect } = cases.get(id)!;
    const { data, shape } = preprocess(goldenPicture(inputs?.picture ?? ''));
    t.strictSame(shape, golden.shape(expect.y.tensor), `${id}: shape`);
    allClose(t, `${id} to the bit`, data, golden.floats(expect.y.tensor), exact);
  }
  const { inputs, expect } = cases.get('postprocess')!;
  const z = golden.floats(inputs?.z ?? '');
  const shape = golden.shape(inputs?.z ?? '');
  const pictures = Buffer.concat(toPictures(z, shape).map(({ data }) => data));
  t.ok(sameBytes(pictures, golden.bytes(expect.uint8.tensor)), 'postprocess: pictures');
  const halves = Array.from({ length: 191 }, (_, i) => i + 64).filter(
    (grey) => Math.fround(Math.fround((grey + 0.5) / 255) * 255) === grey + 0.5,
  );
  const [rounded] = toPictures(
    Float32Array.from(Array(3).fill(halves).flat(), (grey) => 2 * Math.fround((grey + 0.5) / 255) - 1),
    [1, 3, 1, halves.length],
  );
  const odd = halves.filter((grey, i) => rounded.data[3 * i] !== grey + (grey % 2)).length;
  t.ok(halves.length > 50 && odd === 0, `${halves.length} halves are rounded to even`);
  const mask = cases.get('mask_preprocess')!;
  const maskTensor = mask.inputs?.mask ?? '';
  const [height, width] = golden.shape(maskTensor);
  const got = preprocessMask({ width, height, channels: 1, data: golden.bytes(maskTensor) });
  t.strictSame(got.shape, golden.shape(mask.expect.y.tensor), 'mask: shape');
  allClose(t, 'mask', got.data, golden.floats(mask.expect.y.tensor), exact);
  t.end();
});

test('a device makes the same bytes of a picture', (t) => {
  const { inputs, expect } = golden.cases.find(({ id }) => id === 'postprocess')!;
  const z = golden.floats(inputs?.z ?? '');
  const [n, c, h, w] = golden.shape(inputs?.z ?? '');
  const want = golden.bytes(expect.uint8.tensor);
  const odd = [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, 1, -1, 1.1, -1.1, 0];
  const halves = Array.from({ length: 255 }, (_, grey) => 2 * Math.fround((grey + 0.5) / 255) - 1);
  const more = Float32Array.from([...odd, ...halves]);
  const [{ data }] = toPictures(Float32Array.from([...more, ...more, ...more]), [1, 3, 1, more.length]);
  const ours = data.filter((_, i) => i % 3 === 0);
  for (const device of [openDevice('reference'), openDevice('auto'), cudaDevice(openVirtualGpu())])
    scope(() => {
      const x = channelsLast(tensor(z, [n, c, h, w], { device }));
      t.ok(sameBytes(toPixels(x).bytes(), want), `${device.name}: diffusers' picture`);
      t.ok(
        sameBytes(toPixels(tensor(more, [more.length], { device })).bytes(), ours),
        `${device.name}: what is odd`,
      );
    });
  t.end();
});

test('png: our encoder, judged by two decoders', async (t) => {
  const random = randomNumbers(3);
  const smooth = goldenPicture('picture');
  const noise: Picture = {
    width: 33,
    height: 7,
    channels: 3,
    data: Uint8Array.from({ length: 693 }, () => random() * 256),
  };
  const dot: Picture = { width: 1, height: 1, channels: 3, data: Uint8Array.of(1, 2, 3) };
  for (const picture of [smooth, noise, dot, toGrey(smooth)]) {
    const label = `${picture.width}x${picture.height}x${picture.channels}`;
    const bytes = encodePng(picture);
    const judged = decode(bytes, { checkCrc: true });
    t.strictSame(
      [judged.width, judged.height, judged.channels],
      [picture.width, picture.height, picture.channels],
      label,
    );
    t.ok(sameBytes(judged.data as Uint8Array, picture.data), `${label}: fast-png`);
    const space = picture.channels === 1 ? 'b-w' : 'srgb';
    const data = await sharp(bytes).toColourspace(space).raw().toBuffer();
    t.ok(sameBytes(data, picture.data), `${label}: sharp`);
  }
  t.end();
});

test('png: text metadata', async (t) => {
  const path = at('text.png');
  const text = { parameters: 'ein Fuchs, 狐 🦊\nSteps: 30', Software: 'sdxl ± ü' };
  writePng(path, goldenPicture('picture'), text);
  const bytes = readFileSync(path);
  t.equal(decode(bytes, { checkCrc: true }).text.Software, text.Software, 'Latin-1 is tEXt');
  const { comments = [] } = await sharp(bytes).metadata();
  const found = comments.find(({ keyword }) => keyword === 'parameters')?.text;
  t.equal(found, text.parameters, 'other text is iTXt');
  t.ok(sameBytes((await readPicture(path)).data, golden.bytes('picture')));
  t.throws(() => encodePng(goldenPicture('picture'), { 'schlüssel€': '' }), /not a PNG keyword/);
  t.end();
});

const latin = (text: string) => Buffer.from(text, 'latin1');

/** A PNG of chunks without their checksums. */
function pngOf(chunks: readonly (readonly [type: string, data: Buffer])[]): Buffer {
  const bytes = chunks.map(([type, data]) => {
    const length = Buffer.alloc(4);
    length.writeUInt32BE(data.length);
    return Buffer.concat([length, latin(type), data, Buffer.alloc(4)]);
  });
  return Buffer.concat([latin('\x89PNG\r\n\x1a\n'), ...bytes]);
}

test('png: texts without end are not all read', (t) => {
  const packed = deflateSync(Buffer.alloc(2 ** 16, 97));
  const texts = Array.from(
    { length: 3000 },
    (_, i) => ['zTXt', Buffer.concat([latin(`${i}\0\0`), packed])] as const,
  );
  t.equal(Object.keys(pngText(pngOf(texts), 'x')).length, 100, 'where each may unpack to a megabyte');
  t.end();
});

test('png: the text that other programs write', (t) => {
  const chunks: [string, Buffer][] = [
    ['tEXt', latin('plain\0Grüße')],
    ['tEXt', latin('\0no keyword')],
    ['tEXt', latin(`${'k'.repeat(79)}\0longest keyword`)],
    ['tEXt', latin(`${'k'.repeat(80)}\0too long a keyword`)],
    ['tEXt', latin('no end')],
    ['zTXt', Buffer.concat([latin('packed\0\0'), deflateSync(latin('Grüße'))])],
    ['zTXt', latin('broken\0\0nonsense')],
    ['zTXt', Buffer.concat([latin('bomb\0\0'), deflateSync(Buffer.alloc(2 ** 20 + 1))])],
    ['iTXt', Buffer.from('international\0\0\0de\0Wort\0狐')],
    ['iTXt', Buffer.concat([latin('both\0\x01\0\0\0'), deflateSync(Buffer.from('狐'))])],
    ['iTXt', latin('unfinished\0\0\0de')],
    ['iTXt', latin('unfinished too\0\0\0de\0Wort')],
    ['tIME', latin('time\0x')],
  ];
  const path = at('foreign.png');
  const file = pngOf(chunks);
  const want = {
    plain: 'Grüße',
    ['k'.repeat(79)]: 'longest keyword',
    packed: 'Grüße',
    international: '狐',
    both: '狐',
  };
  writeFileSync(path, file);
  t.strictSame({ ...readPngText(path) }, want);
  const cut = Buffer.from('00000009', 'hex'); // of nine bytes only four are there, and no checksum
  writeFileSync(path, Buffer.concat([file, cut, latin('tEXtcut\0')]));
  t.strictSame({ ...readPngText(path) }, want, 'a chunk that is cut off is passed over');
  writeFileSync(path, file.subarray(1));
  t.throws(() => readPngText(path), { name: 'UserError', message: /is not a PNG file/ });
  t.end();
});

test('pictures: every kind is read as 8-bit RGB', async (t) => {
  const rgb = Uint8Array.from({ length: 4 * 6 * 3 }, (_, i) => (i * 37) % 256);
  const picture: Picture = { width: 6, height: 4, channels: 3, data: rgb };
  const raw = { width: 6, height: 4, channels: 3 } as const;
  const withAlpha = Uint8Array.from({ length: 96 }, (_, i) =>
    i % 4 === 3 ? (i * 5) % 256 : rgb[Math.floor(i / 4) * 3 + (i % 4)],
  );
  const path = at('kind.png');
  const reads = async (bytes: Uint8Array, want: Uint8Array, label: string) => {
    writeFileSync(path, bytes);
    const got = await readPicture(path);
    t.ok(sameBytes(got.data, want), `${label}: largest difference ${maxDifference(got.data, want)}`);
  };
  await reads(
    await sharp(withAlpha, { raw: { ...raw, channels: 4 } })
      .png()
      .toBuffer(),
    rgb,
    'alpha is dropped',
  );
  await reads(await sharp(rgb, { raw }).webp({ lossless: true }).toBuffer(), rgb, 'lossless WebP');
  const grey = toGrey(picture).data;
  const greyAsRgb = Uint8Array.from({ length: 72 }, (_, i) => grey[Math.floor(i / 3)]);
  await reads(encodePng(toGrey(picture)), greyAsRgb, 'grey');
  t.ok(sameBytes((await readMask(path)).data, grey), 'a grey file is its own mask');
  const { encode } = await import('fast-png');
  const deep = Uint16Array.from(rgb, (value, i) => value * 256 + ((i * 91) % 256));
  await reads(encode({ width: 6, height: 4, channels: 3, depth: 16, data: deep }), rgb, '16-bit RGB');
  const deepGrey = Uint16Array.from(grey, (value, i) => value * 256 + ((i * 91) % 256));
  await reads(
    encode({ width: 6, height: 4, channels: 1, depth: 16, data: deepGrey }),
    greyAsRgb,
    '16-bit grey',
  );
  // 8 x 8 pixels of two mixtures of inks as Pillow wrote them, and what its convert('RGB') gives.
  const inks =
    '/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwABAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB/8AAFAgACAAIBEMRAE0RAFkRAEsRAP/EABcAAAMBAAAAAAAAAAAAAAAAAAcICQr/xAAeEAABAwQDAAAAAAAAAAAAAAAACQpHSIeIyEnGx//aAA4EQwBNAFkASwAAPwBsGp1eWLuxIF3j3HPl3rAakEuZztl6CV4Uihm4nRT/2Q==';
  const row = [...Array(4).fill([46, 190, 139]), ...Array(4).fill([130, 3, 135])].flat();
  await reads(Buffer.from(inks, 'base64'), Uint8Array.from(Array(8).fill(row).flat()), 'CMYK');
  writeFileSync(path, await sharp(rgb, { raw }).png().withMetadata({ orientation: 6 }).toBuffer());
  const turned = await readPicture(path);
  t.strictSame([turned.width, turned.height], [4, 6], 'EXIF orientation');
  t.strictSame([...turned.data.subarray(0, 3)], [...rgb.subarray(54, 57)], 'a quarter turn clockwise');
  t.end();
});

test('pictures: how opaque each kind is', async (t) => {
  // Three pixels by two as Pillow wrote them (16 bits by hand), and the alpha of its exif_transpose and convert('RGBA').
  const files: readonly (readonly [label: string, alpha: number[][], base64: string])[] = [
    [
      'palette',
      [
        [255, 255, 64],
        [128, 128, 0],
      ],
      'iVBORw0KGgoAAAANSUhEUgAAAAMAAAACAgMAAADgGo6JAAAADFBMVEUAChQeKDI8RlBaZG4t2Db8AAAABHRSTlMAQID/1YicnAAAAAxJREFUeJxj+MK0BgADkAGjL4uwjgAAAABJRU5ErkJggg==',
    ],
    [
      'one colour',
      [
        [255, 0, 255],
        [255, 255, 0],
      ],
      'iVBORw0KGgoAAAANSUhEUgAAAAMAAAACCAIAAAASFvFNAAAABnRSTlMACgAUAB7FNin/AAAAHElEQVR4nGPwO+PAJSKXXsXL0LXmQk0KD5eIHAA8wgWzbYUxfQAAAABJRU5ErkJggg==',
    ],
    [
      'grey',
      [
        [34, 32, 204],
        [127, 151, 153],
      ],
      'iVBORw0KGgoAAAANSUhEUgAAAAMAAAACCAQAAAA3fa6RAAAAFklEQVR4nGPwUxJQSD/DYhOrJ5F0FgAXcQPm+SuAMgAAAABJRU5ErkJggg==',
    ],
    [
      'turned',
      [
        [127, 34],
        [151, 32],
        [153, 204],
      ],
      'iVBORw0KGgoAAAANSUhEUgAAAAMAAAACCAYAAACddGYaAAAAGmVYSWZNTQAqAAAACAABARIAAwAAAAEABgAAAAAAANZnS2kAAAAjSURBVHicY/A746Ak8OulQnoV7xnGrjUX6j/tsJFISn/PBACT3guIX2RNOQAAAABJRU5ErkJggg==',
    ],
    [
      'WebP',
      [
        [34, 32, 204],
        [127, 151, 153],
      ],
      'UklGRlwAAABXRUJQVlA4TE8AAAAvAkAAEC9AEEBiEVi0a4ywxiSKGUmCFMafYVhG49rfEhBmG2UKU7nv+RscxFmQBZho7JxEKrkkHEcct3Ljni8c0SkUpG3A4u4ZWkT/Y70AAA==',
    ],
    [
      'no alpha',
      [
        [255, 255, 255],
        [255, 255, 255],
      ],
      'iVBORw0KGgoAAAANSUhEUgAAAAMAAAACCAIAAAASFvFNAAAAHElEQVR4nGPwO+PAJSKXXsXL0LXmQk0KD5eIHAA8wgWzbYUxfQAAAABJRU5ErkJggg==',
    ],
    [
      '16 bits',
      [
        [237, 33, 159],
        [130, 70, 201],
      ],
      'iVBORw0KGgoAAAANSUhEUgAAAAMAAAACEAYAAADN5LpZAAAAPUlEQVR42gEyAM3/AHxJJd5myO2fjDkSB4rxITjBIvLF+ryfMwDeS152JU+C6nGYqbD+mkZ62xAjUVkFybxfvRgwy3gNJQAAAABJRU5ErkJggg==',
    ],
  ];
  for (const [label, want, base64] of files) {
    const { width, height, channels, data } = await decodeAlpha(Buffer.from(base64, 'base64'), label);
    t.strictSame([width, height, channels], [want[0].length, want.length, 1], label);
    t.strictSame([...data], want.flat(), label);
  }
  const raw = { width: 4, height: 2, channels: 4, background: { r: 9, g: 9, b: 9, alpha: 0 } } as const;
  const inks = await sharp({ create: raw }).removeAlpha().toColourspace('cmyk').jpeg().toBuffer();
  t.strictSame([...(await decodeAlpha(inks, 'CMYK')).data], Array(8).fill(255), 'CMYK');
  await t.rejects(decodeAlpha(Buffer.from('x'), 'a text'), { name: 'UserError', message: /^a text cannot/ });
  t.end();
});

test('pictures: what cannot be read is refused in one sentence', async (t) => {
  const sound = readFileSync(join(goldenFolder, 'png', 'input.png'));
  const rgb = { width: 64, height: 64, channels: 3, background: '#36c' } as const;
  const jpeg = await sharp({ create: rgb }).jpeg().toBuffer();
  const damaged = Buffer.from(sound);
  damaged.fill(0xaa, 200, 400);
  const files: [string, Uint8Array][] = [
    ['empty', new Uint8Array(0)],
    ['text', Buffer.from('not a picture\nat all')],
    ['truncated PNG', sound.subarray(0, sound.length >> 1)],
    ['damaged PNG', damaged],
    ['truncated JPEG', jpeg.subarray(0, jpeg.length - 40)],
    ['SVG', Buffer.from('<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>')],
    ['GIF', await sharp({ create: rgb }).gif().toBuffer()],
  ];
  const path = at('bad.png');
  for (const [label, bytes] of files) {
    writeFileSync(path, bytes);
    const error = await readPicture(path).then(
      () => undefined,
      (reason: unknown) => reason,
    );
    const message = error instanceof Error ? error.message : 'no error';
    t.ok(
      error instanceof UserError && message.includes(path) && !message.includes('\n'),
      `${label}: ${message}`,
    );
  }
  await t.rejects(readPicture(at('absent.png')), /does not exist/);
  await t.rejects(readMask(folder), /is a folder/);
  t.end();
});
