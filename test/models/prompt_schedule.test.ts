// Prompts that change with the steps: schedules against A1111's own parser (golden/prompt_schedule.jsonl), which call sees what, and
// pictures: those of hand-made parts, of texts that come back, and of `sdxl sample`. Recorded steps: cuda_recorded.test.ts.
import { join } from 'node:path';
import { type Test, test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { preprocessControl } from '../../io/image.ts';
import { denoiseToEnd, type Pipeline } from '../../models/pipeline.ts';
import { promptsThrough } from '../../models/plan.ts';
import { encodePrompt } from '../../models/prompts.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { type Asked, complete } from '../../models/request.ts';
import { createSampler } from '../../models/samplers/registry.ts';
import type { PlanOptions } from '../../models/samplers/sampler.ts';
import { promptSchedule } from '../../models/text/prompt_schedule.ts';
import { sdxl } from '../support/command_line.ts';
import { savedLatents } from '../support/contents.ts';
import { picture } from '../support/controlnet_golden.ts';
import { goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { at, latentsOf, pipelineOf } from '../support/golden_calls.ts';

type Line = [prompt: string, steps: number, hires: number | null, schedule: [end: number, text: string][]];

test("schedules are those of A1111's parser", (t) => {
  const lines = goldenLines<Line>('prompt_schedule');
  for (const [prompt, steps, hires, want] of lines) {
    const pass = hires === null ? { calls: steps } : { calls: hires, before: steps };
    const got = promptSchedule(prompt, pass).map(({ end, text }) => [end, text]);
    t.same(got, want, `${JSON.stringify(prompt)} in ${hires ?? steps} calls`);
  }
  t.ok(lines.filter(([, , , schedule]) => schedule.length > 1).length > 100);
  t.end();
});

test('a prompt that is all brackets takes no longer than it is long', (t) => {
  for (const text of ['[', '(', '[a|', '[[a:b:', '[a|b]', '[a:b:0.5]']) {
    const prompt = text.repeat(10_000 / text.length);
    const began = performance.now();
    t.equal(promptSchedule(prompt, { calls: 30 })[0].end > 0, true);
    t.ok(performance.now() - began < 2000, text);
  }
  const began = process.cpuUsage().user;
  const number = `[a:${'1'.repeat(30_000)}`;
  t.same(promptSchedule(number, { calls: 30 }), [{ end: 30, text: number }]);
  t.ok(process.cpuUsage().user - began < 2e6, 'a number that nothing closes');
  const endless = 'a'.repeat(2e7); // more letters than a stack has room for choices
  t.equal(promptSchedule(endless, { calls: 30 })[0].text.length, 2e7);
  const deep = (n: number) => `${'['.repeat(n)}a:b:3${']'.repeat(n)}`;
  t.equal(promptSchedule(deep(90), { calls: 9 }).length, 2);
  const far = promptSchedule(`${'('.repeat(5000)}[a:b:3]${')'.repeat(5000)}`, { calls: 9 });
  t.equal(far.length, 2);
  t.end();
});

/** The prompts of the calls, in a word each; of a second pass after one by the sampler `base`. */
function through(name: string, asked: Partial<Asked> & PlanOptions, base = name): string {
  const { denoisingStart, denoisingEnd, strength, ...rest } = asked;
  const prompt = rest.prompt ?? '[a:b:0.5]';
  const request = complete(
    { ratio: 8, sampleSize: 64 },
    { emphasis: 'original', ...rest, prompt, denoising_start: denoisingStart },
  );
  const sampler = createSampler(name);
  const plan = sampler.plan(request.num_inference_steps, { denoisingStart, denoisingEnd, strength });
  const baseOrder = createSampler(base).order;
  const { prompts, at } = promptsThrough(request, { sampler, plan, baseOrder });
  return at.map((i) => prompts[i].prompt?.join('')).join('');
}

test('which call sees what', (t) => {
  const steps = { num_inference_steps: 6 };
  t.equal(through('euler', steps), 'aaaabb', 'the first call is number 0');
  t.equal(through('euler', { ...steps, prompt: '[a|b|c]' }), 'aabcab');
  t.equal(through('euler', { ...steps, emphasis: 'ignore' }), 'aaaabb');
  t.equal(through('heun', steps), 'aaaaaaabbbb', 'calls count, two to a step');
  t.equal(through('heun', { ...steps, prompt: '[a:b:2]' }), 'aaabbbbbbbb');
  t.equal(
    through('pndm', { ...steps, num_inference_steps: 20, prompt: '[a:b:19]' }),
    `${'a'.repeat(20)}${'b'.repeat(9)}`,
    'what is told last stays',
  );
  t.equal(
    through('euler', { ...steps, strength: 0.7 }),
    'aaaa',
    'over a picture the first call done is number 0, as in A1111',
  );
  const part = { ...steps, num_inference_steps: 10 };
  t.equal(through('euler', { ...part, denoisingEnd: 0.8 }), 'aaaaaabb');
  t.equal(
    through('euler', { ...part, denoisingStart: 0.8 }),
    'bb',
    "a refiner's calls go on from the base's",
  );
  t.equal(through('euler', { ...part, denoisingStart: 0.4 }), 'aabbbb');
  const second = { num_inference_steps: 10, strength: 0.61, base_steps: 20 };
  t.equal(through('euler', second), 'bbbbbb', 'in a second pass a share of the first is past');
  t.equal(through('euler', { ...second, prompt: '[a:b:1.5]' }), 'aaaabb');
  t.equal(through('euler', { ...second, prompt: '[a:b:22]' }), 'aaabbb');
  t.equal(through('heun', { ...second, prompt: '[a:b:42]' }), 'aaabbbbbbbb');
  t.equal(
    through('euler', { ...second, prompt: '[a:b:42]' }, 'heun'),
    'aaabbb',
    'calls of the first sampler',
  );
  t.equal(through('heun', { ...second, prompt: '[a:b:22]' }, 'euler'), 'aaabbbbbbbb');
  t.equal(through('euler', { ...steps, emphasis: 'none' }), '[a:b:0.5]'.repeat(6));
  const { prompts } = promptsThrough(
    complete(
      { ratio: 8, sampleSize: 64 },
      { ...steps, emphasis: 'no-norm', prompt: ['a', '[a:b:1]'], prompt_2: 'x', negative_prompt: '[y:2]' },
    ),
    { sampler: createSampler('euler'), plan: createSampler('euler').plan(6), baseOrder: 1 },
  );
  t.same(
    prompts.map(({ prompt, prompt_2, negative_prompt }) => [prompt, prompt_2, negative_prompt].join(' ')),
    ['a,a x,x ,', 'a,b x,x ,', 'a,b x,x y,y'],
  );
  t.end();
});

const plain: Asked = {
  ...{
    prompt: 'a fox',
    width: 16,
    height: 16,
    num_inference_steps: 6,
    guidance_scale: 5,
    emphasis: 'original',
  },
  scheduler: { name: 'euler' },
};
const drawn = (pipeline: Pipeline, more: Partial<Asked>): Promise<Float32Array> =>
  latentsOf(pipeline, { ...plain, generators: [new TorchGenerator(3)], ...more });

function same(t: Test, got: Float32Array, want: Float32Array, what: string): void {
  t.equal(maxDifference(got, want), 0, what);
}

test('pictures whose prompts change', async (t) => {
  const device = openDevice('cpu');
  const before = device.memory.storages;
  const pipeline = pipelineOf('text2img', device);
  const loaded = device.memory.storages;
  // By hand: what the first calls leave goes on under the other text.
  const long = `a hare, ${'in the tall green grass '.repeat(20)}`;
  for (const [from, to, negative] of [
    ['a red fox', 'a (blue:1.3) hare', ['', '']],
    ['a red fox', 'a red fox', ['rain', 'snow, rain']],
    ['a red fox', long, ['rain', 'rain']],
  ] as const) {
    const shared = { max_token_length: 150, num_inference_steps: 10 };
    const [first, then] = negative;
    const edited = await drawn(pipeline, {
      ...{ ...shared, prompt: `[${from}:${to}:4]`, negative_prompt: `[${first}:${then}:0.4]` },
    });
    const half = await denoiseToEnd(pipeline, {
      ...{ ...plain, ...shared, prompt: from, negative_prompt: first, denoising_end: 0.5 },
      generators: [new TorchGenerator(3)],
    });
    t.equal(half.timesteps.length, 5);
    const rest = { prompt: to, negative_prompt: then, latents: half.latents, denoising_start: 0.5 };
    same(t, edited, await drawn(pipeline, { ...shared, ...rest }), 'the picture of two parts');
  }
  const alternating = await drawn(pipeline, { prompt: 'a [fox|hare]', num_inference_steps: 4 });
  const nested = { prompt: 'a [fox:[hare:fox:2]:1]', num_inference_steps: 4 };
  same(t, alternating, await drawn(pipeline, nested), 'a text that comes back');
  t.ok(maxDifference(alternating, await drawn(pipeline, { num_inference_steps: 4 })) > 1e-3);
  const { truncated, ...embeds } = encodePrompt(pipeline, { prompt: 'a [fox:hare:2]', emphasis: 'none' });
  const text = await drawn(pipeline, { prompt: 'a [fox:hare:2]', emphasis: 'none' });
  same(t, text, await drawn(pipeline, { prompt: undefined, ...embeds }), 'text, where weights are not read');
  t.equal(device.memory.storages, loaded);
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
});

test('beside all else that a step does', async (t) => {
  const pipeline = pipelineOf('controlled', openDevice('cpu'));
  const asked: Partial<Asked> = {
    ...{
      pag_scale: 2,
      cache_interval: 2,
      cache_branch_id: 4,
      guidance_rescale: 0.5,
      num_images_per_prompt: 2,
    },
    ...{ control_image: [preprocessControl(picture(1, 16, 16))], control_guidance_end: 0.5 },
  };
  const want = await drawn(pipeline, asked);
  // Of the same tokens, and yet another text.
  const got = await drawn(pipeline, { ...asked, prompt: '[a fox|a  fox]' });
  same(t, got, want, 'a change that says the same changes nothing');
  t.ok(maxDifference(await drawn(pipeline, { ...asked, prompt: '[a fox|a hare]' }), want) > 1e-3);
  pipeline.release();
});

test('sdxl sample, whose text encoders are gone by then', async (t) => {
  const model = join(goldenFolder, 'tiny-sdxl');
  const sample = async (...argv: string[]) => {
    const output = ['--output', at('out.png'), '--save-latents', at('out.safetensors')];
    const size = ['--width', '32', '--height', '32', '--steps', '4', '--seed', '3', '--scheduler', 'euler'];
    const { status, err } = await sdxl('sample', '--model', model, ...size, ...output, ...argv, '--quiet');
    t.equal(status, 0, err);
    return savedLatents(at('out.safetensors'));
  };
  const edited = ['--prompt', 'a [fox:hare:2]', '--negative-prompt', '[rain|snow]', '--emphasis', 'original'];
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  const more = { ...{ prompt: 'a [fox:hare:2]', negative_prompt: '[rain|snow]' }, num_inference_steps: 4 };
  const want = await drawn(pipeline, { ...more, width: 32, height: 32 });
  pipeline.release();
  same(t, await sample(...edited), want, 'is as in a program');
  const hires = ['--hires', '--hires-scale', '1.5', '--hires-steps', '3', '--emphasis', 'original'];
  const second = await sample(...hires, '--prompt', 'a [fox:hare:1.4]');
  t.ok(
    maxDifference(second, await sample(...hires, '--prompt', 'a fox')) > 1e-3,
    'a change in the second pass alone',
  );
  const past = await sample(...hires, '--prompt', 'a [fox:hare:4.0]');
  same(t, past, await sample(...hires, '--prompt', 'a fox'), 'one behind its end');
  const refiner = ['--refiner', join(goldenFolder, 'tiny-sdxl-refiner'), '--denoising-end', '0.5'];
  const handed = await sample(...edited, ...refiner);
  const fixed = await sample(...edited.with(1, 'a hare'), ...refiner);
  t.ok(maxDifference(handed, fixed) > 1e-4);
});
