// GGUF: what is read of a sound file, numbers of every type as gguf's and torch's, hostile headers, random damage.
import { truncateSync, writeFileSync } from 'node:fs';
import { test } from 'tap';
import { type DType, decodeFloats, encodeNumbers } from '../../io/dtype.ts';
import { ggmlTypes } from '../../io/ggml_types.ts';
import { isGguf, openGguf } from '../../io/gguf.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { float8E4M3, float8E5M2, float64 } from '../../io/stored_types.ts';
import type { StoredType, TensorInfo } from '../../io/tensor_file.ts';
import { type GgufTensor, type GgufValue, ggufBytes, q8_0, text, u32, u64 } from '../support/gguf_writer.ts';
import { goldenLines } from '../support/golden.ts';
import { at, filesOpen, folder, messageOf, readsDamaged, refuses, sameBytes } from '../support/io_helpers.ts';

const floats = (count: number) => Float32Array.from({ length: count }, (_, i) => Math.sin(i) * (1 + (i % 5)));
const f32 = (name: string, shape: readonly number[], offset?: bigint): GgufTensor => {
  const bytes = encodeNumbers(floats(shape.reduce((a, b) => a * b, 1)), 'float32');
  return { name, shape, type: 0, bytes, offset };
};
const half = encodeNumbers(floats(6), 'float16');
const sample: GgufTensor[] = [
  f32('a.weight', [2, 3, 1, 5]),
  { name: 'b', shape: [2, 3], type: 1, bytes: half },
  { name: 'c', shape: [6], type: 30, bytes: half },
  { name: 'q', shape: [3, 64], type: 8, bytes: q8_0(floats(192)) },
  { name: 'laid out', shape: [1, 32], type: 8, bytes: q8_0(floats(32)) },
  { name: 'v_pred', shape: [0], type: 0, bytes: new Uint8Array() },
  { name: 'wide', shape: [3], type: 28, bytes: new Uint8Array(new Float64Array([0.1, 1e-300, -2]).buffer) },
  { name: 'odd', shape: [1, 256], type: 20, bytes: new Uint8Array(144) },
];
const metadata: Record<string, GgufValue> = {
  'general.architecture': 'sdxl',
  'general.file_type': 7,
  'tokens.of.no.use': [1, 2, 3],
  'comfy.gguf.orig_shape.laid out': [2, 4, 2, 2],
};

for (const version of [2, 3])
  test(`gguf: a sound file of version ${version}`, (t) => {
    const path = at('sound.gguf');
    const before = filesOpen();
    writeFileSync(
      path,
      ggufBytes(sample, version === 2 ? { ...metadata, 'general.alignment': 64 } : metadata, version),
    );
    t.ok(isGguf(path));
    const file = openGguf(path);
    t.match(file.metadata, { 'general.architecture': 'sdxl', 'general.file_type': '7' });
    t.notOk(
      Object.keys(file.metadata).some((key) => /tokens|orig_shape/.test(key)),
      'no lists',
    );
    t.same([...file.tensors.keys()].sort(), sample.map(({ name }) => name).sort());
    const read = (name: string) => decodeFloats(file.read(name), file.tensors.get(name)?.dtype as DType);
    t.same([...read('a.weight')], [...floats(30)]);
    t.same(file.tensors.get('a.weight')?.shape, [2, 3, 1, 5]);
    for (const name of ['b', 'c']) t.ok(sameBytes(file.read(name), half), name);
    t.match(file.tensors.get('q'), { dtype: 'float32', storedAs: 'Q8_0', shape: [3, 64], bytes: 6 * 34 });
    t.ok(
      read('q').every((value, i) => Math.abs(value - floats(192)[i]) <= 5 / 127 / 2 + 0.003),
      'half a step away and what the scale was rounded by',
    );
    t.same(file.tensors.get('laid out')?.shape, [2, 4, 2, 2], 'the shape that it had');
    t.equal(file.read('v_pred').byteLength, 0);
    t.same([...read('wide')], [Math.fround(0.1), 0, -2]);
    refuses(t, /tensor "odd" of .*sound\.gguf has type IQ4_NL: convert it to one of F32, F16, Q4_0/, () =>
      file.read('odd'),
    );
    refuses(t, /no tensor "absent"/, () => file.read('absent'));
    t.throws(() => file.readInto('q', new Uint8Array(7)), /768 bytes/);
    file.close();
    file.close();
    t.throws(() => file.read('b'), /closed/);
    t.equal(filesOpen(), before);
    t.end();
  });

interface Recorded {
  type: string;
  blocks: string;
  values: string;
}
const kinds: Record<string, StoredType> = { F8_E4M3: float8E4M3, F8_E5M2: float8E5M2 };
const typeOf = (name: string): StoredType =>
  kinds[name] ?? ([...ggmlTypes.values()].find(([each]) => each === name)?.[1] as StoredType);

test('what types stand for, as gguf and torch have it, to the bit', (t) => {
  const recorded = goldenLines<Recorded>('stored_types');
  const decoding = [...ggmlTypes.values()].filter(([, type]) => type?.decode && type !== float64);
  t.same(
    recorded.map(({ type }) => type).sort(),
    [...decoding.map(([name]) => name), ...Object.keys(kinds)].sort(),
  );
  for (const { type: name, blocks, values } of recorded) {
    const { decode, dtype, elements, bytes } = typeOf(name);
    const [from, want] = [Buffer.from(blocks, 'hex'), Buffer.from(values, 'hex')];
    const count = want.byteLength / 4;
    t.equal(from.byteLength, (count / elements) * bytes, `${name}: size of a block`);
    const got = new Uint8Array(count * (dtype === 'float32' ? 4 : 2));
    decode?.(from, got);
    const [ours, theirs] = [decodeFloats(got, dtype), decodeFloats(Uint8Array.from(want), 'float32')];
    t.equal(
      ours.findIndex((value, i) => !Object.is(value, theirs[i])),
      -1,
      name,
    );
  }
  t.end();
});

interface Made {
  file: string;
  metadata: Record<string, string>;
  tensors: { name: string; shape: number[]; values: string }[];
}

test("a file by gguf's own writer", (t) => {
  const [made] = goldenLines<Made>('gguf_file');
  const path = at('made.gguf');
  writeFileSync(path, Buffer.from(made.file, 'hex'));
  const file = openGguf(path);
  t.match(file.metadata, { ...made.metadata, 'general.architecture': 'sdxl', 'general.alignment': '64' });
  t.equal(file.tensors.size, made.tensors.length);
  for (const { name, shape, values } of made.tensors) {
    const { shape: ours, dtype } = file.tensors.get(name) as TensorInfo;
    t.same(ours, shape, name);
    const got = Float32Array.from(decodeFloats(file.read(name), dtype));
    t.equal(Buffer.from(got.buffer).toString('hex'), values, name);
  }
  file.close();
  t.end();
});

test('a tensor of many pieces, the last one not whole', (t) => {
  const values = floats(2 ** 18 + 96);
  const path = at('large.gguf');
  writeFileSync(path, ggufBytes([{ name: 'x', shape: [values.length], type: 8, bytes: q8_0(values) }]));
  const file = openGguf(path);
  const [got, whole] = [new Uint8Array(values.byteLength), new Uint8Array(values.byteLength)];
  file.readInto('x', got);
  typeOf('Q8_0').decode?.(q8_0(values), whole);
  t.ok(sameBytes(got, whole));
  truncateSync(path, 1000);
  refuses(t, /became shorter while it was read/, () => file.read('x'));
  file.close();
  t.end();
});

const start = (...parts: Buffer[]) => Buffer.concat([Buffer.from('GGUF'), u32(3), ...parts]);
const pair = (...parts: Buffer[]) => start(u64(0), u64(1), text('key'), ...parts, Buffer.alloc(64));
const one = (...parts: Buffer[]) => start(u64(1), u64(0), text('x'), ...parts, Buffer.alloc(64));
const sound = ggufBytes(sample, metadata);

const hostile: [string, Uint8Array, RegExp][] = [
  ['empty', new Uint8Array(), /too short/],
  ['another magic', Buffer.from('GGML and more'), /is not a GGUF file/],
  ['safetensors', Buffer.from('\x02\0\0\0\0\0\0\0{}'), /is not a GGUF file/],
  ['magic alone', Buffer.from('GGUF'), /ends inside its header: it is truncated/],
  ['version 1', ggufBytes(sample, {}, 1), /version 1, and 2 and 3 are read: convert/],
  ['version 4', ggufBytes(sample, {}, 4), /version 4/],
  ['big-endian', Buffer.concat([Buffer.from('GGUF'), u32(3).reverse(), Buffer.alloc(16)]), /big-endian/],
  ['tensors without end', start(u64(2n ** 63n), u64(0)), /counts 9\d+ things/],
  ['too many tensors', start(u64(100_001), u64(0), Buffer.alloc(900_000)), /100001 tensors/],
  ['metadata without end', start(u64(0), u64(2n ** 40n), Buffer.alloc(64)), /counts 1099511627776 things/],
  ['a key without end', start(u64(0), u64(1), u64(2n ** 62n), Buffer.alloc(64)), /counts/],
  [
    'a long key',
    start(u64(0), u64(1), u64(70_000), Buffer.alloc(70_000)),
    /a key of the metadata of 70000 bytes/,
  ],
  ['a value of no type', pair(u32(13)), /"key" .* type 13, which is none/],
  ['a text without end', pair(u32(8), u64(2n ** 60n)), /counts/],
  ['a list without end', pair(u32(9), u32(4), u64(2n ** 61n)), /counts/],
  ['a list of texts without end', pair(u32(9), u32(8), u64(2n ** 61n)), /counts/],
  ['a list of lists', pair(u32(9), u32(9), u64(1)), /"key" .* type 9, which is none/],
  ['a key twice', start(u64(0), u64(2), ...[1, 2].flatMap((n) => [text('k'), u32(4), u32(n)])), /"k" twice/],
  ['five dimensions', one(u32(5)), /"x" .* has 5 dimensions/],
  ['dimensions without end', one(u32(2 ** 32 - 1)), /has 4294967295 dimensions/],
  [
    'overflowing shape',
    ggufBytes([{ ...f32('x', [1]), shape: [2 ** 40, 2 ** 40] }]),
    /"x" .* impossible shape/,
  ],
  [
    'overflow times zero',
    ggufBytes([{ ...f32('x', [1]), shape: [2 ** 40, 2 ** 40, 0] }]),
    /impossible shape/,
  ],
  [
    'rows of no blocks',
    ggufBytes([{ ...f32('x', [33]), type: 8 }]),
    /"x" .* rows of 33, and Q8_0 has blocks of 32/,
  ],
  [
    'an offset past the end',
    ggufBytes([f32('x', [8], 4096n)]),
    /"x" .* past the end of the file: it is trunc/,
  ],
  ['an offset without end', ggufBytes([f32('x', [8], 2n ** 63n)]), /"x" .* past the end/],
  ['an odd type past the end', ggufBytes([{ ...f32('x', [32], 4096n), type: 20 }]), /"x" .* past the end/],
  ['an offset between', ggufBytes([f32('x', [8], 4n)]), /multiple of 32 bytes/],
  ['overlap', ggufBytes([f32('x', [32]), f32('y', [8], 32n)]), /"x" .* overlaps the tensor after it/],
  ['a tensor twice', ggufBytes([f32('x', [8]), f32('x', [8])]), /the tensor "x" twice/],
  [
    'an alignment of 0',
    start(u64(0), u64(1), text('general.alignment'), u32(4), u32(0)),
    /aligned to 0 bytes/,
  ],
  ['an alignment of 24', ggufBytes([], { 'general.alignment': 24 }), /aligned to 24 bytes/],
  [
    'a shape of others',
    ggufBytes(sample, { 'comfy.gguf.orig_shape.q': [3, 65] }),
    /"q" .* shape \[3,65\] of others/,
  ],
  ['negative sizes', ggufBytes(sample, { 'comfy.gguf.orig_shape.q': [-3, -64] }), /is not a shape/],
  ['a cut within the header', sound.subarray(0, 300), /ends inside its header/],
  [
    'a cut within the data',
    sound.subarray(0, sound.length - 200),
    /past the end of the file: it is truncated/,
  ],
];

test('gguf: hostile headers are refused in one sentence', (t) => {
  const before = filesOpen();
  const path = at('hostile.gguf');
  for (const [label, bytes, pattern] of hostile) {
    writeFileSync(path, bytes);
    const message = messageOf(() => openGguf(path));
    t.ok(pattern.test(message) && message.includes(path) && !message.includes('\n'), `${label}: ${message}`);
  }
  refuses(t, /absent\.gguf does not exist/, () => openGguf(at('absent.gguf')));
  refuses(t, /is a folder: give the path of a \.gguf file/, () => openGguf(folder));
  t.notOk(isGguf(at('absent.gguf')));
  t.notOk(isGguf(folder));
  writeFileSync(path, sound);
  refuses(t, /is a GGUF file/, () => openSafetensors(path));
  t.equal(filesOpen(), before, 'none is left open');
  t.end();
});

test('gguf: random damage ends in a UserError or a readable file', (t) => {
  readsDamaged(t, sound, at('fuzz.gguf'), { seed: 11, within: 600 }, openGguf);
  t.end();
});
