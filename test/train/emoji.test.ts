// The emoji dataset: who is in it, what is said of them, and that the folder drawn is a dataset.
import { readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { colourName, coloursOf } from '../../configs/emoji_colours.ts';
import { allEmoji, drawEmoji, isFlagOrFruit } from '../../configs/emoji_data.ts';
import { survey } from '../../train/data/survey.ts';
import { openDataset } from '../support/datasets.ts';

test('colours have their names', (t) => {
  const known: Record<string, string[]> = {
    red: ['f8312f', 'ca0b4a', 'ff0000', '8b0000'],
    orange: ['ff822d', 'ff6723'],
    yellow: ['fcd53f', 'ffb02e', 'ffff00', 'f9c23c'],
    green: ['00d26a', '44911b', '008463', '86d72f', '008000'],
    blue: ['00a6ed', '0074ba', '0000ff', '26eafc'],
    purple: ['8d65c5', '800080', 'cd3bff', '635994'],
    pink: ['ff8687', 'f70a8d', 'ffc0cb'],
    brown: ['6d4534', '8b4513', 'a56953', '7d4533'],
    gray: ['9b9b9b', 'd3d3d3', 'b4acbc'],
    black: ['000000', '1c1c1c', '321b41'],
    white: ['ffffff', 'f4f4f4'],
  };
  for (const [want, codes] of Object.entries(known)) {
    for (const code of codes) {
      const [r, g, b] = [0, 2, 4].map((at) => Number.parseInt(code.slice(at, at + 2), 16));
      t.equal(colourName(r, g, b), want, code);
    }
  }
  const rgba = [
    ...Array(8).fill([255, 0, 0, 255]),
    ...Array(5).fill([0, 0, 255, 200]),
    ...Array(20).fill([0, 255, 0, 9]),
  ];
  t.strictSame(
    coloursOf(Uint8Array.from(rgba.flat())),
    ['red', 'blue'],
    'what is transparent does not count',
  );
  t.end();
});

test('the emoji', (t) => {
  const all = allEmoji();
  const named = new Map(all.map((emoji) => [emoji.name, emoji]));
  t.equal(all.length, 1593);
  t.equal(named.size, all.length, 'no name twice');
  t.notOk(named.has('person dark') || named.has('waving hand medium light'), 'no skin tones');
  t.ok(named.has('vertical traffic light') && named.has('person'), 'but no other light or dark');
  t.strictSame(named.get('red heart')?.keywords, ['love', 'like', 'valentines', 'heavy']);
  t.equal(named.get('frog')?.kind, 'nature');
  t.ok(all.every(({ svg }) => svg.startsWith('<')));
  t.ok(all.every(({ kind }) => kind !== 'thing'));
  t.end();
});

test('drawn, they are a dataset', async (t) => {
  const folder = await drawEmoji(join(t.testdir({}), 'emoji'));
  const dataset = await openDataset({ path: folder });
  t.equal(dataset.examples.length, 1593);
  t.strictSame(dataset.problems, []);
  const { samples } = await survey(
    { ...dataset, examples: dataset.examples.slice(0, 50) },
    { broken: 'fatal' },
  );
  t.ok(samples.every(({ size }) => size.join() === '64,64'));
  const heart = dataset.examples.find(({ id }) => id === 'red-heart.png');
  t.strictSame(heart?.captions, [
    'red heart',
    'red heart, red',
    'red heart, emotion, love, like, valentines, heavy',
    'red heart, emotion, red, love, like, valentines, heavy',
  ]);
  const judged = readFileSync(join(folder, 'judged.jsonl'), 'utf8')
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line));
  const captions = new Set(dataset.examples.flatMap((example) => example.captions));
  t.equal(judged.length, 200);
  t.equal(new Set(judged.map(({ seed }) => seed)).size, 200);
  t.notOk(
    judged.some(({ prompt }) => captions.has(prompt)),
    'no judged prompt is a caption',
  );
  const before = statSync(join(folder, 'metadata.jsonl')).mtimeMs;
  await drawEmoji(folder);
  t.equal(statSync(join(folder, 'metadata.jsonl')).mtimeMs, before, 'drawn once');
});

test('flags and fruit can be drawn ten times, under names of their own', async (t) => {
  const all = allEmoji();
  const often = all.filter(isFlagOrFruit).map(({ name }) => name);
  t.equal(often.length, 32);
  for (const name of ['rainbow flag', 'chequered flag', 'red apple', 'tangerine'])
    t.ok(often.includes(name), name);
  t.notOk(often.includes('flag in hole'), 'golf');
  const folder = await drawEmoji(join(t.testdir({}), 'flags'), { flagsAndFruit: 10, side: 8 });
  const { examples, problems } = await openDataset({ path: folder });
  t.equal(examples.length, 1593 + 9 * 32);
  t.strictSame(problems, []);
  const [one, ten] = ['red-apple.png', 'red-apple-10.png'].map((name) =>
    examples.find(({ id }) => id === name),
  );
  t.strictSame(one?.captions, ten?.captions);
  t.same(await one?.read(), await ten?.read());
});
