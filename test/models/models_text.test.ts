// The text encoders against transformers and the pipeline's encode_prompt against diffusers (golden area text; its token
// ids are tested in text.test.ts): hidden states, pooled vectors, gradients, embeddings of prompts.
import { join } from 'node:path';
import { test } from 'tap';
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { unload } from '../../engine/module.ts';
import { add, mul } from '../../engine/ops/binary.ts';
import { slice } from '../../engine/ops/move.ts';
import { sum } from '../../engine/ops/reduce.ts';
import { scope } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { loadPipeline, type Pipeline } from '../../models/pipeline.ts';
import {
  parseTextConfig,
  placeTokens,
  type TextEncoder,
  type Tokens,
  textEncoder,
} from '../../models/text/clip.ts';
import { encodePrompts, type Prompts } from '../../models/text/conditioning.ts';
import { type Assert, type GoldenCase, goldenArea, goldenFolder, maxDifference } from '../support/golden.ts';
import {
  checkActivations,
  checkGradients,
  compare,
  devices,
  plain,
  scaleParameters,
} from '../support/models_golden.ts';
import { nonEmpty } from '../support/non_empty.ts';

const area = goldenArea('text');
const NORMED = 'text_model.final_layer_norm';

function checkForward(t: Assert, c: GoldenCase, encoder: TextEncoder, tokens: Tokens): void {
  for (const label of Object.keys(c.expect)) {
    const entry = /^hidden_states\.(\d+)$/.exec(label)?.[1];
    if (entry) compare(t, area, c, label, encoder(tokens, { layer: Number(entry), pooled: false }).hidden);
  }
  // The goldens name what the final norm gives by its place in transformers' output.
  const { last_hidden_state, text_embeds } = c.expect;
  const seen = checkActivations(t, area, { ...c, expect: { [NORMED]: last_hidden_state } }, () => {
    const { pooled } = encoder(tokens, { layer: -2, pooled: true });
    // Without a projection (text_encoder) no pooled vector is computed, as SDXL reads none.
    if (text_embeds) compare(t, area, c, 'text_embeds', pooled as Tensor);
  });
  t.ok(seen.has(NORMED), `${c.id}: the final norm ran`);
}

/** sum(penultimate * cotangent), and the sum of the pooled vector where there is one. */
function loss(encoder: TextEncoder, tokens: Tokens, cotangent: Tensor, projected: boolean): Tensor {
  const total = (x: Tensor) => sum(x.reshape(1, -1), 1);
  const { hidden, pooled } = encoder(tokens, { layer: -2, pooled: projected });
  const first = total(mul(hidden, cotangent));
  return pooled ? add(first, total(pooled)) : first;
}

function checkEncoder(t: Assert, c: GoldenCase, component: string, kind: string, device: Device): void {
  const source = openModel(join(goldenFolder, 'tiny-sdxl'));
  const config = parseTextConfig(source.config(component));
  const encoder = textEncoder(config);
  source.load(component, encoder, device, 'float32');
  scaleParameters(encoder, c);
  scope(() => {
    const stored = c.inputs?.ids as string;
    const [rows, length] = area.shape(stored);
    // The stored ids may hold more prompts than a case about the first one uses.
    const used = kind === 'eps_probe' || kind === 'grads' ? 1 : rows;
    const values = area.floats(stored).subarray(0, used * length);
    const tokens = placeTokens(encoder, Int32Array.from(values), length, device);
    if (kind === 'grads') {
      const cotangent = plain(area, c.cotangent as string, device);
      const projected = config.projection_dim !== undefined;
      checkGradients(t, area, c, encoder, {}, () => loss(encoder, tokens, cotangent, projected));
    } else if (kind === 'pooled_all') {
      const { pooled } = noGrad(() => encoder(tokens, { layer: -2, pooled: true }));
      compare(t, area, c, 'text_embeds', pooled as Tensor);
    } else noGrad(() => checkForward(t, c, encoder, tokens));
  });
  unload(encoder);
}

type Settings = {
  [K in keyof Prompts]?: K extends 'clip_skip' ? number : string | readonly string[];
} & { num_images_per_prompt?: number; do_classifier_free_guidance?: boolean };

function checkEncodePrompt(t: Assert, c: GoldenCase, { text, device }: Pipeline): void {
  const settings = c.settings as Settings;
  const list = (value: string | readonly string[] | undefined) =>
    value === undefined ? undefined : ([] as string[]).concat(value);
  const prompts: Prompts = {
    prompt: list(settings.prompt) as string[],
    prompt_2: list(settings.prompt_2),
    negative_prompt: list(settings.negative_prompt),
    negative_prompt_2: list(settings.negative_prompt_2),
    clip_skip: settings.clip_skip,
  };
  const guided = settings.do_classifier_free_guidance ?? true;
  const copies = settings.num_images_per_prompt ?? 1;
  noGrad(() =>
    scope(() => {
      const got = encodePrompts(text, prompts, { guided, copies, device, dtype: 'float32' });
      const rows = got.context.shape[0] / (guided ? 2 : 1);
      const part = (from: number, negative: string) => {
        compare(t, area, c, `${negative}prompt_embeds`, slice(got.context, 0, from, rows));
        const pooled = negative ? 'negative_pooled_prompt_embeds' : 'pooled_prompt_embeds';
        compare(t, area, c, pooled, slice(got.pooled, 0, from, rows));
      };
      if (guided) part(0, 'negative_');
      part(guided ? rows : 0, '');
    }),
  );
}

test('long prompts in chunks: each as if it were alone, and the pooled vector of the first', (t) => {
  const [device] = devices;
  const before = device.memory.storages;
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'float32' });
  const { text } = pipeline;
  const { tokenizer } = text.encoders[0];
  const word = (i: number) => ['fox', 'hill', 'snow', 'red', 'moon', 'castle', 'horse'][i % 7];
  // As many words as fill one chunk to the last token, and more.
  const words: string[] = [];
  while (tokenizer.chunksOf([...words, word(words.length)].join(' ')).length === 1)
    words.push(word(words.length));
  const [first, rest] = [words.join(' '), 'a horse on the moon'];
  const long = `${first} ${rest}`;
  const embed = (prompts: Prompts, guided = false) =>
    noGrad(() =>
      scope(() => {
        const got = encodePrompts(text, prompts, { guided, copies: 1, device, dtype: 'float32' });
        return {
          shape: got.context.shape,
          context: got.context.floats(),
          pooled: got.pooled.floats(),
          cut: got.truncated,
        };
      }),
    );
  const [whole, a, b, cut] = [
    embed({ prompt: [long], max_token_length: 225 }),
    embed({ prompt: [first] }),
    embed({ prompt: [rest] }),
    embed({ prompt: [long] }),
  ];
  const c = whole.shape[2];
  t.same(whole.shape, [1, 2 * 77, c], 'as many chunks as it needs, not as many as may be');
  t.same(whole.cut, []);
  t.match(cut.cut, [/moon/], 'else its end is cut off');
  t.same(cut.context, a.context);
  t.ok(maxDifference(whole.context, [...a.context, ...b.context]) < 1e-6);
  t.ok(maxDifference(whole.pooled, a.pooled) < 1e-6);
  t.same(embed({ prompt: [first], max_token_length: 225 }).shape, [1, 77, c]);

  const both = embed({ prompt: [long, rest], negative_prompt: ['fog', 'fog'], max_token_length: 150 }, true);
  t.same(both.shape, [4, 2 * 77, c], 'all take as many as the longest');
  const row = (i: number) => both.context.subarray(i * 154 * c, (i + 1) * 154 * c);
  t.ok(maxDifference(row(2), whole.context) < 1e-6);
  t.ok(maxDifference(row(3).subarray(0, 77 * c), b.context) < 1e-6);
  t.ok(
    maxDifference(row(0).subarray(77 * c), embed({ prompt: [''] }).context) < 1e-6,
    'the rest of a short one is empty',
  );
  const zeros = embed({ prompt: [long], max_token_length: 150 }, true);
  t.ok(
    zeros.context.subarray(0, 154 * c).every((x) => x === 0),
    'no negative prompt is zeros, as many',
  );
  t.throws(() => embed({ prompt: [long], max_token_length: 100 }), {
    message: /max_token_length is 100; give a multiple of 75/,
  });
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

for (const device of devices) {
  test(`text encoders on ${device.name}`, (t) => {
    const before = device.memory.storages;
    for (const c of nonEmpty(area.cases.filter(({ call }) => /^text_encoder/.test(call as string)))) {
      const [, component, kind] = /^(text_encoder(?:_2)?)_(.*)$/.exec(c.id) as RegExpExecArray;
      checkEncoder(t, c, component, kind, device);
    }
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });

  test(`encode_prompt on ${device.name}`, (t) => {
    const before = device.memory.storages;
    const cases = area.cases.filter(({ call }) => call === 'encode_prompt');
    for (const name of ['tiny-sdxl', 'tiny-sdxl-refiner']) {
      const pipeline = loadPipeline(openModel(join(goldenFolder, name)), { device, dtype: 'float32' });
      for (const c of nonEmpty(cases.filter((each) => each.pipeline === name)))
        checkEncodePrompt(t, c, pipeline);
      pipeline.release();
    }
    t.equal(device.memory.storages, before, 'live tensors');
    t.end();
  });
}
