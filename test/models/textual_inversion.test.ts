// Textual inversions against diffusers (golden/textual_inversion.jsonl): prompts with embeddings of one vector and of several, which
// a formula gives, in the base and the refiner; and files and names that are refused. On a GPU: cuda_models.test.ts.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import type { Pipeline } from '../../models/pipeline.ts';
import { readPrompt } from '../../models/text/emphasis.ts';
import { loadTextualInversion } from '../../models/text/textual_inversion.ts';
import { type Assert, allClose, goldenLines } from '../support/golden.ts';
import { says } from '../support/mistake.ts';
import { devices } from '../support/models_golden.ts';
import { nonEmpty } from '../support/non_empty.ts';
import { embed, embeddings, open, vectors, write } from '../support/textual_inversions.ts';

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
      for (const golden of nonEmpty(cases.filter((each) => each.pipeline === name)))
        check(t, pipeline, golden);
      pipeline.release();
    }
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });
}

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
  const both = [32, 48].map((width) => vectors(80, width, 3));
  const long = write(
    join(toy, 'long.safetensors'),
    ['clip_l', [80, 32], both[0]],
    ['clip_g', [80, 48], both[1]],
  );
  loadTextualInversion(pipeline, long);
  t.same(sizes('long a', 'ignore'), [75, 6], 'more than a chunk has: no empty one before it');
  t.same(sizes('a long', 'ignore'), [1, 75, 5]);

  const refused = (path: string, token: string | undefined, message: RegExp) =>
    t.throws(() => loadTextualInversion(pipeline, path, token), says(message));
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
  const refused = (path: string, message: RegExp, token?: string) =>
    t.throws(() => loadTextualInversion(pipeline, path, token), says(message));
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
