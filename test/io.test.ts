// The io folder: types, safetensors, atomic files, and pictures against Pillow and diffusers (golden area
// `image`).
import {
  chmodSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { decode } from 'fast-png';
import sharp from 'sharp';
import { test } from 'tap';
import {
  decodeFloats,
  encodeNumbers,
  fromBfloat16,
  fromFloat16,
  toBfloat16,
  toFloat16,
} from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { assertWritable, readJson, replaceAtomically, writeFileAtomic } from '../io/files.ts';
import {
  postprocess,
  preprocess,
  preprocessMask,
  readMask,
  readPicture,
  toGrey,
  toPictures,
  writePng,
} from '../io/image.ts';
import type { Picture } from '../io/pixels.ts';
import { encodePng } from '../io/png.ts';
import { type ResizeFilter, resize } from '../io/resize.ts';
import { openSafetensors, type TensorEntry, writeSafetensors } from '../io/safetensors.ts';
import { allClose, goldenArea, goldenFolder, maxDifference } from './golden.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-io-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string) => join(folder, name);

const sameBytes = (a: Uint8Array, b: Uint8Array) => Buffer.compare(a, b) === 0;

function messageOf(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    return error instanceof UserError ? error.message : `not a UserError: ${error}`;
  }
  return 'no error';
}

/** Passes when `action` throws a UserError of one line that matches. */
function refuses(
  t: { ok(value: unknown, message: string): unknown },
  pattern: RegExp,
  action: () => unknown,
): void {
  const message = messageOf(action);
  t.ok(pattern.test(message) && !message.includes('\n'), `${pattern}: ${message}`);
}

const exact = { atol: 0, rtol: 0 };

/** A small generator so that failures repeat (mulberry32). */
function randomNumbers(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

test('half types: every bit pattern survives', (t) => {
  let wrong = 0;
  for (let bits = 0; bits < 65536; bits++) {
    const half = fromFloat16(bits);
    const brain = fromBfloat16(bits);
    if (Number.isNaN(half) ? !Number.isNaN(fromFloat16(toFloat16(half))) : toFloat16(half) !== bits) wrong++;
    if (Number.isNaN(brain) ? !Number.isNaN(fromBfloat16(toBfloat16(brain))) : toBfloat16(brain) !== bits)
      wrong++;
  }
  t.equal(wrong, 0, 'float16 and bfloat16 round trips');
  const every = new Uint8Array(Uint16Array.from({ length: 65536 }, (_, bits) => bits).buffer);
  const halves = decodeFloats(every, 'float16');
  const brains = decodeFloats(every, 'bfloat16');
  wrong = 0;
  for (let bits = 0; bits < 65536; bits++) {
    if (!Object.is(halves[bits], fromFloat16(bits)) || !Object.is(brains[bits], fromBfloat16(bits))) wrong++;
  }
  t.equal(wrong, 0, 'decodeFloats agrees with the scalar conversions');
  t.end();
});

/** Rounds to `significant` bits with exponents from `lowest` up by float64 arithmetic, halves to even. */
function roundedTo(value: number, significant: number, lowest: number, largest: number): number {
  if (value === 0 || !Number.isFinite(value)) return value;
  const magnitude = Math.abs(value);
  let exponent = Math.floor(Math.log2(magnitude));
  while (2 ** exponent > magnitude) exponent--;
  while (2 ** (exponent + 1) <= magnitude) exponent++;
  const unit = 2 ** (Math.max(exponent, lowest) - significant + 1);
  const scaled = magnitude / unit;
  const floor = Math.floor(scaled);
  const rest = scaled - floor;
  const rounded = (rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor) * unit;
  return Math.sign(value) * (rounded > largest ? Number.POSITIVE_INFINITY : rounded);
}

test('half types: rounding is to nearest even', (t) => {
  const random = randomNumbers(1);
  const values: number[] = [
    0,
    -0,
    65504,
    65519.996,
    65520,
    2 ** -24,
    2 ** -25,
    1.5 * 2 ** -25,
    3.4e38,
    3.3961e38,
    1e-45,
  ];
  for (let bits = 0; bits < 0x7bff; bits += 3) values.push((fromFloat16(bits) + fromFloat16(bits + 1)) / 2);
  for (let i = 0; i < 50_000; i++) values.push(Math.fround((random() - 0.5) * 2 ** (random() * 60 - 35)));
  const largestBrain = fromBfloat16(0x7f7f);
  let wrong = 0;
  for (const value of values.map(Math.fround)) {
    if (fromFloat16(toFloat16(value)) !== roundedTo(value, 11, -14, 65504)) wrong++;
    if (fromBfloat16(toBfloat16(value)) !== roundedTo(value, 8, -126, largestBrain)) wrong++;
  }
  t.equal(wrong, 0, `${values.length} values and exact halves`);
  for (const dtype of ['float32', 'bfloat16', 'float16', 'int32', 'int64', 'uint8'] as const) {
    const numbers = [0, 1, 2, 100, 7];
    allClose(
      t,
      `${dtype} encode, decode`,
      decodeFloats(encodeNumbers(numbers, dtype), dtype),
      numbers,
      exact,
    );
  }
  t.ok(
    Number.isNaN(fromFloat16(toFloat16(Number.NaN))) && Number.isNaN(fromBfloat16(toBfloat16(Number.NaN))),
    'NaN',
  );
  t.end();
});

const sampleEntries: TensorEntry[] = [
  { name: 'b.weight', dtype: 'float16', shape: [2, 3], bytes: encodeNumbers([1, 2, 3, 4, 5, 6], 'float16') },
  { name: 'a.weight', dtype: 'float32', shape: [3], bytes: () => encodeNumbers([0.5, -1, 9], 'float32') },
  { name: 'ids', dtype: 'int64', shape: [], bytes: encodeNumbers([77], 'int64') },
  { name: 'empty', dtype: 'bfloat16', shape: [0, 4], bytes: new Uint8Array(0) },
  { name: 'flags', dtype: 'uint8', shape: [5], bytes: Uint8Array.of(1, 2, 3, 4, 5) },
];

test('safetensors: round trip', (t) => {
  const path = at('round.safetensors');
  writeSafetensors(path, sampleEntries, { format: 'pt', note: 'naïve 文字' });
  const file = openSafetensors(path);
  t.strictSame(file.metadata, { format: 'pt', note: 'naïve 文字' });
  t.strictSame(
    [...file.tensors.keys()],
    ['ids', 'a.weight', 'empty', 'b.weight', 'flags'],
    'widest type first, then by name',
  );
  for (const { name, dtype, shape, bytes } of sampleEntries) {
    const info = file.tensors.get(name);
    t.strictSame([info?.dtype, info?.shape], [dtype, shape], `${name}: type and shape`);
    t.ok(sameBytes(file.read(name), typeof bytes === 'function' ? bytes() : bytes), `${name}: bytes`);
  }
  refuses(t, /no tensor "c"/, () => file.read('c'));
  t.throws(() => file.readInto('ids', new Uint8Array(7)), /8 bytes/);
  const raw = readFileSync(path);
  t.equal(raw.readBigUInt64LE(0) % 8n, 0n, 'the data is aligned');
  file.close();
  file.close();
  t.throws(() => file.read('ids'), /closed/);
  t.end();
});

test('safetensors: the writer fails whole', (t) => {
  const path = at('kept.safetensors');
  writeFileSync(path, 'before');
  const failing: TensorEntry = {
    name: 'x',
    dtype: 'float32',
    shape: [1],
    bytes: () => {
      throw new Error('no such luck');
    },
  };
  t.throws(() => writeSafetensors(path, [...sampleEntries, failing]), /no such luck/);
  t.throws(() => writeSafetensors(path, [{ ...failing, bytes: new Uint8Array(3) }]), /has 3 bytes/);
  t.throws(() => writeSafetensors(path, [failing, failing]), /bad tensor names/);
  t.equal(readFileSync(path, 'utf8'), 'before');
  t.notOk(
    readdirSync(folder).some((name) => name.endsWith('.tmp')),
    'nothing left behind',
  );
  t.end();
});

/** A file with this header, whose length field and data can be made to lie. */
function craft(header: unknown, dataBytes = 0, length?: bigint): Uint8Array {
  const json = Buffer.from(typeof header === 'string' ? header : JSON.stringify(header));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(length ?? BigInt(json.byteLength));
  return Buffer.concat([prefix, json, Buffer.alloc(dataBytes)]);
}

const f32 = (shape: unknown, begin: unknown, end: unknown, dtype: unknown = 'F32') => ({
  dtype,
  shape,
  data_offsets: [begin, end],
});

const emptyTensor = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}';
const manyTensors = `{${Array.from({ length: 100_001 }, (_, i) => `"${i}":${emptyTensor}`)}}`;

const hostile: [string, Uint8Array, RegExp][] = [
  ['empty', new Uint8Array(0), /too short/],
  ['seven bytes', new Uint8Array(7), /too short/],
  ['huge header', craft('{}', 0, 2n ** 63n), /claims a header of 9223372036854775808/],
  ['header just over the limit', craft('{}', 0, 100_000_001n), /claims a header/],
  ['header past the end', craft('{}', 0, 3n), /truncated, download it again/],
  ['header of no bytes', craft(''), /not valid JSON/],
  ['broken JSON', craft('{"a":'), /not valid JSON/],
  ['invalid UTF-8', Buffer.concat([craft('{"', 0, 5n), Uint8Array.of(0xff, 0x22, 0x7d)]), /not valid JSON/],
  ['byte order mark', craft('\ufeff{}'), /not valid JSON/],
  ['array', craft([]), /not a JSON object/],
  ['null', craft('null'), /not a JSON object/],
  ['nested a million deep', craft('['.repeat(1e6)), /not valid JSON/],
  [
    'duplicate tensor',
    craft('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"\\u0061":1}'),
    /names "a" twice/,
  ],
  [
    'duplicate field',
    craft('{"a":{"dtype":"U8","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    /names "dtype" twice/,
  ],
  ['metadata number', craft({ __metadata__: { a: 1 } }), /map of strings/],
  ['metadata array', craft({ __metadata__: ['a'] }), /map of strings/],
  ['tensor not an object', craft({ a: 3 }), /tensor "a" .* JSON object/],
  ['no dtype', craft({ a: { shape: [0], data_offsets: [0, 0] } }), /no "dtype"/],
  ['no shape', craft({ a: { dtype: 'U8', data_offsets: [0, 0] } }), /"shape"/],
  ['negative shape', craft({ a: f32([-1, -1], 0, 4) }, 4), /"shape"/],
  ['fractional shape', craft({ a: f32([0.5, 2], 0, 4) }, 4), /"shape"/],
  ['text shape', craft({ a: f32('1', 0, 4) }, 4), /"shape"/],
  ['three offsets', craft({ a: { ...f32([1], 0, 4), data_offsets: [0, 4, 4] } }, 4), /data_offsets/],
  ['negative offset', craft({ a: f32([1], -4, 0) }, 4), /data_offsets/],
  ['infinite offset', craft('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1e999]}}'), /data_offsets/],
  ['backward offsets', craft({ a: f32([1], 4, 0) }, 4), /impossible offsets/],
  ['overflowing shape', craft({ a: f32([2 ** 40, 2 ** 40], 0, 4) }, 4), /impossible shape/],
  ['overflow times zero', craft({ a: f32([2 ** 40, 2 ** 40, 0], 0, 0) }), /impossible shape/],
  ['shape against bytes', craft({ a: f32([2], 0, 4) }, 4), /has 4 bytes, but its shape \[2\] of F32 needs 8/],
  ['overlap', craft({ a: f32([2], 0, 8), b: f32([1], 4, 8) }, 8), /"b" .* overlaps/],
  ['hole', craft({ a: f32([1], 0, 4), b: f32([1], 8, 12) }, 12), /"b" .* hole/],
  ['late start', craft({ a: f32([1], 4, 8) }, 8), /"a" .* hole/],
  [
    'truncated data',
    craft({ a: f32([4], 0, 16) }, 15),
    /ends inside tensor "a": it is truncated, download it again/,
  ],
  ['trailing bytes', craft({ a: f32([1], 0, 4) }, 5), /1 bytes after its last tensor/],
  ['too many tensors', craft(manyTensors), /100001 tensors/],
  ['zip checkpoint', Buffer.from('PK\x03\x04 archive/data.pkl and more'), /pickle.*any program/],
  ['bare pickle', Uint8Array.of(0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20), /pickle/],
  ['LFS pointer', Buffer.from('version https://git-lfs.github.com/spec/v1\noid'), /git lfs pull/],
];

test('safetensors: hostile headers are refused in one sentence', (t) => {
  const path = at('hostile.safetensors');
  for (const [label, bytes, pattern] of hostile) {
    writeFileSync(path, bytes);
    const message = messageOf(() => openSafetensors(path));
    t.ok(pattern.test(message) && message.includes(path) && !message.includes('\n'), `${label}: ${message}`);
  }
  refuses(t, /absent.safetensors does not exist/, () => openSafetensors(at('absent.safetensors')));
  refuses(t, /is a folder/, () => openSafetensors(folder));
  t.end();
});

test('safetensors: odd but lawful headers', (t) => {
  const path = at('odd.safetensors');
  const header = {
    __proto__x: f32([2], 0, 2, 'BOOL'),
    wide: f32([1], 2, 10, 'F64'),
    small: f32([2], 10, 11, 'F4'),
    future: f32([7], 11, 14, 'Q3'),
    '7': f32([1], 14, 16, 'BF16'),
  };
  writeFileSync(path, craft(`${JSON.stringify(header).replace('__proto__x', '__proto__')}   `, 16));
  const file = openSafetensors(path);
  t.equal(file.tensors.get('__proto__')?.dtype, 'uint8');
  t.equal(file.read('__proto__').byteLength, 2);
  t.equal(file.read('7').byteLength, 2);
  for (const name of ['wide', 'small', 'future']) {
    refuses(t, new RegExp(`"${name}" of .* has type .*: convert it to one of F32`), () => file.read(name));
  }
  writeFileSync(path, craft({ a: f32([160], 0, 640) }, 640));
  writeFileSync(path, craft(JSON.stringify({ a: f32([1], 0, 4) }).padEnd(640), 4));
  t.equal(openSafetensors(path).tensors.size, 1, 'a header of 640 bytes begins like a pickle');
  t.end();
});

test('safetensors: random damage ends in a UserError or a readable file', (t) => {
  const path = at('fuzz.safetensors');
  writeSafetensors(path, sampleEntries, { format: 'pt' });
  const sound = readFileSync(path);
  const random = randomNumbers(7);
  const crashes: string[] = [];
  let refused = 0;
  for (let round = 0; round < 2000; round++) {
    const cut = random() < 0.1 ? Math.floor(random() * sound.length) : sound.length;
    const bytes = Uint8Array.prototype.slice.call(sound, 0, cut);
    const changes = 1 + Math.floor(random() * 4);
    for (let i = 0; i < changes; i++) bytes[Math.floor(random() * bytes.length)] = Math.floor(random() * 256);
    writeFileSync(path, bytes);
    try {
      const file = openSafetensors(path);
      try {
        for (const name of file.tensors.keys()) file.read(name);
      } finally {
        file.close();
      }
    } catch (error) {
      if (error instanceof UserError) refused++;
      else crashes.push(String(error));
    }
  }
  t.strictSame(crashes.slice(0, 3), [], `${refused} of 2000 refused`);
  t.ok(refused > 500 && refused < 2000, `${refused} refused`);
  t.end();
});

test('files: written whole or not at all', (t) => {
  const path = at('whole.txt');
  writeFileAtomic(path, 'first');
  writeFileAtomic(path, Buffer.from('second'));
  t.equal(readFileSync(path, 'utf8'), 'second');
  t.throws(
    () =>
      replaceAtomically(path, (temporary) => {
        writeFileSync(temporary, 'half');
        throw new Error('interrupted');
      }),
    /interrupted/,
  );
  const full = Object.assign(new Error('write'), { code: 'ENOSPC' });
  const outOfSpace = () => {
    throw full;
  };
  refuses(t, /disk is full while writing .*whole.txt: free some space/, () =>
    replaceAtomically(path, outOfSpace),
  );
  t.equal(readFileSync(path, 'utf8'), 'second', 'the old file stays');
  refuses(t, /none\/x.txt does not exist, or its folder/, () => writeFileAtomic(at('none/x.txt'), ''));
  refuses(t, /is a folder/, () => writeFileAtomic(folder, ''));
  refuses(t, /not a folder/, () => writeFileAtomic(join(path, 'x'), ''));
  refuses(t, /not a regular file/, () => writeFileAtomic('/dev/null', ''));
  refuses(t, /too long/, () => writeFileAtomic(at('n'.repeat(256)), ''));
  writeFileAtomic(at('n'.repeat(255)), '');
  t.ok(existsSync(at('n'.repeat(255))), 'the longest name works');
  t.notOk(
    readdirSync(folder).some((name) => name.endsWith('.tmp')),
    'nothing left behind',
  );
  t.end();
});

test('files: assertWritable and readJson', (t) => {
  assertWritable(at('fresh.txt'));
  t.notOk(existsSync(at('fresh.txt')), 'the check writes nothing');
  refuses(t, /create the folder/, () => assertWritable(at('none/x.txt')));
  refuses(t, /is a folder/, () => assertWritable(folder));
  symlinkSync('loop', at('loop'));
  refuses(t, /leads back to itself/, () => assertWritable(at('loop')));
  if (process.getuid?.() !== 0) {
    chmodSync(folder, 0o500);
    refuses(t, /no permission/, () => assertWritable(at('x')));
    chmodSync(folder, 0o700);
  }
  writeFileSync(at('good.json'), '{"a": [1]}');
  t.strictSame(readJson(at('good.json')), { a: [1] });
  writeFileSync(at('bad.json'), '{"a": \n[1}');
  const message = messageOf(() => readJson(at('bad.json')));
  t.ok(/bad.json is not valid JSON/.test(message) && !message.includes('\n'), message);
  refuses(t, /does not exist/, () => readJson(at('absent.json')));
  refuses(t, /is a folder/, () => readJson(folder));
  t.end();
});

const golden = goldenArea('image');

function goldenPicture(tensor: string): Picture {
  const [height, width] = golden.shape(tensor);
  return { width, height, channels: 3, data: golden.bytes(tensor) };
}

test('resize: Pillow, to the bit', (t) => {
  for (const { id, inputs, expect } of golden.cases.filter((found) => found.id.startsWith('resize_'))) {
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
  allClose(t, 'postprocess: floats', postprocess(z, shape), golden.floats(expect.float_nhwc.tensor), exact);
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
  writeFileSync(path, await sharp(rgb, { raw }).png().withMetadata({ orientation: 6 }).toBuffer());
  const turned = await readPicture(path);
  t.strictSame([turned.width, turned.height], [4, 6], 'EXIF orientation');
  t.strictSame([...turned.data.subarray(0, 3)], [...rgb.subarray(54, 57)], 'a quarter turn clockwise');
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
