// Pictures read by other threads: the same pixels and errors as in this one, however many are asked for, and a program that
// ends when it is done.
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { UserError } from '../io/errors.ts';
import { geometryOf, readPixels } from '../train/data/picture.ts';
import { mostThreads, readPixelsAside } from '../train/data/pixel_threads.ts';
import { goldenFolder, packageRoot } from './golden.ts';

const file = readFileSync(join(goldenFolder, 'png', 'input.png'));
const options = { center_crop: false, random_flip: true };
const questions = Array.from({ length: 3 * mostThreads + 2 }, (_, key) => ({
  ...{ file, name: `picture ${key}`, interpolation: 'lanczos' as const },
  geometry: geometryOf([128, 128], [64, 40 + 8 * (key % 3)], options, { seed: 1, key, variant: 0 }),
}));

test('many at once', async (t) => {
  const got = await Promise.all(questions.map(readPixelsAside));
  for (const [i, { name, geometry, interpolation }] of questions.entries())
    t.same(got[i], await readPixels(file, name, geometry, interpolation), name);
});

test('a broken picture among others', async (t) => {
  const broken = { ...questions[0], file: file.subarray(0, 100), name: 'the broken one' };
  const results = await Promise.allSettled([questions[0], broken, questions[1]].map(readPixelsAside));
  t.same(
    results.map(({ status }) => status),
    ['fulfilled', 'rejected', 'fulfilled'],
  );
  const { reason } = results[1] as PromiseRejectedResult;
  t.ok(reason instanceof UserError);
  t.match(reason.message, /the broken one/);
});

test('threads without work do not keep a program', (t) => {
  const module = join(packageRoot, 'dist', 'train', 'data', 'pixel_threads.js');
  const program = `
    const { readPixelsAside } = require(${JSON.stringify(module)});
    const question = ${JSON.stringify({ ...questions[0], file: undefined })};
    const file = Buffer.from(${JSON.stringify(file.toString('base64'))}, 'base64');
    readPixelsAside({ ...question, file }).then((pixels) => console.log(pixels.length));`;
  const { status, stdout } = spawnSync(process.execPath, ['-e', program], {
    encoding: 'utf8',
    timeout: 60_000,
  });
  t.equal(status, 0);
  t.equal(stdout.trim(), String(64 * 40 * 3));
  t.end();
});
