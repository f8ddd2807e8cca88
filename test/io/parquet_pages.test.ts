// Damaged pages of parquet, of the second version (golden/parquet/pages-v2, which pyarrow 25 wrote): runs, blocks of differences and
// packed bytes whose counts are wrong. That a test ends is half of what it says: hyparquet alone reads some of these files for ever.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { UserError } from '../../io/errors.ts';
import { openParquet } from '../../io/parquet.ts';
import { snappyDecompress } from '../../io/snappy.ts';
import { packageRoot } from '../support/golden.ts';

const sound = join(packageRoot, 'test', 'golden', 'parquet', 'pages-v2.parquet');

test('pages of the second version', async (t) => {
  const table = await openParquet(sound);
  const rows = Array.from({ length: 12 }, (_, i) => i);
  const columns: Record<string, (i: number) => unknown> = {
    text: (i) => (i === 3 ? null : `a ${i % 3}`), // of a dictionary, with a gap
    tags: (i) => Array<string>(i % 3).fill(`t${i % 2}`), // repeated
    name: (i) => `na${i}`, // differences of lengths, and the ends of texts
    width: (i) => i * 3, // differences
    flag: (i) => i % 2 === 0, // runs
  };
  for (const [column, value] of Object.entries(columns))
    t.same(await table.readColumn(column), rows.map(value), column);
});

test('whatever byte of a page is damaged, reading ends, with a sentence where it has to', async (t) => {
  const bytes = readFileSync(sound);
  const path = join(t.testdir({}), 'damaged.parquet');
  const told = new Set<string>();
  for (let i = 4; i < bytes.length - 8 - bytes.readUInt32LE(bytes.length - 8); i++)
    for (const value of [0xff, bytes[i] ^ 0x80, bytes[i] ^ 0x04]) {
      const damaged = Buffer.from(bytes);
      damaged[i] = value;
      writeFileSync(path, damaged);
      const table = await openParquet(path);
      for (const column of table.columns)
        try {
          await table.readColumn(column);
        } catch (error) {
          if (!(error instanceof UserError)) throw error;
          told.add(error.message.slice(path.length));
        }
    }
  const run = [...told].find((message) => message.includes('a run that is longer than itself'));
  t.equal(
    run,
    ' cannot be read as parquet (row group 0, column "text": a page has a run that is longer than itself): download it again',
  );
  for (const part of ['more values than its row group', 'more gaps than values', 'blocks of no size'])
    t.ok(
      [...told].some((message) => message.includes(part)),
      part,
    );
});

test('snappy, whose elements have to fit', (t) => {
  // The format's own elements: "ab", then 6 bytes from 2 back, which it brings itself; then a copy by 2 bytes, and one by 4.
  const packed = [17, 1 << 2, 0x61, 0x62, (2 << 2) | 1, 2, (4 << 2) | 2, 8, 0, (3 << 2) | 3, 5, 0, 0, 0];
  const text = Buffer.from(snappyDecompress(Uint8Array.from(packed), 17)).toString();
  t.equal(text, 'ababababababaabab');
  const long = Buffer.alloc(70, 'x');
  t.same(snappyDecompress(Buffer.concat([Buffer.of(70, 60 << 2, 69), long]), 70), new Uint8Array(long));
  const wrong = {
    'a length that goes back': [6, 63 << 2, 0xfa, 0xff, 0xff, 0xff, 1, 2],
    'a copy of nothing': [6, 0, 1, (4 << 2) | 2, 0, 0],
    'a copy from before the begin': [6, 0, 1, (4 << 2) | 2, 9, 0],
    'too many bytes': [6, 5 << 2, 1, 2, 3, 4, 5, 6, 0, 7],
    'too few': [6, 0, 1],
    'an end within an element': [6, 63 << 2, 1],
  };
  for (const [name, bytes] of Object.entries(wrong))
    t.throws(() => snappyDecompress(Uint8Array.from(bytes), 6), name);
  t.end();
});
