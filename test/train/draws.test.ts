// Training's draws: Philox against the published known answers, the independence of keys, and the moments of what is drawn.
import { test } from 'tap';
import { philox } from '../../engine/philox.ts';
import { draws, streamOf } from '../../train/data/draws.ts';

test('the known answers of Random123', (t) => {
  const answer = (counter: number[], key: number[]) => {
    const out = new Uint32Array(4);
    philox(out, counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
    return [...out].map((word) => word.toString(16).padStart(8, '0')).join(' ');
  };
  const ones = 0xffffffff;
  t.equal(answer([0, 0, 0, 0], [0, 0]), '6627e8d5 e169c58d bc57ac4c 9b00dbd8');
  t.equal(answer([ones, ones, ones, ones], [ones, ones]), '408f276d 41c83b0e a20bc7c6 6d5451fd');
  t.equal(
    answer([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
    'd16cfe09 94fdcceb 5001e420 24126ea1',
  );
  t.end();
});

test('normals begin at an even word', (t) => {
  for (const [before, skipped] of [
    [1, 2],
    [2, 2],
    [3, 4],
    [4, 4],
  ] as const) {
    const [some, more] = [before, skipped].map((count) => {
      const own = draws(7, 1, 2, 'noise');
      for (let i = 0; i < count; i++) own.uniform();
      return own.normals(5);
    });
    t.same(some, more, `after ${before}`);
  }
  t.end();
});

test('a key has its stream for good: runs go on under later versions', (t) => {
  const numbered = [
    ...(['order', 'caption', 'dropout', 'tags', 'crop', 'flip', 'moments', 'noise', 'offset'] as const),
    ...(['pyramid', 'perturbation', 'timestep', 'rounding', 'weights', 'class'] as const),
  ];
  const [seed, epoch, sample] = [7 * 2 ** 32 + 5, 3, 4_000_000_000];
  for (const [k, purpose] of numbered.entries()) {
    const words = new Uint32Array(4);
    philox(words, epoch, sample, k, 0, 5, 7);
    const [seedLow, seedHigh, stream] = Int32Array.from(words);
    t.same(streamOf(seed, epoch, sample, purpose), { seedLow, seedHigh, stream }, purpose);
  }
  t.end();
});

test('keys are independent, and a key repeats', (t) => {
  const first = (...key: Parameters<typeof draws>) =>
    draws(...key)
      .normals(64)
      .join();
  const keys: Parameters<typeof draws>[] = [
    [1, 2, 3, 'noise'],
    [2, 2, 3, 'noise'],
    [1 + 2 ** 32, 2, 3, 'noise'],
    [1, 3, 3, 'noise'],
    [1, 2, 4, 'noise'],
    [1, 3, 2, 'noise'],
    [1, 2, 3, 'offset'],
  ];
  t.equal(new Set(keys.map((key) => first(...key))).size, keys.length);
  t.equal(first(...keys[0]), first(...keys[0]));
  t.end();
});

test('moments and ranges', (t) => {
  const source = draws(5, 0, 0, 'noise');
  const normals = source.normals(100_000);
  const moment = (power: number) => normals.reduce((sum, x) => sum + x ** power, 0) / normals.length;
  t.ok(Math.abs(moment(1)) < 0.015, `mean ${moment(1)}`);
  t.ok(Math.abs(moment(2) - 1) < 0.02, `variance ${moment(2)}`);
  t.ok(Math.abs(moment(4) - 3) < 0.15, `fourth moment ${moment(4)}`);
  const counts = new Uint32Array(7);
  for (let i = 0; i < 70_000; i++) counts[source.integer(7)]++;
  t.ok(
    counts.every((count) => Math.abs(count - 10_000) < 400),
    `integers ${counts}`,
  );
  for (let i = 0; i < 1000; i++) {
    const u = source.uniform();
    if (!(u >= 0 && u < 1)) t.fail(`uniform ${u}`);
  }
  t.end();
});
