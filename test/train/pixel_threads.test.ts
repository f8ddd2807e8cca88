// Pictures read by other threads: the same pixels and errors as in this one, however many are asked for, and a program that
// ends when it is done.
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { UserError } from '../../io/errors.ts';
import { mostThreads } from '../../io/threads.ts';
import { geometryOf, readPixels } from '../../train/pictures/picture.ts';
import { readPixelsAside } from '../../train/pictures/pixel_threads.ts';
import { goldenFolder, packageRoot } from '../support/golden.ts';

const file = readFileSync(join(goldenFolder, 'png', 'input.png'));
const options = { center_crop: false };
const questions = Array.from({ length: 3 * mostThreads + 2 }, (_, key) => ({
  ...{ file, name: `picture ${key}`, interpolation: 'lanczos' as const },
  geometry: geometryOf([128, 128], [64, 40 + 8 * (key % 3)], options, {
    seed: 1,
    key,
    variant: 0,
    flip: key % 2 === 1,
  }),
}));

test('many at once', async (t) => {
  const got = await Promise.all(questions.map((each) => readPixelsAside(each)));
  for (const [i, { name, geometry, interpolation }] of questions.entries())
    t.same(got[i], await readPixels(file, name, geometry, interpolation), name);
});

test('a broken picture among others', async (t) => {
  const broken = { ...questions[0], file: file.subarray(0, 100), name: 'the broken one' };
  const results = await Promise.allSettled(
    [questions[0], broken, questions[1]].map((each) => readPixelsAside(each)),
  );
  t.same(
    results.map(({ status }) => status),
    ['fulfilled', 'rejected', 'fulfilled'],
  );
  const { reason } = results[1] as PromiseRejectedResult;
  t.ok(reason instanceof UserError);
  t.match(reason.message, /the broken one/);
});

test('what is left before it is begun', async (t) => {
  const controller = new AbortController();
  const all = questions.map((each) => readPixelsAside(each, controller.signal));
  controller.abort();
  const results = await Promise.allSettled(all);
  const read = results.filter(({ status }) => status === 'fulfilled').length;
  t.ok(read <= mostThreads, `${read} of ${all.length} were begun`);
  t.equal((await readPixelsAside(questions[0])).length, 64 * 40 * 3, 'others go on');
});

/** Has every thread run another program. */
const running = (program: string): string =>
  `const { Worker } = threads; threads.Worker = class extends Worker { constructor() { super(${JSON.stringify(program)}, { eval: true }); } };`;

for (const [what, before] of [
  ['threads without work do not keep a program', ''],
  ['where no thread starts', 'threads.Worker = class { constructor() { throw new Error("EAGAIN"); } };'],
  ['where threads die', running('throw 1')],
  ['where threads end without a word', running('process.exit(0)')],
  [
    'where threads die when they have nothing to do',
    running(`
      let death;
      const { parentPort } = require('node:worker_threads');
      parentPort.on('message', () => {
        clearTimeout(death);
        parentPort.postMessage({ answer: new Uint8Array(${64 * 40 * 3}) });
        death = setTimeout(() => { throw 1; }, 20);
      });`),
  ],
] as const)
  test(what, (t) => {
    const module = join(packageRoot, 'dist', 'train', 'pictures', 'pixel_threads.js');
    const program = `
      const threads = require('node:worker_threads');
      ${before}
      require('node:module').syncBuiltinESMExports();
      const { readPixelsAside } = require(${JSON.stringify(module)});
      const question = ${JSON.stringify({ ...questions[0], file: undefined })};
      const file = Buffer.from(${JSON.stringify(file.toString('base64'))}, 'base64');
      const all = Array.from({ length: 12 }, () => readPixelsAside({ ...question, file }));
      Promise.all(all)
        .then(() => new Promise((later) => setTimeout(later, 100)))
        .then(() => readPixelsAside({ ...question, file }))
        .then((pixels) => console.log(all.length, pixels.length));`;
    const { status, stdout, stderr } = spawnSync(process.execPath, ['-e', program], {
      encoding: 'utf8',
      timeout: 60_000,
    });
    t.equal(status, 0, stderr);
    t.equal(stdout.trim(), `12 ${64 * 40 * 3}`);
    t.end();
  });
