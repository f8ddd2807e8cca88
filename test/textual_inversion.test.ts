// Textual inversions against diffusers (golden/textual_inversion.jsonl): prompts with embeddings of one vector and of several, which
// a formula gives, in the base and the refiner; and files and names that are refused.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { cudaDevice, type Device, openDevice } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import { scope } from '../engine/scope.ts';
import { encodeNumbers } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { writeSafetensors } from '../io/safetensors.ts';
import { openModel } from '../models/checkpoint.ts';
import { encodePrompts, type Prompts } from '../models/conditioning.ts';
import { readPrompt } from '../models/emphasis.ts';
import { loadPipeline, type Pipeline } from '../models/pipeline.ts';
import { loadTextualInversion } from '../models/textual_inversion.ts';
import { type Assert, allClose, goldenFolder, goldenLines } from './golden.ts';
import { devices } from './models_golden.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';

/** Contexts are float32 in base64, [77, channels], of some channels; pooled vectors are their beginnings. */
interface Golden {
  pipeline: string;
  prompt: string;
  prompt_2?: string;
  negative_prompt: string;
  channels: number[];
  context: string;
  negative_context: string;
  pooled: number[];
  negative_pooled: number[];
}

const cases = goldenLines<Golden>('textual_inversion');

/** The k-th embedding of the golden cases: vectors [count, width]. */
const vectors = (count: number, width: number, k: number) =>
  Float32Array.from({ length: count * width }, (_, at) => {
    const [i, c] = [Math.floor(at / width), at % width];
    return (((k * 7 + i * 31 + c * 17) % 101) - 50) / 250;
  });

type Entry = [name: string, shape: number[], values: Float32Array];

function write(path: string, ...entries: Entry[]): string {
  writeSafetensors(
    path,
    entries.map(([name, shape, values]) => ({
      name,
      shape,
      dtype: 'float32',
      bytes: encodeNumbers(values, 'float32'),
    })),
  );
  return path;
}

/** <toy> of three vectors as diffusers' script leaves them, mystyle of one without its own axis as others may. */
function embeddings(t: Test): { toy: string; style: string } {
  const folder = t.testdir({ toy: {} });
  const toy = join(folder, 'toy');
  write(join(toy, 'learned_embeds.safetensors'), ['<toy>', [3, 32], vectors(3, 32, 1)]);
  write(join(toy, 'learned_embeds_2.safetensors'), ['<toy>', [3, 48], vectors(3, 48, 1)]);
  const style = write(
    join(folder, 'mystyle.safetensors'),
    ['clip_l', [32], vectors(1, 32, 2)],
    ['clip_g', [48], vectors(1, 48, 2)],
  );
  return { toy, style };
}

const open = (device: Device, name = 'tiny-sdxl'): Pipeline =>
  loadPipeline(openModel(join(goldenFolder, name)), { device, dtype: 'float32' });

function embed({ text, device }: Pipeline, prompts: Prompts, guided = false) {
  return noGrad(() =>
    scope(() => {
      const got = encodePrompts(text, prompts, { guided, copies: 1, device, dtype: 'float32' });
      return { context: got.context.floats(), pooled: got.pooled.floats(), cut: got.truncated };
    }),
  );
}

function check(t: Assert, pipeline: Pipeline, golden: Golden): void {
  const { prompt, prompt_2, negative_prompt, channels } = golden;
  const list = (text?: string) => (text === undefined ? undefined : [text]);
  const prompts = {
    prompt: [prompt],
    prompt_2: list(prompt_2),
    negative_prompt: list(negative_prompt),
    negative_prompt_2: list(negative_prompt),
  };
  const { context, pooled } = embed(pipeline, prompts, true);
  const [width, p] = [context.length / 154, pooled.length / 2];
  const part = (row: number) =>
    Array.from({ length: 77 }, (_, i) => channels.map((c) => context[(row * 77 + i) * width + c])).flat();
  const stored = (text: string) => new Float32Array(new Uint8Array(Buffer.from(text, 'base64')).buffer);
  const tolerance = { atol: 2.5e-5, rtol: 0 };
  const label = `${golden.pipeline}: ${prompt}`;
  allClose(t, label, part(1), stored(golden.context), tolerance);
  allClose(t, `${label}, negative`, part(0), stored(golden.negative_context), tolerance);
  allClose(t, `${label}, pooled`, pooled.slice(p, p + 8), golden.pooled, tolerance);
  allClose(t, `${label}, negative pooled`, pooled.slice(0, 8), golden.negative_pooled, tolerance);
}

for (const device of devices) {
  test(`prompts with textual inversions on ${device.name}`, (t) => {
    const before = device.memory.storages;
    const { toy, style } = embeddings(t);
    for (const name of ['tiny-sdxl', 'tiny-sdxl-refiner']) {
      const pipeline = open(device, name);
      t.equal(loadTextualInversion(pipeline, toy), '<toy>');
      t.equal(loadTextualInversion(pipeline, style), 'mystyle');
      for (const golden of cases.filter((each) => each.pipeline === name)) check(t, pipeline, golden);
      pipeline.release();
    }
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });
}

test('weighted and on a virtual GPU, as on the CPU', { timeout: 300_000 }, (t) => {
  const { toy } = embeddings(t);
  const [want, got] = [openDevice('cpu'), cudaDevice(openVirtualGpu({ races: false }))].map((device) => {
    const before = device.memory.storages;
    const pipeline = open(device, 'tiny-sdxl-refiner');
    loadTextualInversion(pipeline, toy);
    const { context } = embed(pipeline, { prompt: ['a (<toy>:1.5) [fox]'], emphasis: 'original' });
    pipeline.release();
    t.equal(device.memory.storages, before, 'live tensors');
    return context;
  });
  allClose(t, 'context', got, want, { atol: 2.5e-5, rtol: 0 });
  t.end();
});

test('names, in capitals, weighted, and cut off', (t) => {
  const [device] = devices;
  const pipeline = open(device);
  const { toy, style } = embeddings(t);
  const before = embed(pipeline, { prompt: ['a red fox'] }).context;
  t.equal(loadTextualInversion(pipeline, toy, 'MyToy'), 'MyToy');
  t.same(embed(pipeline, { prompt: ['a red fox'] }).context, before, 'other prompts are as they were');
  const { context } = embed(pipeline, { prompt: ['a MyToy fox'] });
  t.same(embed(pipeline, { prompt: ['a mytoy fox'] }).context, context);
  t.same(embed(pipeline, { prompt: ['a mytoy mytoy_1 mytoy_2 fox'] }).context.length, context.length);
  const [{ tokenizer }] = pipeline.text.encoders;
  t.same(tokenizer.tokenize('a MyToy, mytoy_2').slice(1, 4), [2000, 2001, 2002], 'all vectors of it');
  t.same(tokenizer.tokenize('mytoy_2'), [2002], 'or a single one');
  t.same(
    embed(pipeline, { prompt: ['a (mytoy:1.0) fox'], emphasis: 'original' }).context,
    context,
    'in brackets too',
  );
  t.same(
    embed(pipeline, { prompt: [`${'a '.repeat(74)}mytoy`] }).cut,
    ['MyToy_1 MyToy_2'],
    'what is cut off',
  );

  const sizes = (prompt: string, emphasis: 'none' | 'ignore') =>
    readPrompt(pipeline.text.encoders[0].tokenizer, prompt, emphasis).chunks.map(({ length }) => length);
  for (const [words, want] of [
    [72, [75, 1]],
    [73, [73, 4]],
    [75, [75, 4]],
  ] as const)
    t.same(
      sizes(`${'a '.repeat(words)}mytoy a`, 'ignore'),
      want,
      `${words}: one chunk has all of it, as in A1111`,
    );
  t.same(sizes(`${'a '.repeat(73)}mytoy a`, 'none'), [75, 2]);

  const refused = (path: string, token: string | undefined, message: RegExp) => {
    try {
      loadTextualInversion(pipeline, path, token);
      t.fail(`no error like ${message}`);
    } catch (error) {
      t.ok(error instanceof UserError && message.test(error.message), String(error));
    }
  };
  refused(toy, 'mytoy', /has a token "mytoy" already; call the embedding otherwise, as FILE:TOKEN/);
  refused(toy, 'the</w>', /has a token "the<\/w>" already/);
  refused(style, 'mytoy_1', /has a token "mytoy_1" already/);
  t.same(embed(pipeline, { prompt: ['a mytoy fox'] }).context, context, 'a refused one changes nothing');
  pipeline.release();
  t.end();
});

test('files that are no textual inversion for the model', (t) => {
  const pipeline = open(devices[0]);
  const folder = t.testdir({ empty: {}, 'old.pt': 'PK' });
  const at = (name: string) => join(folder, name);
  const [l, g] = [vectors(2, 32, 1), vectors(2, 48, 1)];
  const refused = (path: string, message: RegExp, token?: string) => {
    try {
      loadTextualInversion(pipeline, path, token);
      t.fail(`no error like ${message}`);
    } catch (error) {
      t.ok(error instanceof UserError && message.test(error.message), String(error));
    }
  };
  refused(at('old.pt'), /old\.pt is a pickle.*convert it to \.safetensors with the keys clip_l and clip_g/);
  refused(at('absent.safetensors'), /absent\.safetensors does not exist/);
  refused(
    at('empty'),
    /empty has no learned_embeds\.safetensors; give a textual inversion's file, or a folder/,
  );
  refused(
    write(at('sd1.safetensors'), ['emb_params', [2, 32], l]),
    /it should have clip_l and clip_g, and has emb_params$/,
  );
  refused(
    write(at('one.safetensors'), ['clip_g', [2, 48], g]),
    /it should have clip_l and clip_g, and has clip_g$/,
  );
  refused(
    write(at('wide.safetensors'), ['clip_l', [2, 32], l], ['clip_g', [3, 32], vectors(3, 32, 1)]),
    /2 vectors for the first text encoder and 3 for the second/,
  );
  refused(
    write(at('swapped.safetensors'), ['clip_l', [2, 48], g], ['clip_g', [2, 32], l]),
    /clip_l is 48 numbers wide, and the model's text encoder takes 32; use an embedding made for this model/,
  );
  refused(
    write(at('flat.safetensors'), ['clip_l', [1, 2, 32], l], ['clip_g', [2, 48], g]),
    /clip_l is \[1,2,32\]; a textual inversion is \[vectors, width\]/,
  );
  refused(
    write(
      at('broken.safetensors'),
      ['clip_l', [2, 32], l.map((x, i) => (i === 40 ? Number.NaN : x))],
      ['clip_g', [2, 48], g],
    ),
    /broken\.safetensors: tensor clip_l holds NaN or infinity; the file is damaged/,
  );
  refused(
    write(at('none.safetensors'), ['clip_l', [0, 32], l.slice(0, 0)], ['clip_g', [0, 48], g.slice(0, 0)]),
    /clip_l is \[0,32\]/,
  );
  const good = write(at('good.safetensors'), ['clip_l', [2, 32], l], ['clip_g', [2, 48], g]);
  refused(good, /needs a name in prompts; give one as FILE:TOKEN/, ' ');
  mkdirSync(at('two'));
  writeFileSync(at('two/learned_embeds_2.safetensors'), readFileSync(good));
  write(at('two/learned_embeds.safetensors'), ['<a>', [2, 32], l]);
  refused(
    at('two'),
    /learned_embeds_2\.safetensors has 2 tensors; it should have one, with the token's name/,
  );
  pipeline.release();
  t.end();
});
