// What a run writes for other programs and people: TensorBoard's records, the log's rate, the loss curve, the vocabulary.
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { scope } from '../../engine/scope.ts';
import { zeros } from '../../engine/tensor.ts';
import { type DType, encodeNumbers } from '../../io/dtype.ts';
import { readPicture } from '../../io/image.ts';
import type { Picture } from '../../io/pixels.ts';
import { readPngText } from '../../io/png.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import { loadTokenizer } from '../../models/text/tokenizer.ts';
import { loadTensors } from '../../train/checkpoint.ts';
import { learnVocabulary, writeTokenizers } from '../../train/data/vocabulary.ts';
import { lossCurve } from '../../train/log/curve.ts';
import { readLog } from '../../train/log/log.ts';
import { rewindPreviews, writePreviews } from '../../train/log/preview_files.ts';
import { crc32c, openEventFile } from '../../train/log/tensorboard.ts';
import type { RunInput } from '../../train/run/run.ts';
import { filesOpen } from '../support/io_helpers.ts';
import { says } from '../support/mistake.ts';
import { basic, run } from '../support/small_runs.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-files-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

/** The checksum as TFRecords mask it. */
const masked = (data: Uint8Array): number => {
  const c = crc32c(data);
  return (((c >>> 15) | (c << 17)) + 0xa282ead8) >>> 0;
};

test('TensorBoard records', (t) => {
  t.equal(crc32c(Buffer.from('123456789')), 0xe3069283, "CRC-32C's check value");
  t.equal(crc32c(Buffer.alloc(32)), 0x8a9136aa, 'RFC 3720, 32 zeros');
  const events = openEventFile(join(folder, 'events'), () => 1.5e12);
  events.scalars(300, { loss: 0.5 });
  const [name] = readdirSync(join(folder, 'events'));
  t.match(name, /^events\.out\.tfevents\.1500000000\./);
  const file = readFileSync(join(folder, 'events', name));
  const messages: Buffer[] = [];
  for (let at = 0; at < file.length; ) {
    const length = Number(file.readBigUInt64LE(at));
    t.equal(file.readUInt32LE(at + 8), masked(file.subarray(at, at + 8)), 'the length is checked');
    const message = file.subarray(at + 12, at + 12 + length);
    t.equal(file.readUInt32LE(at + 12 + length), masked(message), 'the message is checked');
    messages.push(message);
    at += 16 + length;
  }
  // Written out by hand from event.proto: wall_time = 1 (double), step = 2, file_version = 3, summary = 5 { value = 1 }.
  const wall = Buffer.alloc(9);
  wall[0] = 0x09;
  wall.writeDoubleLE(1.5e9, 1);
  t.equal(
    messages[0].toString('hex'),
    `${wall.toString('hex')}1a0d${Buffer.from('brain.Event:2').toString('hex')}`,
  );
  const value = `0a04${Buffer.from('loss').toString('hex')}150000003f`;
  t.equal(messages[1].toString('hex'), `${wall.toString('hex')}10ac022a0d0a0b${value}`);
  t.end();
});

test('the loss curve', (t) => {
  const entries = Array.from({ length: 400 }, (_, i) => ({
    step: i + 1,
    epoch: 0,
    loss: i === 7 ? Number.NaN : 2 * Math.exp(-i / 50) + 0.01,
    lr: 1,
    grad_norm: 1,
    images_per_second: 1,
  }));
  const svg = lossCurve(entries, 'a < b');
  t.match(svg, /<title>a &lt; b<\/title>/, 'the title is escaped');
  t.notMatch(svg, /NaN|Infinity/, 'what is not finite is left out');
  const [, smooth] = [...svg.matchAll(/points="([^"]+)"/g)].map(([, points]) =>
    points.split(' ').map((point) => Number(point.split(',')[1])),
  );
  t.ok(smooth[0] < smooth[smooth.length - 1], 'falling losses go down the page');
  t.notMatch(svg, /validation/, 'nothing was measured');
  const measured = entries.map((entry, i) => (i % 100 ? entry : { ...entry, validation_loss: 1 - i / 500 }));
  const [validation] = [...lossCurve(measured, 'both').matchAll(/d62728" [^>]*points="([^"]+)"/g)];
  t.equal(validation[1].split(' ').length, 4, 'a line through what was measured');
  const [early, late] = [entries[0], { ...entries[1], step: 500, loss: Number.NaN, validation_loss: 1 }];
  t.match(
    lossCurve([early, late], 'late'),
    /points="784\.0,/,
    'measured after the last finite loss, at the right edge',
  );
  t.match(lossCurve([], 'nothing yet'), /<svg/, 'no entries, no error');
  t.end();
});

test('the pictures a second that are told are those of training alone', async (t) => {
  const input: RunInput = {
    ...{ ...basic('rate'), log_every: 5, checkpoints: { every_steps: 100 } },
    previews: { prompts: ['a'], num_inference_steps: 1, every_steps: 4 },
  };
  // Five updates of 16 pictures, with four rests of 50 ms between: a last update alone takes some 10 ms.
  const meanwhile = (label: string) => {
    if (label === 'training') Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 50);
  };
  await run(input, { meanwhile });
  const [{ images_per_second: rate }] = readLog(join(input.output as string, 'log.jsonl'));
  t.ok(rate <= 16 / 0.2, `${rate}`);
});

test('the axes of the loss curve, by hand', (t) => {
  const drawn = (...losses: number[]) => {
    const entries = losses.map((loss, i) => ({
      ...{ step: i + 1, epoch: 0, loss, lr: 1, grad_norm: 1, images_per_second: 1 },
    }));
    const svg = lossCurve(entries, 'losses');
    const labels = (anchor: string) =>
      [...svg.matchAll(new RegExp(`anchor="${anchor}">([-\\d.]+)<`, 'g'))].map(([, label]) => label);
    const lines = [...svg.matchAll(/points="([^"]+)"/g)].map(([, points]) =>
      points.split(' ').map((point) => point.split(',').map(Number)),
    );
    return { lines, rows: labels('end'), columns: labels('middle') };
  };
  // Within 64 and 784, 32 and 360; a twentieth more than the values span.
  const falls = drawn(100, 10, 1);
  const inside = (share: number) => Math.round(10 * (360 - 328 * share)) / 10;
  const margin = Math.log10(1.05) / Math.log10(100 * 1.05 ** 2);
  t.same(
    falls.lines[1],
    [
      [304, inside(1 - margin)],
      [544, 196],
      [784, inside(margin)],
    ],
    'a logarithmic axis',
  );
  // 10.5 / 0.95 is above ten, 9.45 / 0.95 is not.
  t.same(drawn(10, 5, 1).rows.slice(0, 3), ['1', '3.16', '10'], 'from ten times on');
  t.same(drawn(9, 5, 1).rows.slice(0, 4), ['2', '4', '6', '8'], 'a linear axis');
  t.same(drawn(10, 0, 1).lines[1].length, 2, 'a loss of 0 has no place on it');
  t.same(falls.lines[0], falls.lines[1], 'of so few updates no mean is taken');
  t.same(
    [falls.rows, falls.columns],
    [
      ['1', '3.16', '10', '31.6', '100'],
      ['0', '1', '2', '3'],
    ],
  );
  const flat = drawn(...Array<number>(100).fill(1).fill(1.3, 0, 1));
  const at = (value: number) => inside((value - 1 / 1.05) / (1.3 * 1.05 - 1 / 1.05));
  // A fiftieth of 100 updates is two, so the weight halves from update to update.
  const mean = (0.5 * 1 + 0.25 * 1.3) / 0.75;
  t.same(
    flat.lines.map((line) => line.slice(0, 2).map(([, y]) => y)),
    [[1.3, 1].map(at), [1.3, mean].map(at)],
    'a linear one, and a mean that forgets',
  );
  t.same(
    [flat.rows, flat.columns],
    [
      ['1', '1.1', '1.2', '1.3'],
      ['0', '20', '40', '60', '80', '100'],
    ],
  );
  const { lines } = drawn(...Array<number>(4001).fill(1));
  t.same(
    [lines[0].length, lines[0][1][0], lines[0].at(-1)?.[0]],
    [1334, 64.7, 783.8],
    'one in three of many',
  );
  t.end();
});

test('a sheet of previews, and what a resumed run draws again', async (t) => {
  const output = join(folder, 'previews-of');
  const plain = (width: number, height: number, value: number): Picture => ({
    ...{ width, height, channels: 3 },
    data: new Uint8Array(3 * width * height).fill(value),
  });
  rewindPreviews(output, 0); // there are none yet
  for (const [step, value] of [
    [9, 50],
    [10, 100],
    [11, 150],
  ] as const)
    await writePreviews(output, step, [plain(400, 200, value), plain(60, 90, value)], ['one', 'two']);
  const told = await writePreviews(output, 12, [plain(400, 200, 200)], ['one']);
  const size = async () => {
    const { width, height } = await readPicture(join(output, 'previews.png'));
    return [width, height];
  };
  // Two digits of 12 pixels; the wide one is made 192 x 96 and the small one stays; 4 pixels between them.
  const left = 4 + 2 * 12 + 4;
  t.same(await size(), [left + 192 + 4 + 60 + 4, 4 + 4 * (96 + 4)]);
  t.same([told.width, told.height], await size());
  t.same(readPngText(join(output, 'previews', 'step-00000010', '1.png')), { parameters: 'two\nstep 10' });
  rewindPreviews(output, 10);
  t.same(readdirSync(join(output, 'previews')), ['step-00000009', 'step-00000010']);
  await writePreviews(output, 11, [plain(60, 90, 7)], ['one']);
  const { width, data } = await readPicture(join(output, 'previews.png'));
  const at = (x: number, y: number) => data[3 * (y * width + x)];
  const rows = [0, 1, 2].map((row) => 4 + row * 100);
  t.same(
    rows.map((y) => at(left, y)),
    [50, 100, 7],
    'a row for each, the oldest first',
  );
  t.same(
    [at(left - 1, 4), at(left + 192, 4), at(left + 196, 4), at(left + 196, 4 + 90)],
    [255, 255, 50, 255],
    'on white',
  );
  const label = (row: number) =>
    Array.from({ length: 90 * 24 }, (_, i) => at(4 + (i % 24), rows[row] + Math.floor(i / 24)));
  t.same(
    [0, 1, 2].map((row) => label(row).includes(0)),
    [true, true, true],
    'each with its step in black',
  );
});

test("a checkpoint's tensors are taken where they fit", (t) => {
  const device = openDevice('reference');
  const path = join(folder, 'optimizer.safetensors');
  const bytes = encodeNumbers([1, 2, 3, 4], 'float32');
  writeSafetensors(path, [{ name: 'exp_avg.w', dtype: 'float32', shape: [2, 2], bytes }]);
  const load = (name: string, shape: number[], dtype: DType = 'float32') =>
    scope(() => {
      const into = zeros(shape, { device, dtype });
      loadTensors(path, new Map([[name, into]]));
      return [...into.floats()];
    });
  t.same(load('exp_avg.w', [2, 2]), [1, 2, 3, 4]);
  const before = filesOpen();
  t.throws(
    () => load('exp_avg.w', [4]),
    says(/exp_avg\.w is float32 \[2,2\], not float32 \[4\]; resume with/),
  );
  t.throws(() => load('exp_avg.w', [2, 2], 'int32'), says(/is float32 \[2,2\], not int32 \[2,2\]/));
  t.throws(() => load('exp_avg.v', [2, 2]), says(/exp_avg\.v is missing, not float32 \[2,2\]/));
  t.same([device.memory.storages, filesOpen()], [0, before]);
  t.end();
});

test('a vocabulary from captions', (t) => {
  const captions = Array.from({ length: 50 }, (_, i) => `red heart number ${i}, Red Apple`);
  const vocabulary = learnVocabulary(captions, 560);
  t.same(vocabulary, learnVocabulary(captions, 560), 'the same each time');
  t.ok(Object.keys(vocabulary.vocab).length <= 560);
  writeTokenizers(folder, vocabulary, 16);
  const [first, second] = ['tokenizer', 'tokenizer_2'].map((name) => loadTokenizer(join(folder, name)));
  const { vocab } = vocabulary;
  const [begin, end] = [vocab['<|startoftext|>'], vocab['<|endoftext|>']];
  const words = [vocab['red</w>'], vocab['heart</w>']];
  t.same([...first.encode('red heart').ids], [begin, ...words, ...Array<number>(13).fill(end)]);
  t.same(
    [...second.encode('RED heart').ids],
    [begin, ...words, end, ...Array<number>(12).fill(0)],
    'padded with "!"',
  );
  t.equal(end, Math.max(...Object.values(vocab)), 'the end of text has the largest id, as CLIP looks for it');
  t.ok(
    first.encode('zebra ☃').ids.every((id) => id <= end),
    'other words are spelt in bytes',
  );
  t.end();
});
