// The tokenizers against token ids that transformers gave, for prompts chosen to be awkward.
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { endsOf, parseTextConfig } from '../../models/text/clip.ts';
import { loadTokenizer, loadTokenizerFiles, type Tokenizer } from '../../models/text/tokenizer.ts';
import { goldenArea, goldenFolder } from '../support/golden.ts';
import { says } from '../support/mistake.ts';

const area = goldenArea('text');
const tokenizers = {
  tokenizer: loadTokenizer(join(goldenFolder, 'tiny-sdxl', 'tokenizer')),
  tokenizer_2: loadTokenizer(join(goldenFolder, 'tiny-sdxl', 'tokenizer_2')),
};

// The same tokenizer with room for every golden prompt.
function longTokenizer(name: string): Tokenizer {
  const folder = join(goldenFolder, 'tiny-sdxl', name);
  const text = (file: string) => readFileSync(join(folder, file), 'utf8');
  const config = { ...JSON.parse(text('tokenizer_config.json')), model_max_length: 300 };
  return loadTokenizerFiles(JSON.parse(text('vocab.json')), text('merges.txt'), config);
}

for (const [name, tokenizer] of Object.entries(tokenizers)) {
  test(`${name}: every golden prompt`, async (t) => {
    const long = longTokenizer(name);
    const { expect, prompts } = area.cases.find(({ id }) => id === `${name}_ids`)!;
    const want = area.floats(expect.ids.tensor);
    const all = area.cases.find(({ id }) => id === `${name}_ids_untruncated`)!;
    const endToEnd = area.floats(all.expect.ids.tensor);
    let start = 0;
    for (const [i, prompt] of (prompts as string[]).entries()) {
      const row = want.subarray(77 * i, 77 * (i + 1)).join(' ');
      t.ok(tokenizer.encode(prompt).ids.join(' ') === row, `prompt ${i}`);
      const count = (all.lengths as number[])[i];
      const whole = endToEnd.subarray(start, start + count).join(' ');
      t.ok(long.encode(prompt).ids.subarray(0, count).join(' ') === whole, `all of prompt ${i}`);
      start += count;
    }
  });

  test(`${name}: what a prompt loses`, async (t) => {
    t.equal(tokenizer.encode('a photo of a cat').truncated, '');
    const fits = Array(75).fill('the').join(' ');
    t.equal(tokenizer.encode(fits).truncated, '', '75 tokens fit');
    const { ids, truncated } = tokenizer.encode(`${fits} the End, don't you?`);
    t.equal(truncated, "the end, don 't you?", 'the lost end, in lower case and with CLIP’s spaces');
    t.equal(ids[76], 1999, 'the last id is still EOS');
    t.equal(tokenizer.encode(`${fits} 猫 cat`).truncated, '猫 cat');
    const [bos, the] = tokenizer.encode('the').ids;
    const eos = ids[76];
    const long = tokenizer.encode(`${fits} ${fits} the cat`, 2);
    t.equal(long.truncated, 'the cat', 'the end of the second chunk');
    const chunk = [bos, ...Array<number>(75).fill(the), eos];
    t.same([...long.ids], [...chunk, ...chunk]);
    t.same(
      [...tokenizer.encode('the', 2).ids.subarray(77)],
      [...tokenizer.encode('').ids],
      'one without text',
    );
    t.same(
      ['', fits, `${fits} the`].map((text) => tokenizer.chunksOf(text).length),
      [1, 1, 2],
    );
  });

  test(`${name}: long prompts take time in proportion`, async (t) => {
    const time = (prompt: string) => {
      // The processor's time: the clock also counts what else runs on the machine.
      const start = process.cpuUsage();
      t.equal(tokenizer.encode(prompt).ids.length, 77);
      return process.cpuUsage(start).user / 1000;
    };
    for (const unit of ['a', 'a cat, ', '!', '(', '1', '<|endoftext|>', '\u0301', ' ']) {
      const elapsed = time(unit.repeat(Math.ceil(100_000 / unit.length)));
      t.ok(elapsed < 1000, `${encodeURI(unit)}: ${elapsed.toFixed(0)} ms`);
    }
  });
}

test('the padding token is special, where it is written and nowhere else', async (t) => {
  const plain = tokenizers.tokenizer.encode('a!').ids;
  const padded = tokenizers.tokenizer_2.encode('a!').ids;
  t.equal(padded[2], 0);
  t.equal(plain[2] === 0, false);
  t.equal(padded[76], 0, 'padding of tokenizer_2');
  t.equal(plain[76], 1999, 'padding of tokenizer');
});

test('tokenizer.json, where transformers 5 saved nothing else', async (t) => {
  for (const name of ['tokenizer', 'tokenizer_2'] as const) {
    const folder = join(goldenFolder, 'tiny-sdxl', name);
    const text = (file: string) => readFileSync(join(folder, file), 'utf8');
    const config = JSON.parse(text('tokenizer_config.json'));
    const { added_tokens_decoder, ...rest } = config;
    const lines = text('merges.txt').trimEnd().split('\n').slice(1);
    const model = { type: 'BPE', vocab: JSON.parse(text('vocab.json')), merges: lines };
    const added_tokens = Object.entries(added_tokens_decoder).map(([id, token]) => ({
      id,
      ...(token as object),
    }));
    const prompts = area.cases.find(({ id }) => id === `${name}_ids`)!.prompts as string[];
    for (const merges of [lines, lines.map((line) => line.split(' '))]) {
      const alone = t.testdir({
        'tokenizer.json': JSON.stringify({ added_tokens, model: { ...model, merges } }),
        'tokenizer_config.json': JSON.stringify(rest),
      });
      const tokenizer = loadTokenizer(alone);
      const ids = (from: Tokenizer) => prompts.map((prompt) => from.encode(prompt).ids.join());
      t.strictSame(ids(tokenizer), ids(tokenizers[name]), name);
    }
  }
  for (const text of ['{ "model": { "type": "Unigram" } }', '{ "model": { "vocab": {}, "merges": [5] } }'])
    t.throws(() => loadTokenizer(t.testdir({ 'tokenizer.json': text })), /holds no byte-pair encoding/);
});

test('files that are missing or do not fit', async (t) => {
  const folder = t.testdir({});
  const refused = (pattern: RegExp) => t.throws(() => loadTokenizer(folder), says(pattern));
  refused(/has no vocab\.json; the model is incomplete/);
  writeFileSync(join(folder, 'vocab.json'), '[]');
  refused(/vocab\.json does not hold a JSON object/);
  writeFileSync(join(folder, 'vocab.json'), '{"a": 0, "b</w>": 1, "ab</w>": 2, "<|startoftext|>": 3}');
  refused(/has no merges\.txt; the model is incomplete/);
  writeFileSync(join(folder, 'merges.txt'), '');
  refused(/merges\.txt is empty: download it again/);
  writeFileSync(join(folder, 'merges.txt'), '#version: 0.2\na b</w>\n');
  refused(/no token "<\|endoftext\|>"/);
  const vocab = { a: 0, 'b</w>': 1, 'ab</w>': 2, '<|startoftext|>': 3, '<|endoftext|>': 4 };
  writeFileSync(join(folder, 'vocab.json'), JSON.stringify(vocab));
  const ab = () => loadTokenizer(folder).encode('AB').ids.slice(0, 4).join();
  t.equal(ab(), '3,2,4,4');
  const swapped = { ...vocab, 'b</w>': 2, 'ab</w>': 1 };
  writeFileSync(join(folder, 'vocab.json'), JSON.stringify(swapped));
  t.equal(ab(), '3,1,4,4', 'a file of the same length that was written again');
  writeFileSync(join(folder, 'vocab.json'), JSON.stringify(vocab));
  t.equal(ab(), '3,2,4,4', 'and again');
  writeFileSync(join(folder, 'merges.txt'), 'a c\n');
  refused(/merge "a c"/);
  rmSync(join(folder, 'merges.txt'));
  mkdirSync(join(folder, 'merges.txt'));
  refused(/is a folder/);
  const short = loadTokenizerFiles(vocab, 'a b</w>', { model_max_length: 4, pad_token: '<|startoftext|>' });
  t.equal(short.encode('ab ab ab').ids.join(), '3,2,2,4', 'in memory, with another length');
  for (const [config, says] of [
    [{ model_max_length: 0 }, /model_max_length 0: correct it in tokenizer_config\.json to 77/],
    [{ model_max_length: 2 }, /model_max_length 2: correct/],
    [{ model_max_length: '77' }, /model_max_length "77": correct/],
    [{ bos_token: 5 }, /the token 5 as "bos_token" in its config, not a text: download/],
    [{ pad_token: {} }, /the token \{\} as "pad_token"/],
    [{ added_tokens_decoder: { 0: null } }, /the token null as "0"/],
  ] as const)
    t.throws(() => loadTokenizerFiles(vocab, '', config as object), { name: 'UserError', message: says });
  t.equal(loadTokenizerFiles(vocab, 'a b</w>', { model_max_length: 3 }).encode('ab').ids.join(), '3,2,4');
  const without = { bos_token: null, pad_token: null, added_tokens_decoder: null };
  t.equal(loadTokenizerFiles(vocab, '', without as object).encode('').ids[1], 4, 'null is as nothing');
});

test('the end of a text, and what an encoder takes', (t) => {
  // Two rows; what is told is the place among all.
  const ids = Int32Array.of(10, 3, 11, 11, 0, 10, 7, 3, 7, 12);
  t.same(
    [...endsOf(ids, 5, { eos_token_id: 2, vocab_size: 20 })],
    [2, 9],
    'with 2 the first of the largest ids, as transformers has it',
  );
  t.same(
    [...endsOf(ids, 5, { eos_token_id: 2, vocab_size: 11 })],
    [0, 5],
    'of those in the vocabulary, which added tokens are not',
  );
  t.same([...endsOf(ids, 5, { eos_token_id: 3, vocab_size: 20 })], [1, 7], 'else the first of its own');
  t.same(
    [...endsOf(ids, 5, { eos_token_id: 7, vocab_size: 20 })],
    [0, 6],
    'or the beginning, where there is none',
  );
  const json = {
    ...{ vocab_size: 9, hidden_size: 8, intermediate_size: 7, num_hidden_layers: 6, num_attention_heads: 5 },
    projection_dim: 4,
  };
  const plain = { ...json, max_position_embeddings: 77, layer_norm_eps: 1e-5, eos_token_id: 2 };
  t.strictSame(parseTextConfig(json), { ...plain, hidden_act: 'quick_gelu', projection_dim: undefined });
  const told = {
    ...{ max_position_embeddings: 20, layer_norm_eps: 1e-6, eos_token_id: 49407, hidden_act: 'gelu' },
    architectures: ['CLIPTextModelWithProjection'],
  };
  const { architectures, ...own } = told;
  t.strictSame(parseTextConfig({ ...json, ...told }), { ...json, ...own });
  for (const [damage, says] of [
    [{ hidden_size: undefined }, /"hidden_size" is missing or not a number/],
    [{ eos_token_id: '2' }, /"eos_token_id" is missing or not a number/],
    [{ hidden_act: 'relu' }, /hidden_act "relu" is not supported/],
    [{ ...told, projection_dim: null }, /"projection_dim" is missing/],
  ] as const)
    t.throws(() => parseTextConfig({ ...json, ...damage }), { name: 'UserError', message: says });
  t.end();
});
