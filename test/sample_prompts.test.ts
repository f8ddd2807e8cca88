// Several prompts in one call of `sdxl sample`: the pictures that each alone gives, written as they come.
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { readPngText } from '../io/png.ts';
import { openSafetensors } from '../io/safetensors.ts';
import { sdxl } from './command_line.ts';
import { goldenFolder } from './golden.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-prompts-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const [model, refiner] = ['tiny-sdxl', 'tiny-sdxl-refiner'].map((name) => join(goldenFolder, name));
const at = (name: string): string => join(folder, name);
const sample = (...argv: string[]) =>
  sdxl(
    ...[
      'sample',
      '--model',
      model,
      '--width',
      '32',
      '--height',
      '32',
      '--steps',
      '4',
      '--seed',
      '5',
      '--quiet',
    ],
    ...argv,
  );

const file = at('prompts.txt');
writeFileSync(file, 'a blue cat\r\n\n  \na map of Rome\n');
const prompts = ['a red fox', 'a blue cat', 'a map of Rome'];

test('each prompt has the picture that it has alone', async (t) => {
  for (const [label, more] of [
    ['of the base', []],
    ['of base and refiner', ['--refiner', refiner, '--denoising-end', '0.5']],
  ] as const) {
    const { status, out } = await sample(
      ...['--prompt', prompts[0], '--prompt-file', file, '--output', at('all.png'), '--json', ...more],
    );
    t.equal(status, 0);
    const { files } = JSON.parse(out);
    t.same(
      files,
      [0, 1, 2].map((i) => at(`all-${i}.png`)),
    );
    for (const [i, prompt] of prompts.entries()) {
      await sample('--prompt', prompt, '--output', at('one.png'), ...more);
      t.ok(readFileSync(files[i]).equals(readFileSync(at('one.png'))), `${prompt}, ${label}`);
    }
  }
});

test('several pictures of several prompts, numbered in their order, with all latents', async (t) => {
  const [output, latents] = [at('many.png'), at('latents.safetensors')];
  const more = ['--num-images', '2', '--output', output, '--save-latents', latents];
  await sample('--prompt', prompts[0], '--prompt', prompts[1], ...more);
  const told = [0, 1, 2, 3].map((i) => JSON.parse(readPngText(at(`many-${i}.png`)).sdxl).prompt);
  t.same(told, [prompts[0], prompts[0], prompts[1], prompts[1]]);
  const saved = openSafetensors(latents);
  t.same(saved.tensors.get('latents')?.shape, [4, 4, 4, 4]);
  saved.close();
  await sample('--from', at('many-2.png'), '--num-images', '1', '--output', at('again.png'));
  t.equal(JSON.parse(readPngText(at('again.png')).sdxl).prompt, prompts[1]);
  for (const [more, drawn] of [
    [['--prompt-file', file], prompts.slice(1)],
    [['--prompt', 'mine'], ['mine']],
    [
      ['--prompt', 'mine', '--prompt-file', file],
      ['mine', ...prompts.slice(1)],
    ],
  ] as const) {
    const { out } = await sample('--from', at('many-2.png'), '--output', at('own.png'), '--json', ...more);
    const { files } = JSON.parse(out) as { files: string[] };
    const told = files.map((each) => JSON.parse(readPngText(each).sdxl).prompt);
    t.same(
      told,
      drawn.flatMap((each) => [each, each]),
      `${more}: not those of the picture`,
    );
  }
});

test('names of several pictures', async (t) => {
  mkdirSync(at('taken-1.png'));
  const { status, err } = await sample('--prompt-file', file, '--output', at('taken.png'));
  t.equal(status, 2);
  t.match(err, /taken-1\.png is a folder/);
  t.notOk(existsSync(at('taken-0.png')), 'refused before anything is drawn');
  await sample('--prompt-file', file, '--output', at('.png'));
  t.ok(existsSync(at('-1.png')), 'a name that is all extension');
});

test('one bar for all prompts', async (t) => {
  const flags = ['--model', model, '--width', '32', '--height', '32', '--steps', '4', '--prompt-file', file];
  const { err } = await sdxl('sample', ...flags, '--output', at('bar.png'));
  t.match(err, /^sampling 1\/8 {2}prompt 1 of 2/m);
  t.match(err, /^sampling 8\/8 {2}prompt 2 of 2/m);
});

test('a picture of values that are not finite is told of, and the others are drawn', async (t) => {
  const { status, err, out } = await sample(
    ...['--prompt-file', file, '--guidance-scale', '1e38', '--output', at('spoilt.png'), '--json'],
  );
  t.equal(status, 2);
  t.equal(JSON.parse(out).files.length, 2);
  t.match(err, /^error: .*spoilt-0\.png, .*spoilt-1\.png shows nothing.* not finite: lower --guidance-scale/);
});

test('files without prompts', async (t) => {
  writeFileSync(at('empty.txt'), '\n \n');
  const before = readdirSync(folder);
  for (const [name, says] of [
    ['empty.txt', /empty\.txt has no prompt; write one a line/],
    ['absent.txt', /absent\.txt/],
  ] as const) {
    const { status, err } = await sample('--prompt-file', at(name), '--output', at('none.png'));
    t.equal(status, 2);
    t.match(err, says);
  }
  t.same(readdirSync(folder), before, 'nothing is written');
});
