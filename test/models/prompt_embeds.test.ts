// Embeddings in the prompts' place: those that diffusers' encode_prompt made (golden area text) give the latents of its calls (area
// pipeline), encodePrompt makes the same, and mistakes are told.
import { join } from 'node:path';
import { test } from 'tap';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import { encodePrompt } from '../../models/prompts.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import type { Embeds } from '../../models/text/conditioning.ts';
import { allClose, type GoldenCase, goldenArea, goldenFolder, maxDifference } from '../support/golden.ts';
import { devices } from '../support/models_golden.ts';
import { area, requestOf, run } from '../support/pipeline_golden.ts';

const zeros = (...shape: number[]): Embeds => ({
  shape,
  data: new Float32Array(shape.reduce((a, b) => a * b, 1)),
});

/** Calls, and the case of encode_prompt over the same texts. */
const encoded: Record<string, string> = {
  t2i_cfg5: 'encode_plain',
  't2i_negative_cfg7.5': 'encode_two_prompts',
  t2i_two_images: 'encode_negative',
  t2i_clip_skip: 'encode_clip_skip1',
  'ensemble_0.8': 'encode_negative',
};
const names = [
  'prompt_embeds',
  'pooled_prompt_embeds',
  'negative_prompt_embeds',
  'negative_pooled_prompt_embeds',
] as const;
type FourEmbeds = Record<(typeof names)[number], Embeds>;

test("embeddings of diffusers' encode_prompt in the prompts' place give diffusers' latents", (t) => {
  const [device] = devices;
  const before = device.memory.storages;
  const text = goldenArea('text');
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'float32' });
  const steps = (c: GoldenCase, given: Partial<Asked>) => {
    const { prompt, prompt_2, negative_prompt, negative_prompt_2, clip_skip, ...rest } = requestOf(
      c,
      c.settings as Record<string, unknown>,
    );
    const { history } = run(pipeline, { ...rest, ...given });
    const shown = c.refiner_settings ? history.map((_, i) => i) : (c.latents_steps as number[]);
    return Float32Array.from(shown.flatMap((i) => [...history[i]]));
  };
  for (const [id, name] of Object.entries(encoded)) {
    const c = area.cases.find((each) => each.id === id) as GoldenCase;
    const { expect } = text.cases.find((each) => each.id === name) as GoldenCase;
    const of = (key: string): Embeds => ({
      shape: text.shape(expect[key].tensor),
      data: text.floats(expect[key].tensor),
    });
    const four = Object.fromEntries(names.map((key) => [key, of(key)])) as unknown as FourEmbeds;
    const { latents } = c.expect;
    const want = area.floats(latents.tensor);
    const got = steps(c, four);
    allClose(t, `${id}: all four`, got, want.subarray(0, got.length), latents);
    const { prompt, prompt_2, negative_prompt, negative_prompt_2, clip_skip } = requestOf(
      c,
      c.settings as Record<string, unknown>,
    );
    const { prompt_embeds, pooled_prompt_embeds, ...negative } = four;
    const negativeTexts = { negative_prompt, negative_prompt_2 };
    const half = steps(c, { prompt_embeds, pooled_prompt_embeds, ...negativeTexts });
    allClose(t, `${id}: the negative ones as texts`, half, want.subarray(0, half.length), latents);
    const other = steps(c, { prompt, prompt_2, clip_skip, ...negative });
    allClose(t, `${id}: the prompts as texts`, other, want.subarray(0, other.length), latents);
    const ours = encodePrompt(pipeline, { prompt, prompt_2, clip_skip, ...negativeTexts });
    for (const key of names)
      allClose(t, `${id}: encodePrompt's ${key}`, ours[key].data, four[key].data, expect[key]);
    t.same(ours.truncated, []);
    const { truncated, ...embeds } = ours;
    t.equal(maxDifference(steps(c, embeds), steps(c, { prompt, prompt_2, clip_skip, ...negativeTexts })), 0);
  }
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

test('embeddings hold the bits of a half type', (t) => {
  const [device] = devices;
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'bfloat16' });
  const draw = (asked: Asked) =>
    run(pipeline, { num_inference_steps: 2, generators: [new TorchGenerator(1)], ...asked }).latents.data;
  const texts = { prompt: 'a fox', negative_prompt: 'rain' };
  const { truncated, ...four } = encodePrompt(pipeline, texts);
  t.same(draw(four), draw(texts));
  pipeline.release();
  t.end();
});

test('embeddings of many prompts, long ones and mistaken ones', (t) => {
  const [device] = devices;
  const before = device.memory.storages;
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'float32' });
  const base = { height: 64, width: 64, num_inference_steps: 2 };
  const draw = (asked: Asked) =>
    run(pipeline, { ...base, generators: [new TorchGenerator(1)], ...asked }).latents.data;
  const texts = { prompt: ['a fox', 'a hen'], negative_prompt: 'rain' };
  const { truncated, ...two } = encodePrompt(pipeline, texts);
  t.same(two.prompt_embeds.shape, [2, 77, 80]);
  t.same(two.negative_pooled_prompt_embeds.shape, two.pooled_prompt_embeds.shape);
  const twice = { num_images_per_prompt: 2 };
  t.same(draw({ ...two, ...twice }), draw({ ...texts, ...twice }), 'each for its images');

  const prompt = `${'a red fox on a hill '.repeat(16)}under the moon`;
  const { truncated: cut } = encodePrompt(pipeline, { prompt });
  t.match(cut, [/moon/], 'what is not read is told');
  const long = encodePrompt(pipeline, { prompt, negative_prompt: 'rain', max_token_length: 150 });
  t.same(long.prompt_embeds.shape, [1, 154, 80]);
  const { prompt_embeds, pooled_prompt_embeds } = long;
  const whole = draw({ prompt, negative_prompt: 'rain', max_token_length: 150 });
  const beside = draw({ prompt_embeds, pooled_prompt_embeds, negative_prompt: 'rain' });
  t.same(beside, whole, 'a text beside long embeddings is as long');

  const { prompt_embeds: p, pooled_prompt_embeds: q } = encodePrompt(pipeline, { prompt: 'a fox' });
  const one = { prompt_embeds: p, pooled_prompt_embeds: q };
  const odd = { prompt_embeds: zeros(1, 70, 80), pooled_prompt_embeds: q };
  t.ok(draw({ ...odd, guidance_scale: 1 }).every(Number.isFinite), 'of any length');
  t.ok(draw(odd).every(Number.isFinite), 'with nothing as long');
  for (const [asked, message] of [
    [{}, /^there is no prompt to draw: give prompt, or prompt_embeds with pooled_prompt_embeds$/],
    [{ prompt: [] }, /^prompt is \[\]: give a text/],
    [{ ...one, prompt: 'a fox' }, /^prompt_embeds and prompt are both given, .*leave out one$/],
    [{ ...one, prompt_2: 'a fox' }, /^prompt_embeds and prompt_2 are both given/],
    [{ ...two, negative_prompt_2: 'rain' }, /^negative_prompt_embeds and negative_prompt_2 are both given/],
    [
      { prompt_embeds: p },
      /^prompt_embeds is given without pooled_prompt_embeds: give both, as encodePrompt/,
    ],
    [{ prompt: 'a', pooled_prompt_embeds: q }, /^pooled_prompt_embeds is given without prompt_embeds/],
    [{ ...two, negative_pooled_prompt_embeds: undefined }, /^negative_prompt_embeds is given without neg/],
    [{ ...one, prompt_embeds: zeros(1, 77, 32) }, /^prompt_embeds: .* takes \[1, 77, 80\]$/],
    [{ ...one, prompt_embeds: { ...p, shape: [1, 7, 80] } }, /^prompt_embeds: 6160 numbers of shape/],
    [{ ...one, pooled_prompt_embeds: zeros(1, 64) }, /^pooled_prompt_embeds: 64 numbers of shape \[1, 64\]/],
    [{ ...two, pooled_prompt_embeds: q }, /^pooled_prompt_embeds: .* takes \[2, /],
    [{ ...two, ...one }, /^negative_prompt_embeds: .* takes \[1, 77, 80\]$/],
    [{ ...long, ...one }, /^negative_prompt_embeds: .* takes \[1, 77, 80\]$/],
    [{ ...one, negative_prompt: ['a', 'b'] }, /^prompt_embeds has 1 texts and negative_prompt 2: give one/],
    [{ ...odd, negative_prompt: 'rain' }, /a multiple of 77 tokens, not to the 70 that one of them has/],
  ] as const)
    t.throws(() => draw(asked), { name: 'UserError', message });
  t.throws(() => encodePrompt(pipeline, { prompt: ['a', 'b'], negative_prompt: ['c'] }), {
    message: /prompt has 2 texts and negative_prompt 1/,
  });
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});
