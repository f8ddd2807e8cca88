// `sdxl grid` in process: each cell is the file that `sdxl sample` writes, whatever its model, LoRAs and passes; the table, its labels and
// texts; axes as A1111 reads them; mistakes by the values that make them; and what a signal leaves.
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Command } from 'commander';
import { type Test, test } from 'tap';
import { labelsOf, readAxes } from '../../cli/grid/axes.ts';
import { groupsOf, planCells } from '../../cli/grid/cells.ts';
import { openSheet } from '../../cli/grid/sheet.ts';
import { main } from '../../cli/main.ts';
import { addSampleFlags } from '../../cli/sample/flags.ts';
import { adopt } from '../../engine/device.ts';
import { whitePicture } from '../../io/grid.ts';
import { readPicture, writePng } from '../../io/image.ts';
import { linesOf, writeLines } from '../../io/letters.ts';
import type { Picture } from '../../io/pixels.ts';
import { readPngText } from '../../io/png.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { writeControlNet } from '../support/controlnet_golden.ts';
import { watchMemory } from '../support/crowded_memory.ts';
import { goldenFolder } from '../support/golden.ts';
import { noLibrary, ownDevice } from '../support/native_library.ts';
import { writeAdapter } from '../support/tiny_adapter.ts';

const model = join(goldenFolder, 'tiny-sdxl');
const refiner = join(goldenFolder, 'tiny-sdxl-refiner');
const folder = mkdtempSync(join(tmpdir(), 'sdxl-grid-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string) => join(folder, name);
const small = ['--model', model, '--width', '64', '--height', '64', '--steps', '2', '--quiet'];

/** Axes, what is typed for each value of x and of y in their place, and what cells share. */
interface Compared {
  axes: readonly string[];
  columns: readonly (readonly string[])[];
  rows: readonly (readonly string[])[];
  shared: readonly string[];
}

/** A flag with each of some values. */
const by = (flag: string, ...values: string[]) => values.map((value) => [flag, value]);

/** Draws a grid, and each of its cells by `sdxl sample`. */
async function compare(t: Test, { axes, columns, rows, shared }: Compared): Promise<void> {
  const common = [...small, ...shared];
  const drawn = await sdxl('grid', ...axes, ...common, '--sub-images', '--output', at('grid.png'));
  t.equal(drawn.status, 0, drawn.err);
  for (const [y, row] of rows.entries())
    for (const [x, column] of columns.entries()) {
      const { status, err } = await sdxl('sample', ...common, ...row, ...column, '--output', at('cell.png'));
      t.equal(status, 0, err);
      const cell = readFileSync(at(`grid-${y * columns.length + x}.png`));
      t.ok(cell.equals(readFileSync(at('cell.png'))), `${axes.join(' ')}: ${[...column, ...row].join(' ')}`);
    }
}

const fox = ['--prompt', 'a red fox', '--negative-prompt', 'rain', '--seed', '5'];

test('each cell is the file that sample writes', async (t) => {
  const style = writeAdapter(at('style.safetensors'));
  const net = writeControlNet(at('net'), 'full');
  writePng(at('control.png'), whitePicture(64, 64));
  await compare(t, {
    axes: ['--x', 'cfg-scale=3,1', '--y', 'scheduler=euler,Euler a'],
    columns: by('--guidance-scale', '3', '1'),
    rows: by('--scheduler', 'euler', 'Euler a'),
    shared: fox,
  });
  await compare(t, {
    axes: ['--x', `lora=,${style}:2`, '--y', 'prompt-sr=fox,hare', '--prompt', 'a fox'],
    columns: [[], ['--lora', `${style}:2`]],
    rows: by('--prompt', 'a fox', 'a hare'),
    shared: ['--seed', '5', '--lora', `${style}:0.5`],
  });
  await compare(t, {
    axes: ['--y', 'hires-guidance-scale=1,3'],
    columns: [[]],
    rows: by('--hires-guidance-scale', '1', '3'),
    shared: ['--hires', '--hires-scale', '1.5', ...fox],
  });
  await compare(t, {
    axes: ['--x', 'karras=off,on'],
    columns: [[], ['--karras']],
    rows: [[]],
    shared: ['--refiner', refiner, '--strength', '0.5', ...fox],
  });
  await compare(t, {
    axes: ['--x', `controlnet=${net}:0.3,${net}:1`],
    columns: by('--controlnet', `${net}:0.3`, `${net}:1`),
    rows: [[]],
    shared: ['--control-image', at('control.png'), ...fox],
  });
});

test('what is open draws all that it can', async (t) => {
  const style = writeAdapter(at('style.safetensors'));
  const command = addSampleFlags(new Command('sample'));
  command.parse(['--prompt', 'a fox', '--width', '64', '--height', '64'], { from: 'user' });
  const axes = readAxes(command, {
    x: `model=${model},${model}/`,
    y: `lora=${style},,${style}`,
    z: 'guidance-scale=1-5 (+4)',
  });
  const cells = await planCells(command, axes, { out() {}, err() {}, live: false });
  const places = groupsOf(cells).map((group) => group.map(({ at: [x, y, z] }) => `${x}${y}${z}`).join(' '));
  t.same(
    places,
    ['000 020 001 021 010 011', '100 120 101 121 110 111'],
    'one model after the other, one LoRA after the other',
  );
});

test('where there is no memory to decode beside the UNet, each cell has the model to itself', {
  skip: noLibrary,
}, async (t) => {
  const device = adopt(ownDevice());
  const draw = async (name: string) => {
    const size = ['--model', model, '--width', '128', '--height', '128', '--device', 'cpu'];
    const flags = ['--x', 'steps=1,2', ...fox, ...size, '--output', at(name), '--quiet'];
    return { ...(await sdxl('grid', ...flags)), file: readFileSync(at(name)) };
  };
  const watched = watchMemory(device);
  const whole = await draw('whole.png');
  // The last cell is decoded without the UNet.
  const { alive } = watched;
  watched.room = Math.max(...alive.slice(-alive.length / 2));
  t.ok(watched.room < Math.max(...alive) - 1e6);
  const alone = await draw('alone.png');
  adopt(ownDevice());
  t.equal(alone.status, 0, alone.err);
  t.equal(
    alone.err,
    'warning: there is no memory to decode beside the UNet, so the model is loaded for each cell\n',
  );
  t.ok(alone.file.equals(whole.file));
});

test('a signal leaves what is drawn, in its place', async (t) => {
  let err = '';
  const terminal = {
    live: true,
    out() {},
    err(text: string) {
      err += text;
      if (text.includes('cell 2 of 2')) process.emit('SIGINT', 'SIGINT');
    },
  };
  const argv = ['grid', '--x', 'steps=1,900', ...fox, ...small.slice(0, -1), '--output', at('stopped.png')];
  t.equal(await main(argv, terminal), 130);
  t.match(err, /stopped\.png has the 1 of 2 cells that were drawn\n$/);
  await sdxl('sample', ...fox, ...small, '--steps', '1', '--output', at('first.png'));
  const [sheet, first] = [await readPicture(at('stopped.png')), await readPicture(at('first.png'))];
  const [left, top] = [sheet.width - 2 * (64 + 4), sheet.height - 64 - 4];
  t.same(part(sheet, left, top), first.data, 'the first');
  t.ok(
    part(sheet, left + 68, top).every((value) => value === 255),
    'the other is white',
  );
});

/** 64x64 pixels of a picture. */
const part = ({ width, data }: Picture, left: number, top: number): Uint8Array =>
  Uint8Array.from({ length: 3 * 64 * 64 }, (_, i) => {
    const [x, y, channel] = [Math.floor(i / 3) % 64, Math.floor(i / 192), i % 3];
    return data[3 * ((top + y) * width + left + x) + channel];
  });

test('what a grid tells of itself', async (t) => {
  const help = await sdxl('grid', '--help');
  t.match(help.out, /--x <NAME=VALUES>.*--sub-images.*prompt-sr=OLD,NEW.*Examples:/s);
  t.notMatch(help.out, '--guidance-rescale', 'the flags of sample are in its own help');
  const axes = ['--x', 'steps=1,2', '--y', 'prompt-sr=red,"blue, big"'];
  const { status, out, err } = await sdxl(
    'grid',
    ...axes,
    ...fox,
    ...small,
    '--output',
    at('told.png'),
    '--json',
  );
  t.equal(status, 0, err);
  const told = JSON.parse(out);
  t.match(told, { files: [at('told.png')], seed: 5, model });
  t.same(told.axes, [
    { flag: '--x', name: 'steps', values: ['1', '2'] },
    { flag: '--y', name: 'prompt-sr', values: ['red', 'blue, big'] },
  ]);
  const { width, height } = await readPicture(at('told.png'));
  t.same([width, height], [told.width, told.height]);
  const { parameters } = readPngText(at('told.png'));
  t.match(
    parameters,
    /^a red fox\nNegative prompt: rain\nSteps: 1, .*, Script: X\/Y\/Z plot, X Type: steps, X Values: "1,2", /,
  );
  t.ok(parameters.endsWith(', Y Type: prompt-sr, Y Values: "red,\\"blue, big\\""'));
  const { seed } = JSON.parse(
    (await sdxl('sample', '--from', at('told.png'), '--output', at('from.png'), '--json', '--quiet')).out,
  );
  t.equal(seed, 5, 'its first cell is drawn again by --from');
  await sdxl('grid', '--x', 'seed=-1,-1', '--prompt', 'x', ...small, '--output', at('random.png'));
  const seeds = /X Values: "(\d+),(\d+)"/.exec(readPngText(at('random.png')).parameters) ?? [];
  t.ok(seeds.length === 3 && seeds[1] !== seeds[2], 'random seeds are told');
});

test('values as A1111 reads them', (t) => {
  const command = addSampleFlags(new Command('sample'));
  const read = (x: string) => readAxes(command, { x })[0];
  for (const [text, values] of [
    ['steps=1-5', '1 2 3 4 5'],
    ['steps=1-5 (+2),9', '1 3 5 9'],
    ['steps=5-1(-2)', '5 3 1'],
    ['steps=10-20 [3]', '10 15 20'],
    ['steps=0-10 [4]', '0 3 6 10'],
    ['guidance-scale=0.3-0.7 (+0.2)', '0.3 0.5 0.7'],
    ['guidance-scale=1-2 (+0.3)', '1 1.3 1.6 1.9'],
    ['guidance-scale=1-2 [5],2.5', '1 1.25 1.5 1.75 2 2.5'],
    ['cfg-scale= 3 , 5', '3 5'],
    ['scheduler=euler,1-3', 'euler 1-3'],
    ['control-mode=0-2', '0-2'],
  ] as const)
    t.equal(read(text).values.join(' '), values, text);
  t.same(read('prompt-sr=a,"b, c" ,"""d"""').values, ['a', 'b, c', '"d"']);
  t.same(labelsOf(read('lora=runs/a/100/x.safetensors,,runs/a/200/x.safetensors:0.5')), [
    'lora: 100/x.safetensors',
    'no lora',
    'lora: 200/x.safetensors:0.5',
  ]);
  t.same(labelsOf(read('model=/models/a,b')), ['model: /models/a', 'model: b'], 'none shared');
  t.same(labelsOf(read('scheduler=a/b')), ['scheduler: a/b']);
  t.end();
});

test('weights that are drawn as words are told of once', async (t) => {
  const grid = ['--x', 'steps=1,2', ...small, '--prompt', 'a (red:1.5) fox', '--output', at('words.png')];
  t.match((await sdxl('grid', ...grid)).err, /^warning: "\(red:1\.5\)" is drawn as words; [^\n]*\n$/);
  t.equal((await sdxl('grid', ...grid, '--emphasis', 'none')).err, '');
});

test('mistakes', async (t) => {
  const asked = (...argv: string[]) =>
    sdxl('grid', ...argv, ...small, '--prompt', 'a fox', '--output', at('none.png'));
  await refusesEach(t, asked, [
    [[], /^error: no axis given; say what differs with --x /],
    [['--x', 'steps'], /^error: --x takes NAME=VALUES such as/],
    [['--x', 'stepz=1'], /flag of sdxl sample .*, not "stepz"; did you mean "steps"\?/],
    [['--x', 'output=a.png'], /cells may differ in, or prompt-sr, not "output"/],
    [['--x', 'steps=1,x'], /^error: --x steps=x: --steps takes a whole number from 1 to 1000, not "x"/],
    [['--x', 'steps=1-2', '--y', 'lora=none.safetensors'], /^error: --y lora=none.safetensors: no LoRA at/],
    [['--x', 'width=8', '--y', 'height=8', '--seed', 'x'], /^error: --seed takes/],
    [['--x', 'steps=1', '--strength', '1'], /^error: --strength needs --image/],
    [['--x', 'steps=1', '--image', 'absent.png'], /error: --image: absent\.png does not exist/],
    [['--x', 'steps=1', '--y', 'steps=2'], /^error: --x and --y both say steps/],
    [['--x', 'steps=1-9999'], /^error: --x: 1-9999 is a range of more than 1000 values/],
    [['--x', 'steps=1-5 (-1)'], /is a range of no values/],
    [['--x', 'scheduler="euler" a'], /a quote stands alone/],
    [
      ['--x', 'denoising-end=0.5,0.8'],
      /^error: --x denoising-end=0.5: --denoising-end leaves the picture half/,
    ],
    [['--x', 'karras=yes'], /^error: --x karras=yes: --karras takes on, off, not "yes"/],
    [
      ['--x', 'prompt-sr=dog,cat'],
      /^error: --x prompt-sr=dog: neither --prompt nor --negative-prompt has "dog"/,
    ],
    [['--x', 'prompt=a,b'], /^error: --x prompt=a: a cell shows one picture, and there are 2 prompts/],
    [['--x', 'steps=1,2', '--batch-count', '2'], /^error: --batch-count is not for grids/],
    [['--x', 'steps=1,2', '2 (+1)'], /^error: "2 \(\+1\)" belongs to no flag/],
    [['--x', 'steps=1-40', '--y', 'seed=1-40'], /^error: 1600 cells are more than the 1000 of a grid/],
    [
      ['--x', 'width=8000,8', '--y', 'height=8000,8', '--z', 'eta=0-1 [6]', '--vae-tiling'],
      /^error: the grid would be of \d+x\d+ pixels, and 268 million are the most/,
    ],
  ]);
  t.notOk(existsSync(at('none.png')));
  t.notOk(readdirSync(folder).some((name) => name.endsWith('.tmp')));
});

test('cells of several sizes, in the middle of columns and rows', (t) => {
  const sheet = openSheet({ columns: ['', ''], rows: [''], grids: [''] }, [
    { at: [0, 0, 0], width: 64, height: 64 },
    { at: [1, 0, 0], width: 32, height: 16 },
  ]);
  t.same([sheet.picture.width, sheet.picture.height], [4 + 64 + 4 + 32 + 4, 4 + 4 + 64 + 4]);
  sheet.place({ ...whitePicture(32, 16), data: new Uint8Array(3 * 32 * 16) }, [1, 0, 0]);
  const dark = [...sheet.picture.data.keys()]
    .filter((i) => i % 3 === 0 && sheet.picture.data[i] === 0)
    .map((i) => i / 3);
  const width = sheet.picture.width;
  t.same([dark[0] % width, Math.floor(dark[0] / width)], [72, 8 + 24]);
  t.equal(dark.length, 32 * 16);
  t.end();
});

test('grids of z stand further apart than their columns', (t) => {
  const cells = [0, 1].flatMap((z) => [0, 1].map((x) => ({ at: [x, 0, z] as const, width: 8, height: 8 })));
  const { picture, place } = openSheet({ columns: ['', ''], rows: [''], grids: ['', ''] }, cells);
  for (const { at } of cells) place({ ...whitePicture(8, 8), data: new Uint8Array(3 * 8 * 8) }, at);
  const across = Array.from({ length: picture.width }, (_, x) => picture.data[3 * (8 * picture.width + x)]);
  const bands = across.map((value) => (value ? '.' : '#')).join('');
  t.equal(bands, '....########....########................########....########....');
  t.end();
});

test('letters', (t) => {
  const picture = whitePicture(18, 11);
  writeLines(picture, ['Ag\u00df'], [9, 5.5], 1);
  const rows = Array.from({ length: 11 }, (_, y) =>
    Array.from({ length: 18 }, (_, x) => (picture.data[3 * (18 * y + x)] ? '.' : '#')).join(''),
  );
  t.same(rows, [
    '..................',
    '.###........#####.',
    '#...#.......#...#.',
    '#...#..####.#...#.',
    '#####.#...#.#...#.',
    '#...#.#...#.#...#.',
    '#...#.#...#.#...#.',
    '#...#..####.#####.',
    '..........#.......',
    '.......###........',
    '..................',
  ]);
  t.same(linesOf('guidance-scale: 7.5  caf\u00e9', 12), ['guidance-', 'scale: 7.5', 'cafe']);
  t.same(linesOf('abcdefgh', 3), ['abc', 'def', 'gh']);
  t.same(linesOf(' ', 3), []);
  t.end();
});
