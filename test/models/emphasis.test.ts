// Prompt weights against A1111's own functions over transformers' text encoders (golden/emphasis.jsonl): spans of tricky prompts,
// and embeddings of weighted ones, nested, escaped, with BREAK, and longer than a chunk.
import { join } from 'node:path';
import { test } from 'tap';
import { noGrad } from '../../engine/grad.ts';
import { scope } from '../../engine/scope.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { loadPipeline, type Pipeline } from '../../models/pipeline.ts';
import { encodePrompts, type Prompts } from '../../models/text/conditioning.ts';
import { type Emphasis, parsePromptAttention, readPrompt, type Span } from '../../models/text/emphasis.ts';
import { loadTokenizer } from '../../models/text/tokenizer.ts';
import { allClose, goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { devices } from '../support/models_golden.ts';

interface Parsed {
  prompt: string;
  spans: [text: string, weight: number][];
}

/** `context` is float32 in base64, [tokens, channels], of some of the context's channels; `pooled` is its beginning. */
interface Encoded {
  prompt: string;
  emphasis: Emphasis;
  tokens: number;
  channels: number[];
  context: string;
  pooled: number[];
}

const cases = goldenLines<Parsed | Encoded>('emphasis');

/** What is between float32 and float64 of the judge is 2.5e-6 at most. */
const tolerance = { atol: 2.5e-5, rtol: 0 };

const tiny = join(goldenFolder, 'tiny-sdxl');

function embed({ text, device }: Pipeline, prompts: Prompts, guided = false) {
  return noGrad(() =>
    scope(() => {
      const got = encodePrompts(text, prompts, { guided, copies: 1, device, dtype: 'float32' });
      const { shape } = got.context;
      return { shape, context: got.context.floats(), pooled: got.pooled.floats(), cut: got.truncated };
    }),
  );
}

test('spans of prompts', async (t) => {
  for (const each of cases)
    if ('spans' in each) {
      const want: Span[] = each.spans.map(([text, weight]) => ({ text, weight }));
      t.strictSame(parsePromptAttention(each.prompt), want, JSON.stringify(each.prompt));
    }
  for (const [bad, weight] of [
    ['(a:1.2.3)', ':1.2.3)'],
    ['b (a:.) c', ':.)'],
  ])
    t.throws(() => parsePromptAttention(bad), {
      name: 'UserError',
      message: `the prompt has "${weight}", which is no weight; write one such as (word:1.2)`,
    });
  t.throws(() => parsePromptAttention('(a:1..2)'), {
    message: 'the prompt has ":1..2)", which is no weight; write one such as (word:1.2)',
  });
});

test('a long run of spaces is read once', (t) => {
  const spaces = ' '.repeat(100_000);
  const began = process.cpuUsage().user;
  const spans = parsePromptAttention(`a${spaces}(b:1.2)${spaces}BREAK${spaces}BREAK c`);
  t.ok(process.cpuUsage().user - began < 3e6, 'from each of them it would take half a minute');
  const texts = spans.map(({ text }) => text.trim());
  t.same(texts, ['a', 'b', '', 'BREAK', '', 'BREAK', 'c']);
  t.end();
});

test('brackets that are never closed are weighed once, and a hundred of them at most', (t) => {
  const began = process.cpuUsage().user;
  const spans = parsePromptAttention('a('.repeat(50_000));
  t.ok(
    process.cpuUsage().user - began < 3e6,
    'each with all that are behind it would take a quarter of a minute',
  );
  t.equal(spans.length, 101, 'spans of one weight are one');
  const weight = (depth: number) =>
    Array(depth)
      .fill(1.1)
      .reduce((product, each) => product * each, 1);
  t.same(
    spans.map((span) => span.weight),
    spans.map((_, depth) => weight(depth)),
  );
  t.same(parsePromptAttention(`${'('.repeat(150)}a${')'.repeat(150)}b`), [
    { text: 'a', weight: weight(100) },
    { text: 'b', weight: 1 },
  ]);
  t.end();
});

test('chunks of weighted prompts', async (t) => {
  const tokenizer = loadTokenizer(join(tiny, 'tokenizer'));
  const [the, comma] = ['the', ','].map((text) => tokenizer.tokenize(text)[0]);
  const text = (words: number, more: string) => `${Array(words).fill('the').join(' ')}${more}`;
  const sizes = (prompt: string, emphasis: Emphasis = 'ignore') =>
    readPrompt(tokenizer, prompt, emphasis).chunks.map((chunk) => chunk.length);
  const rest = ` ${text(30, '')}`;
  t.same(sizes(text(55, `,${rest}`)), [56, 30], 'a comma 20 tokens before the end ends the chunk');
  t.same(sizes(text(54, `,${rest}`)), [75, 10], 'one further away does not');
  t.same(sizes(text(55, `,${rest}`), 'none'), [75, 11], 'nor where weights are not read');
  t.same(sizes(text(74, `,${rest}`)), [75, 30], 'the last place of a chunk may be the comma');
  const { chunks } = readPrompt(tokenizer, text(75, `,${rest}`), 'ignore');
  t.same(chunks, [Array(75).fill(the), [comma, ...Array(30).fill(the)]], 'or the first of the next');
  t.same(sizes('the BREAK the the BREAK'), [1, 2]);
  t.same(sizes('BREAK BREAK the'), [0, 0, 1], 'a BREAK ends what there is, if nothing');
  t.same(sizes(''), [0]);
  const { weights } = readPrompt(tokenizer, `(${text(80, ')')}`, 'no-norm');
  t.same(weights, [Array(75).fill(1.1), Array(5).fill(1.1)]);
  t.equal(readPrompt(tokenizer, '(the)', 'ignore').weights, undefined);
  t.equal(readPrompt(tokenizer, 'the', 'original').weights, undefined);
});

for (const device of devices) {
  test(`embeddings of weighted prompts on ${device.name}`, (t) => {
    const before = device.memory.storages;
    const pipeline = loadPipeline(openModel(tiny), { device, dtype: 'float32' });
    for (const each of cases) {
      if (!('context' in each)) continue;
      const { prompt, emphasis, tokens, channels } = each;
      const got = embed(pipeline, { prompt: [prompt], emphasis, max_token_length: 225 });
      t.same([got.shape, got.cut], [[1, tokens, 80], []]);
      const picked = Array.from({ length: tokens }, (_, i) => channels.map((c) => got.context[i * 80 + c]));
      const want = new Float32Array(new Uint8Array(Buffer.from(each.context, 'base64')).buffer);
      allClose(t, `${emphasis}: ${prompt}`, picked.flat(), want, tolerance);
      allClose(t, `${emphasis}: ${prompt}, pooled`, got.pooled.slice(0, 8), each.pooled, tolerance);
    }
    pipeline.release();
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });
}

test('each text has its own weights, and without any nothing changes', (t) => {
  const [device] = devices;
  const pipeline = loadPipeline(openModel(tiny), { device, dtype: 'float32' });
  const emphasis = 'original';
  const of = (prompt: string, more: Partial<Prompts> = {}) =>
    embed(pipeline, { prompt: [prompt], ...more }).context;
  const plain = of('a red fox');
  t.same(of('a red fox', { emphasis }), plain, 'to the bit');
  t.same(of('a [red] (fox:1.3)', { emphasis: 'ignore' }), plain);
  t.ok(maxDifference(of('a [red] fox'), plain) > 0, 'by default brackets are text');
  t.same(of('a [red] fox', { emphasis: 'none' }), of('a [red] fox'));

  const weighted = of('a (red:1.5) fox', { emphasis });
  const both = embed(
    pipeline,
    { prompt: ['a (red:1.5) fox', 'a red fox'], negative_prompt: ['fog', '[fog]'], emphasis },
    true,
  ).context;
  const row = (i: number) => both.subarray(i * plain.length, (i + 1) * plain.length);
  t.ok(maxDifference(row(2), weighted) < 1e-6);
  t.ok(maxDifference(row(3), plain) < 1e-6);
  t.ok(maxDifference(row(0), of('fog')) < 1e-6);
  t.ok(maxDifference(row(1), of('[fog]', { emphasis })) < 1e-6, 'the negative prompt too');
  t.ok(maxDifference(row(0), row(1)) > 1e-2);

  const second = of('a red fox', { prompt_2: ['a (red:1.5) fox'], emphasis });
  const mixed = plain.map((x, i) => (i % 80 < 32 ? x : weighted[i]));
  t.ok(maxDifference(second, mixed) < 1e-6, 'the second encoder by its own prompt');

  const cut = embed(pipeline, { prompt: ['a (red:1.5) fox BREAK the Moon'], emphasis });
  t.same(cut.cut, ['the moon'], 'without max_token_length all after BREAK is cut off, and told');
  t.same(cut.context, weighted);
  pipeline.release();
  t.end();
});
