// Safetensors: round trips, hostile headers, random damage, and a writer that fails whole.
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { test } from 'tap';
import { encodeNumbers } from '../../io/dtype.ts';
import { openSafetensors, type TensorEntry, writeSafetensors } from '../../io/safetensors.ts';
import { at, filesOpen, folder, messageOf, readsDamaged, refuses, sameBytes } from '../support/io_helpers.ts';

const sampleEntries: TensorEntry[] = [
  { name: 'b.weight', dtype: 'float16', shape: [2, 3], bytes: encodeNumbers([1, 2, 3, 4, 5, 6], 'float16') },
  { name: 'a.weight', dtype: 'float32', shape: [3], bytes: () => encodeNumbers([0.5, -1, 9], 'float32') },
  { name: 'ids', dtype: 'int64', shape: [], bytes: encodeNumbers([77], 'int64') },
  { name: 'empty', dtype: 'bfloat16', shape: [0, 4], bytes: new Uint8Array(0) },
  { name: 'flags', dtype: 'uint8', shape: [5], bytes: Uint8Array.of(1, 2, 3, 4, 5) },
];

test('safetensors: round trip', (t) => {
  const path = at('round.safetensors');
  const before = filesOpen();
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
  t.equal(filesOpen(), before);
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
  const before = filesOpen();
  const path = at('hostile.safetensors');
  for (const [label, bytes, pattern] of hostile) {
    writeFileSync(path, bytes);
    const message = messageOf(() => openSafetensors(path));
    t.ok(pattern.test(message) && message.includes(path) && !message.includes('\n'), `${label}: ${message}`);
  }
  refuses(t, /absent.safetensors does not exist/, () => openSafetensors(at('absent.safetensors')));
  refuses(t, /is a folder/, () => openSafetensors(folder));
  t.equal(filesOpen(), before, 'none is left open');
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
  t.equal(file.tensors.get('wide')?.dtype, 'float32');
  t.equal(file.read('wide').byteLength, 4);
  for (const name of ['small', 'future']) {
    refuses(t, new RegExp(`"${name}" of .* has type .*: convert it to one of F32`), () => file.read(name));
  }
  writeFileSync(path, craft({ a: f32([160], 0, 640) }, 640));
  writeFileSync(path, craft(JSON.stringify({ a: f32([1], 0, 4) }).padEnd(640), 4));
  t.equal(openSafetensors(path).tensors.size, 1, 'a header of 640 bytes begins like a pickle');
  writeFileSync(path, craft({ __metadata__: null, a: f32([1], 0, 4) }, 4));
  t.same(openSafetensors(path).metadata, {}, 'no metadata');
  t.end();
});

test('safetensors: random damage ends in a UserError or a readable file', (t) => {
  const path = at('fuzz.safetensors');
  writeSafetensors(path, sampleEntries, { format: 'pt' });
  readsDamaged(t, readFileSync(path), path, { seed: 7 }, openSafetensors);
  t.end();
});
