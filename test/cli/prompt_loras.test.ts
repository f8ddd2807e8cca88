// LoRAs that prompts name: what of a tag is read, by the rules of the two programs that have them; which file a name is of; and that
// `sdxl sample` draws what `--lora` draws.
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { readParameters } from '../../cli/sample/a1111_read.ts';
import { metadataOf, openLoraFolder } from '../../cli/sample/lora_folder.ts';
import { loraTagsIn, readPrompts, withoutLoras } from '../../cli/sample/prompt_loras.ts';
import { writePng } from '../../io/image.ts';
import { readPngText } from '../../io/png.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { model, small } from '../support/served.ts';
import { writeAdapter } from '../support/tiny_adapter.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-prompt-loras-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);

/** What is read of a prompt: the text, and each LoRA with its weights for the text encoders and the UNet. */
type Read = [text: string, ...named: [name: string, texts: number, unet: number][]];

test('tags are read as A1111 reads them', (t) => {
  // By `re_extra_net` of its modules/extra_networks.py and `activate` of extensions-builtin/Lora/extra_networks_lora.py.
  const table: Record<string, Read> = {
    'a red fox': ['a red fox'],
    'a <lora:style> fox': ['a  fox', ['style', 1, 1]],
    'a fox<lora:style:0.8>, red': ['a fox, red', ['style', 0.8, 0.8]],
    '<lora:a:0.5> fox <lora:b:-1>': [' fox ', ['a', 0.5, 0.5], ['b', -1, -1]],
    'a <lora:style:0.5:0.8> fox': ['a  fox', ['style', 0.5, 0.8]],
    'a <lyco:style:0.5> fox': ['a  fox', ['style', 0.5, 0.5]],
    '<lora:style:te=0.2:unet=0.6>': ['', ['style', 0.2, 0.6]],
    '<lora:style:0.3:unet=0.6>': ['', ['style', 0.3, 0.6]],
    '<lora:style:te=0.3>': ['', ['style', 0.3, 0.3]],
    '<lora:style: 0.8 >': ['', ['style', 0.8, 0.8]],
    '<lora: style :1>': ['', [' style ', 1, 1]],
    '<lora:my style, v1.5 (best):1e-1>': ['', ['my style, v1.5 (best)', 0.1, 0.1]],
    '<lora:a:0.3><lora:a:0.5>': ['', ['a', 0.3, 0.3], ['a', 0.5, 0.5]],
    '(a <lora:style:1> fox:1.2)': ['(a  fox:1.2)', ['style', 1, 1]],
    'a < lora:style:1> fox': ['a < lora:style:1> fox'],
    'a <LORA:style:1> fox': ['a <LORA:style:1> fox'],
    'a <lora:style:1 fox': ['a <lora:style:1 fox'],
    'a <lora:> fox': ['a <lora:> fox'],
    'a <hypernet:style:1> fox': ['a <hypernet:style:1> fox'],
  };
  for (const [prompt, [wanted, ...wantedLoras]] of Object.entries(table)) {
    const { text, named } = withoutLoras(prompt);
    t.equal(text, wanted, prompt);
    t.same(
      named.map(({ name, scale, textEncoderScale }) => [name, textEncoderScale, scale]),
      wantedLoras,
      prompt,
    );
  }
  for (const [tag, sentence] of [
    ['<lora:style:much>', /the weight in "<lora:style:much>" takes a number, not "much"/],
    ['<lora:style:>', /takes a number, not ""/],
    ['<lora:style:nan>', /takes a number, not "nan"/],
    ['<lora:style:1:1:8>', /says more than is read: write <lora:NAME:0.8>/], // its `dyn`
    ['<lora:style:1:lbw=XYZ>', /says more than is read/],
  ] as const)
    t.throws(() => withoutLoras(`a ${tag} fox`), sentence, tag);
  t.end();
});

test('begins of tags that never end are read once', (t) => {
  const began = process.cpuUsage().user;
  const open = '<lora:'.repeat(16_000);
  t.same(withoutLoras(`<lora:a:0.5> fox ${open}`), {
    text: ` fox ${open}`,
    named: [{ name: 'a', scale: 0.5, textEncoderScale: 0.5 }],
  });
  t.same(loraTagsIn(open), []);
  t.same(loraTagsIn('<lora:<lora:a> fox'), ['<lora:<lora:a>'], 'what is within one is its name');
  t.ok(process.cpuUsage().user - began < 2e6, 'each with the rest it would take ten seconds');
  t.end();
});

test('a name is of a file in the folder', (t) => {
  const dir = at('named');
  for (const each of ['sub/deep', 'other', 'mine/final', '.trash'])
    mkdirSync(join(dir, each), { recursive: true });
  const files = [
    ...['style.safetensors', 'twice.safetensors', 'twice.gguf', 'v1.5.safetensors', 'sub/style.safetensors'],
    ...['sub/deep/watercolour.safetensors', 'other/same.safetensors', 'sub/same.safetensors', 'notes.txt'],
    'mine/final/pytorch_lora_weights.safetensors',
    ...['._style.safetensors', '.trash/watercolour.safetensors'], // hidden
  ];
  for (const each of files) writeFileSync(join(dir, each), '');
  writeFileSync(at('outside.safetensors'), '');
  symlinkSync(join(dir, 'sub'), join(dir, 'sub', 'round')); // back to where it lies
  symlinkSync(at('outside.safetensors'), join(dir, 'linked.safetensors'));
  const { fileOf, all } = openLoraFolder(dir);
  for (const [name, file] of Object.entries({
    style: 'style.safetensors', // before the one in a folder
    'style.safetensors': 'style.safetensors',
    'twice.gguf': 'twice.gguf',
    'v1.5': 'v1.5.safetensors',
    'sub/style': 'sub/style.safetensors',
    'sub/deep/watercolour.safetensors': 'sub/deep/watercolour.safetensors',
    watercolour: 'sub/deep/watercolour.safetensors', // as A1111, which knows no folders
    'other/same': 'other/same.safetensors',
    'mine/final': 'mine/final/pytorch_lora_weights.safetensors',
    linked: 'linked.safetensors', // which is the owner's wish
  }))
    t.equal(fileOf(name), join(dir, file), name);
  for (const [name, sentence] of [
    ['stile', /^no LoRA "stile" in .* \(--lora-model-dir\); did you mean "style"\?$/],
    ['something else', /; it has linked, mine\/final, other\/same, .* and 2 more$/],
    ['same', /"same" may be other\/same.safetensors or sub\/same.safetensors in .*: give it with its folder/],
    ['twice', /"twice" may be twice.gguf or twice.safetensors/],
    ['../outside', /^no LoRA "..\/outside"/],
    ['sub/../../outside', /^no LoRA/],
    [at('outside'), /^no LoRA/],
    [at('outside.safetensors'), /^no LoRA/],
    ['notes', /^no LoRA/],
    ['._style', /^no LoRA/],
    ['sub', /^no LoRA/],
    ['', /^no LoRA ""/],
    ['|high_noise|style', /^no LoRA/],
  ] as const)
    t.throws(() => fileOf(name), sentence, name);
  for (const { name, path } of all()) t.equal(fileOf(name), path, name);
  t.same(
    all().map(({ name }) => name),
    [
      ...['linked', 'mine/final', 'other/same', 'style', 'watercolour', 'sub/same', 'sub/style'],
      ...['twice.gguf', 'twice.safetensors', 'v1.5'],
    ],
    'each by its shortest name',
  );
  mkdirSync(at('empty'));
  t.throws(() => openLoraFolder(at('empty')).fileOf('style'), /: it has no .safetensors or .gguf file$/);
  t.throws(() => openLoraFolder(at('absent')), /does not exist/);
  t.end();
});

test('weights of one file add up, as in stable-diffusion.cpp', (t) => {
  const dir = at('sums');
  mkdirSync(dir);
  for (const name of ['a', 'b']) writeFileSync(join(dir, `${name}.safetensors`), '');
  const [{ typed, text, lora }, plain] = readPrompts(
    ['<lora:a:0.3> fox <lora:b> <lora:a.safetensors:0.5:0.25>', 'a hare'],
    dir,
  );
  t.equal(typed, '<lora:a:0.3> fox <lora:b> <lora:a.safetensors:0.5:0.25>');
  t.equal(text, ' fox  ');
  t.same(lora, [
    { path: join(dir, 'a.safetensors'), scale: 0.3 + 0.25, textEncoderScale: 0.3 + 0.5 },
    { path: join(dir, 'b.safetensors'), scale: 1, textEncoderScale: 1 },
  ]);
  t.same(plain, { typed: 'a hare', text: 'a hare', lora: [] });
  t.same(readPrompts(['a <lora:a:1> fox'], undefined), [
    { typed: 'a <lora:a:1> fox', text: 'a <lora:a:1> fox', lora: [] },
  ]);
  t.end();
});

test("a file's metadata is told as A1111 tells it", (t) => {
  const cover = { ssmd_cover_images: '["x"]' };
  const metadata = { ss_output_name: 'style', ss_tag_frequency: '{"img": {"fox": 3}}', ss_comment: '{no' };
  const path = writeAdapter(at('told.safetensors'), { metadata: { ...metadata, ...cover } });
  const wanted = { ...metadata, ss_tag_frequency: { img: { fox: 3 } } };
  for (let i = 0; i < 2; i++) t.same(metadataOf(path), wanted);
  writeFileSync(path, 'broken now');
  t.same(metadataOf(path), {});
  t.end();
});

const loras = at('loras');
mkdirSync(join(loras, 'sub'), { recursive: true });
const style = writeAdapter(join(loras, 'style.safetensors'));
const deep = writeAdapter(join(loras, 'sub', 'deep.safetensors'), { conv: 'down_blocks_0_resnets_0_conv2' });

/** What `sdxl sample` draws: the bits of all pictures' latents. */
async function drawn(name: string, ...flags: string[]) {
  const [output, latents] = [at(`${name}.png`), at(`${name}.safetensors`)];
  const said = await sdxl(
    ...['sample', '-m', model, '--quiet', '-o', output, '--save-latents', latents, ...flags],
  );
  if (said.status !== 0) throw new Error(said.err);
  const file = openSafetensors(latents);
  const bits = Buffer.from(file.read('latents'));
  file.close();
  return { ...said, output, bits };
}

test('a prompt draws what --lora draws', async (t) => {
  const settings = [...small, '--seed', '3', '--negative-prompt', 'rain'];
  const named = await drawn(
    ...['named', ...settings, '--lora-model-dir', loras],
    ...['-p', 'a <lora:style:0.5> fox<lora:sub/deep>'],
  );
  const typed = await drawn(
    ...(['typed', ...settings, '-p', 'a  fox', '--lora', `${style}:0.5`, '--lora', deep] as const),
  );
  const plain = await drawn('plain', ...settings, '-p', 'a  fox');
  t.ok(named.bits.equals(typed.bits));
  t.notOk(named.bits.equals(plain.bits));
  t.equal(named.err, '', 'without a warning');
  const folderIn = ({ output }: typeof named) => JSON.parse(readPngText(output).sdxl).loraModelDir;
  t.equal(folderIn(named), loras);
  t.equal(folderIn(await drawn('unasked', ...settings, '-p', 'a fox', '--lora-model-dir', loras)), undefined);
  const { parameters } = readPngText(named.output);
  t.match(parameters, /^a <lora:style:0.5> fox<lora:sub\/deep>\nNegative prompt: rain\nSteps: 2/);
  t.ok((await drawn('again', '--from', named.output)).bits.equals(named.bits), '--from draws it again');

  // As a picture of A1111, of which the text alone is there.
  const foreign = at('foreign.png');
  writePng(foreign, { width: 1, height: 1, channels: 3, data: new Uint8Array(3) }, { parameters });
  const from = ['--from', foreign, '--emphasis', 'none'];
  const withFolder = await drawn('with-folder', ...from, '--lora-model-dir', loras);
  t.ok(withFolder.bits.equals(named.bits), 'where the folder is typed');
  t.equal(withFolder.err, '');
  const without = await drawn('without', ...from);
  t.match(without.err, /made with <lora:style:0.5>, which --from does not take; there is --lora\n/);

  const asText = await drawn('as-text', ...settings, '-p', 'a <lora:style:0.5> fox');
  t.match(
    asText.err,
    /^warning: "<lora:style:0.5>" is read as words of the prompt; .* --lora-model-dir with the folder that has it\n$/,
  );
  const negative = await drawn(
    ...[
      'negative',
      ...small,
      '--seed',
      '3',
      '-p',
      'a fox',
      '-n',
      '<lora:style:1>',
      '--lora-model-dir',
      loras,
    ],
  );
  t.match(
    negative.err,
    /^warning: "<lora:style:1>" is read as words of the prompt; LoRAs are named in --prompt alone\n$/,
  );
});

test('prompts that name other LoRAs are each drawn with their own', async (t) => {
  const lines = at('lines.txt');
  writeFileSync(
    lines,
    'a [fox:hare:0.5] <lora:style:0.5>\na hare<lora:style:0.5>\na fox \na fox <lora:deep>\n',
  );
  const read = ['--emphasis', 'original'];
  const more = ['--seed', '3', '--batch-count', '2', '--hires', '--hires-scale', '1.5', ...small, ...read];
  const all = await drawn('all', '--prompt-file', lines, '--lora-model-dir', loras, ...more);
  const alone = [
    ['a [fox:hare:0.5] ', '--lora', `${style}:0.5`],
    ['a hare', '--lora', `${style}:0.5`],
    ['a fox'],
    ['a fox ', '--lora', deep],
  ];
  const bits: Buffer[] = [];
  for (const [i, [prompt, ...flags]] of alone.entries())
    bits.push((await drawn(`one-${i}`, '-p', prompt, ...flags, ...more)).bits);
  t.ok(Buffer.concat(bits).equals(all.bits));
  t.equal(new Set(bits.map((each) => each.toString('hex'))).size, 4, 'which are four pairs of pictures');
  t.match(readPngText(at('all-3.png')).parameters, /^a hare<lora:style:0.5>\n/);
});

test('mistakes', async (t) => {
  const call = (...argv: string[]) => sdxl('sample', '-m', model, '-o', at('none.png'), ...argv);
  await refusesEach(t, call, [
    [
      ['-p', 'a <lora:stile:1> fox', '--lora-model-dir', loras],
      /no LoRA "stile" in .*; did you mean "style"\?/,
    ],
    [['-p', 'a <lora:style:x> fox', '--lora-model-dir', loras], /takes a number, not "x"/],
    [['-p', 'a fox', '--lora-model-dir', at('absent')], /absent does not exist/],
    [['-p', 'a fox', '--lora-model-dir', style], /is none itself: check the path/],
  ]);
  t.same(readParameters('a <hypernet:x:1> fox\nSteps: 2', true).settings.prompt, 'a fox');
  t.end();
});
