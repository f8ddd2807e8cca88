// The prompts of `sdxl sample`: several in one call, as the pictures that each alone gives, written as they come; weights in them;
// and words of textual inversions.
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
import { encodeNumbers } from '../../io/dtype.ts';
import { readPicture, writePng } from '../../io/image.ts';
import { readPngText } from '../../io/png.ts';
import { openSafetensors, writeSafetensors } from '../../io/safetensors.ts';
import { sdxl } from '../support/command_line.ts';
import { goldenFolder, maxDifference } from '../support/golden.ts';

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

test('batches are the pictures of the seeds that follow', async (t) => {
  const { out } = await sample(
    '--prompt',
    prompts[0],
    '--batch-count',
    '2',
    '--output',
    at('b.png'),
    '--json',
  );
  t.same(
    JSON.parse(out).pictures,
    [5, 6].map((seed, i) => ({ file: at(`b-${i}.png`), seed, prompt: prompts[0] })),
  );
  await sample('--prompt', prompts[0], '--seed', '6', '--output', at('one.png'));
  t.ok(readFileSync(at('b-1.png')).equals(readFileSync(at('one.png'))), 'with its own seed in it');
  const random = JSON.parse(
    (await sample('--prompt', 'x', '--seed', '-1', '--output', at('one.png'), '--json')).out,
  );
  t.ok(Number.isInteger(random.seed) && random.seed >= 0, 'a seed of -1 is a random one');
  const { err } = await sample('--prompt', 'a <lora:style:0.8> fox', '--output', at('one.png'));
  t.match(err, /^warning: "<lora:style:0.8>" is read as words of the prompt; .* --lora FILE:SCALE, or .*\n$/);
  t.end();
});

test('several pictures of several prompts, numbered in their order, with all latents', async (t) => {
  const [output, latents] = [at('many.png'), at('latents.safetensors')];
  const more = ['--num-images', '2', '--output', output, '--save-latents', latents];
  const { out } = await sample('--prompt', prompts[0], '--prompt', prompts[1], '--json', ...more);
  t.equal(JSON.parse(out).latents, latents);
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
    const { files, pictures } = JSON.parse(out) as { files: string[]; pictures: unknown[] };
    t.same(
      pictures,
      files.map((file, i) => ({ file, seed: 5, prompt: drawn[i >> 1] })),
    );
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

test('weights in prompts: drawn, kept in the picture and read back, from A1111 too', async (t) => {
  const prompt = 'a (red:1.5) fox, [snow]';
  const draw = async (name: string, ...argv: string[]) => {
    const { status, err } = await sample('--output', at(name), ...argv);
    t.same([status, err], [0, '']);
    return readFileSync(at(name));
  };
  const unread = await sample('--output', at('unread.png'), '--prompt', 'a fox', '-n', 'a [cat:dog:0.5]');
  t.match(unread.err, /^warning: "\[cat:dog:0\.5\]" is drawn as words; give --emphasis original .*\n$/);
  t.match((await sample('--output', at('unread.png'), '--prompt', prompt)).err, /"\(red:1\.5\)" is drawn as/);
  const [plain, original, noNorm, ignored] = [
    await draw('text.png', '--prompt', prompt, '--emphasis', 'none'),
    await draw('original.png', '--prompt', prompt, '--emphasis', 'original'),
    await draw('no-norm.png', '--prompt', prompt, '--emphasis', 'no-norm'),
    await draw('ignore.png', '--prompt', prompt, '--emphasis', 'ignore'),
  ];
  t.equal(new Set([plain, original, noNorm, ignored].map(String)).size, 4);
  writeFileSync(at('weighted.txt'), `${prompt}\n`);
  t.ok(
    original.equals(await draw('again.png', '--prompt-file', at('weighted.txt'), '--emphasis', 'original')),
  );
  const pixels = async (name: string) => (await readPicture(at(name))).data;
  await draw('unweighted.png', '--prompt', 'a red fox, snow');
  t.same(await pixels('ignore.png'), await pixels('unweighted.png'));
  const parameters = (name: string) => readPngText(at(name)).parameters;
  t.match(parameters('text.png'), /, Emphasis: None, /, 'A1111 takes brackets for weights unless told');
  t.notMatch(parameters('original.png'), /Emphasis/, 'as which is its default');
  t.notMatch(parameters('unweighted.png'), /Emphasis/);
  t.match(parameters('no-norm.png'), /, Emphasis: No norm, /);
  t.match(parameters('ignore.png'), /, Emphasis: Ignore, /);

  for (const [name, picture] of [
    ['no-norm.png', noNorm],
    ['text.png', plain],
  ] as const)
    t.ok(picture.equals(await draw('again.png', '--from', at(name))), `${name} by its own settings`);
  for (const name of ['original.png', 'no-norm.png', 'ignore.png', 'text.png']) {
    writePng(at('foreign.png'), await readPicture(at(name)), { parameters: parameters(name) });
    await draw('again.png', '--from', at('foreign.png'));
    t.same(await pixels('again.png'), await pixels(name), `${name} as A1111 would tell of it`);
  }

  for (const flag of ['--prompt', '--negative-prompt']) {
    const { status, err } = await sample(
      ...['--prompt', 'a fox', flag, 'a (red:1.5.0) fox', '--emphasis', 'original'],
      ...['--output', at('none.png')],
    );
    t.equal(status, 2);
    t.equal(err, 'error: the prompt has ":1.5.0)", which is no weight; write one such as (word:1.2)\n');
  }
  const { err } = await sample('--prompt', 'a fox', '--emphasis', 'nonorm', '--output', at('none.png'));
  t.match(err, /--emphasis takes none, ignore, original, no-norm, not "nonorm"; did you mean "no-norm"\?$/m);
  t.notOk(existsSync(at('none.png')));
});

test('textual inversions: of a file and under another name, with a refiner, and from a picture', async (t) => {
  const rows = (width: number) => ({
    shape: [2, width],
    dtype: 'float32' as const,
    bytes: encodeNumbers(
      Float32Array.from({ length: 2 * width }, (_, i) => Math.sin(i) / 5),
      'float32',
    ),
  });
  const embedding = at('toy.safetensors');
  writeSafetensors(embedding, [
    { name: 'clip_l', ...rows(32) },
    { name: 'clip_g', ...rows(48) },
  ]);
  const draw = async (name: string, ...argv: string[]) => {
    const { status, err } = await sample('--output', at(name), '--num-images', '1', ...argv);
    t.equal(status, 0, err);
    return (await readPicture(at(name))).data;
  };
  const named = await draw('toy.png', '--prompt', 'a toy fox', '--textual-inversion', embedding);
  t.ok(maxDifference(await draw('plain.png', '--prompt', 'a toy fox'), named) > 0);
  const other = ['--prompt', 'a <s0> fox', '--textual-inversion', `${embedding}:<s0>`];
  t.same(await draw('other.png', ...other), named);
  t.same(await draw('again.png', '--from', at('other.png')), named, 'its settings say where it is');
  t.same(JSON.parse(readPngText(at('other.png')).sdxl).textualInversion, [`${embedding}:<s0>`]);
  const unsaid = await sample(
    '--output',
    at('plain.png'),
    '-p',
    'a fox',
    '--textual-inversion',
    `${embedding}:Quux`,
  );
  t.match(
    unsaid.err,
    /^warning: no prompt has "Quux", by which --textual-inversion .*toy\.safetensors is called\n$/,
  );
  t.match((await sdxl('inspect', embedding)).out, /textual inversion for SDXL\n.*2 tensors/);
  const more = ['--refiner', refiner, '--denoising-end', '0.5'];
  const refined = await draw('refined.png', ...other, ...more);
  t.same(
    await draw('refined.png', '--prompt', 'a toy fox', '--textual-inversion', embedding, ...more),
    refined,
  );

  for (const [file, says] of [
    ['absent.safetensors', /--textual-inversion: no file .*absent\.safetensors$/m],
    [embedding, /has a token "toy" already; call the embedding otherwise, as FILE:TOKEN/],
  ] as const) {
    const { status, err } = await sample(
      ...['--textual-inversion', embedding, '--textual-inversion', file],
      '-p',
      'a toy',
    );
    t.equal(status, 2);
    t.match(err, says);
  }
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
