// A1111's styles: its file as Python's csv module reads it, texts merged as its own program does, in `sdxl sample`, in grids and by requests.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import type { SampleOptions } from '../../cli/sample/options.ts';
import { readStyles, styled, withStyles } from '../../cli/sample/styles.ts';
import { a1111Lists } from '../../cli/serve/a1111_lists.ts';
import { orderOf } from '../../cli/serve/a1111_order.ts';
import type { HttpRequest } from '../../cli/serve/http.ts';
import type { Queue } from '../../cli/serve/queue.ts';
import { parseCsv } from '../../io/csv.ts';
import { readPngText } from '../../io/png.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { says } from '../support/mistake.ts';
import { model } from '../support/served.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-styles-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);
const written = (name: string, text: string): string => {
  writeFileSync(at(name), text);
  return at(name);
};
const styles = written(
  'styles.csv',
  '\ufeffname,prompt,negative_prompt\r\n#,A divider,\r\nFilm,"film still of {prompt}, ""grainy"", {prompt}","rain,\nfog"\r\n' +
    'Ink, ink drawing ,\r\n\r\nTwice,one,\r\nTwice,two\r\n',
);

test('rows as Python reads them', (t) => {
  for (const [text, rows] of [
    [
      'a, "b, ""c""\nd" x,"e"\r\n\r\n"",f"g, \n',
      [
        ['a', 'b, "c"\nd x', 'e'],
        ['', 'f"g', ''],
      ],
    ],
    ['"a"b"c",d\re', [['ab"c"', 'd'], ['e']]],
    ['a,b,', [['a', 'b', '']]],
    ['', []],
    ['\n\n', []],
    ['"a\r\nb"\n', [['a\r\nb']]],
    ['a,  ,"" \n', [['a', '', ' ']]],
    [
      '"x""",y\n,\n',
      [
        ['x"', 'y'],
        ['', ''],
      ],
    ],
  ] as const)
    t.same(parseCsv(text), rows, JSON.stringify(text));
  t.throws(() => parseCsv('a,b\nc,"d""\n'), says(/^nothing closes the quote of line 2; write/));
  t.throws(() => parseCsv(`"${'a""'.repeat(100_000)}`), says(/^nothing closes the quote of line 1/));
  t.end();
});

test('styles of a file, and of one as A1111 once wrote it', (t) => {
  t.same(readStyles(styles), [
    { name: 'Film', prompt: 'film still of {prompt}, "grainy", {prompt}', negative_prompt: 'rain,\nfog' },
    { name: 'Ink', prompt: 'ink drawing ', negative_prompt: '' },
    { name: 'Twice', prompt: 'two', negative_prompt: '' },
  ]);
  const old = written('old.csv', 'name,text\nInk,ink drawing\n');
  t.same(readStyles(old), [{ name: 'Ink', prompt: 'ink drawing', negative_prompt: '' }]);
  t.throws(
    () => readStyles(written('no.csv', 'Ink,ink drawing\n')),
    says(/first line must name the columns/),
  );
  t.end();
});

test("texts are merged as A1111's merge_prompts does", (t) => {
  for (const [text, parts, want] of [
    ['a fox ', [' by night '], 'a fox, by night'],
    ['', ['by night'], 'by night'],
    [' a fox ', [''], 'a fox'],
    ['$& fox', ['a {prompt} and {prompt}', 'ink'], 'a $& fox and $& fox, ink'],
    ['a fox', ['ink', '({prompt}:1.2)'], '(a fox, ink:1.2)'],
    [' a fox ', ['{prompt}.'], ' a fox .'],
    [' a fox ', [], ' a fox '],
  ] as const)
    t.equal(styled(text, parts), want, text);
  const options = {
    style: ['Film', 'Ink'],
    stylesFile: styles,
    prompt: ['a fox'],
  } as unknown as SampleOptions;
  t.match(
    withStyles({ ...options, negativePrompt: 'snow', hiresPrompt: 'a hare', hiresNegativePrompt: '' }),
    {
      prompt: ['film still of a fox, "grainy", a fox, ink drawing'],
      negativePrompt: 'snow, rain,\nfog',
      hiresPrompt: 'film still of a hare, "grainy", a hare, ink drawing',
      hiresNegativePrompt: '',
    },
  );
  const plain = withStyles({ ...options, style: ['Ink'], promptFile: written('more.txt', 'a hare\n') });
  t.same(plain.prompt, ['a fox, ink drawing', 'a hare, ink drawing']);
  t.equal(plain.negativePrompt, undefined, 'none where no style has one');
  t.end();
});

test('a picture in a style is the one of the whole text, which it carries', async (t) => {
  const sample = (...argv: string[]) =>
    sdxl(
      ...['sample', '--model', model, '--width', '32', '--height', '32', '--steps', '2', '--seed', '5'],
      ...['--quiet', '--output', at('a.png'), ...argv],
    );
  const negative = ['--negative-prompt', 'snow'];
  const { status, err } = await sample(
    ...['--prompt', 'a fox', ...negative, '--styles-file', styles, '--style', 'Film', '--style', 'Ink'],
  );
  t.equal(status, 0, err);
  const first = readFileSync(at('a.png'));
  t.match(
    readPngText(at('a.png')).parameters,
    /^film still of a fox, "grainy", a fox, ink drawing\nNegative/,
  );
  t.notMatch(readPngText(at('a.png')).sdxl, /styles/);
  const typed = [
    'film still of a fox, "grainy", a fox, ink drawing',
    '--negative-prompt',
    'snow, rain,\nfog',
  ];
  await sample('--prompt', ...typed);
  t.ok(readFileSync(at('a.png')).equals(first));
  t.equal((await sdxl('sample', '--from', at('a.png'), '--output', at('b.png'), '--quiet')).status, 0);
  t.ok(readFileSync(at('b.png')).equals(first), 'and again by its settings, without the file');
  const fox = ['--prompt', 'a fox'];
  await refusesEach(t, sample, [
    [[...fox, '--style', 'Film'], /--style needs --styles-file/],
    [[...fox, '--styles-file', styles], /--styles-file has styles, and none is asked for; give --style/],
    [
      [...fox, '--styles-file', styles, '--style', 'film'],
      /--style "film" is not in .*; did you mean "Film"/,
    ],
    [
      [...fox, '--styles-file', styles, '--style', 'Watercolour'],
      /--style "Watercolour" is not in .*: it has .*Film/,
    ],
    [[...fox, '--styles-file', at('none.csv'), '--style', 'Ink'], /none\.csv/],
  ]);
});

test('a grid has styles on an axis', async (t) => {
  const { status, out, err } = await sdxl(
    ...['grid', '--model', model, '--width', '32', '--height', '32', '--steps', '1', '--seed', '5'],
    ...['--x', 'style=,Ink', '--styles-file', styles, '--prompt', 'a fox'],
    ...['--output', at('grid.png'), '--quiet', '--json', '--sub-images'],
  );
  t.equal(status, 0, err);
  const cells = ['grid-0.png', 'grid-1.png'].map((name) => readPngText(at(name)).parameters.split('\n')[0]);
  t.same(cells, ['a fox', 'a fox, ink drawing'], out);
});

test('requests name styles', (t) => {
  const served = {
    ...{
      name: 'tiny-sdxl',
      loras: () => [],
      embeddings: new Map(),
      followed: new Map(),
      networks: new Map(),
    },
    ...{ texts: {}, tellIgnored() {}, stylesFile: styles },
  };
  const order = (body: Record<string, unknown>) =>
    orderOf({ prompt: 'a fox', ...body }, false, served).settings;
  const lists = a1111Lists(served, {} as Queue);
  const { json } = lists['GET /sdapi/v1/prompt-styles']({} as HttpRequest) as { json: unknown };
  t.same(json, readStyles(styles));
  t.match(order({ styles: ['Film'], negative_prompt: 'snow' }), {
    ...{ prompt: ['film still of a fox, "grainy", a fox'], negativePrompt: 'snow, rain,\nfog' },
  });
  const second = order({ styles: ['Ink'], enable_hr: true, hr_prompt: 'a hare', hr_negative_prompt: '' });
  t.match(second, { prompt: ['a fox, ink drawing'], hiresPrompt: 'a hare, ink drawing' });
  t.same([second.negativePrompt, second.hiresNegativePrompt], [undefined, undefined]);
  t.match(order({ styles: [] }), { prompt: ['a fox'] });
  t.throws(() => order({ styles: ['Inc'] }), says(/^styles "Inc" is not in .*; did you mean "Ink"/));
  t.throws(() => order({ styles: 'Ink' }), says(/^styles takes a list of names/));
  t.throws(() => order({ styles: [5] }), says(/^styles takes a text, not 5/));
  t.end();
});
