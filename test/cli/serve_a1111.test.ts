// What A1111's requests have and OpenAI's have not, drawn as `sdxl sample` draws it: second passes, prompts that change, varied noise.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import type { Picture } from '../../io/pixels.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { previewPictures } from '../../models/vae/latents.ts';
import { maxDifference } from '../support/golden.ts';
import { fox, model, pixels, sampledTo, serve, small } from '../support/served.ts';

const folder = mkdtempSync(join(tmpdir(), 'sdxl-serve-a1111-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

const sampled = (...flags: string[]) => sampledTo(join(folder, 'sampled.png'), ...flags);

const shared = serve(...small, '--preview', 'vae');

test('a second pass, by the sampler of the first or another', async (t) => {
  const server = await shared;
  const larger = await server.post('/sdapi/v1/txt2img', {
    ...{
      ...fox,
      enable_hr: true,
      hr_scale: 1.5,
      hr_upscaler: 'Latent',
      hr_second_pass_steps: 0,
      denoising_strength: 0.6,
      ...{ hr_prompt: 'a hare', hr_negative_prompt: 'fog', hr_cfg: 3, hr_sampler_name: 'Use same sampler' },
      hr_scheduler: 'Automatic', // as that of the first pass, which is not said
    },
  });
  const hires = await sampled(
    ...[...small, '--prompt', 'a red fox', '--seed', '5', '--hires', '--hires-scale', '1.5'],
    ...['--hires-denoising-strength', '0.6', '--emphasis', 'original', '--max-token-length', '225'],
    ...['--hires-prompt', 'a hare', '--hires-negative-prompt', 'fog', '--hires-guidance-scale', '3'],
  );
  t.equal(maxDifference((await pixels(larger.body.images[0])).data, hires.picture.data), 0, 'a second pass');
  const other = await server.post('/sdapi/v1/txt2img', {
    ...{ ...fox, sampler_name: 'DDIM', enable_hr: true, hr_scale: 1, denoising_strength: 0.6 },
    ...{ hr_sampler_name: 'DPM++ 2M', hr_scheduler: 'Use same scheduler' },
  });
  const own = await sampled(
    ...[...small, '--prompt', 'a red fox', '--seed', '5', '--hires', '--hires-scale', '1'],
    ...['--scheduler', 'ddim'],
    ...['--hires-denoising-strength', '0.6', '--emphasis', 'original', '--max-token-length', '225'],
    ...['--hires-scheduler', 'DPM++ 2M Karras', '--hires-timestep-spacing', 'linspace'],
  );
  t.equal(
    maxDifference((await pixels(other.body.images[0])).data, own.picture.data),
    0,
    'by another sampler',
  );
});

test('a pattern', async (t) => {
  const { body } = await (await shared).post('/sdapi/v1/txt2img', { ...fox, tiling: true });
  const own = await sampled(
    ...[...small, '--prompt', 'a red fox', '--seed', '5', '--seamless', 'xy'],
    ...['--emphasis', 'original', '--max-token-length', '225'],
  );
  t.equal(maxDifference((await pixels(body.images[0])).data, own.picture.data), 0);
});

test('a preview of a pattern has no edges either', async (t) => {
  const server = await shared;
  const steps = 40; // so that one is seen on its way
  const drawn = server.post('/sdapi/v1/txt2img', { ...fox, steps, tiling: true });
  let ended = false;
  void drawn.then(() => {
    ended = true;
  });
  let seen: string | null = null;
  while (!seen && !ended) seen = (await server.get('/sdapi/v1/progress')).body.current_image;
  t.equal((await drawn).status, 200);
  const pipeline = loadPipeline(openModel(model), { device: openDevice('cpu'), dtype: 'float32' });
  t.teardown(() => pipeline.release());
  const asked = { prompt: fox.prompt, width: 64, height: 64, num_inference_steps: steps };
  const texts = { emphasis: 'original', max_token_length: 225 } as const;
  const [patterns, edged]: string[][] = [[], []];
  const told = (pictures: readonly Picture[]) => Buffer.from(pictures[0].data).toString('base64');
  await denoiseToEnd(
    pipeline,
    { ...asked, ...texts, seamless: 'xy', generators: [new TorchGenerator(fox.seed)] },
    ({ predOriginalSample }) => {
      const latents = predOriginalSample();
      patterns.push(told(previewPictures(pipeline.vae, latents, { seamless: 'xy' })));
      edged.push(told(previewPictures(pipeline.vae, latents, {})));
    },
  );
  const preview = told([await pixels(seen ?? '')]);
  t.ok(patterns.includes(preview) && !edged.includes(preview), 'one of its steps, decoded as a pattern');
});

test('a server changes prompts and varies noise', async (t) => {
  const server = await shared;
  const asked = {
    ...fox,
    prompt: 'a [red|blue] fox',
    negative_prompt: '[rain:snow:0.5]',
    sampler_name: 'Euler',
  };
  const variation = { subseed: 9, subseed_strength: 0.3, seed_resize_from_w: 48, seed_resize_from_h: 96 };
  const varied = await server.post('/sdapi/v1/txt2img', { ...asked, ...variation, steps: 4, batch_size: 2 });
  t.equal(varied.status, 200, varied.body.detail);
  t.match(JSON.parse(varied.body.info), { all_seeds: [5, 5], all_subseeds: [9, 10], subseed_strength: 0.3 });
  const typed = await sampled(
    ...[...small, '--prompt', asked.prompt, '--negative-prompt', asked.negative_prompt, '--seed', '5'],
    ...[
      '--subseed',
      '10',
      '--subseed-strength',
      '0.3',
      '--seed-resize-from-w',
      '48',
      '--seed-resize-from-h',
      '96',
    ],
    ...[
      '--steps',
      '4',
      '--scheduler',
      'Euler Uniform',
      '--timestep-spacing',
      'linspace',
      '--emphasis',
      'original',
    ],
  );
  t.equal(maxDifference((await pixels(varied.body.images[1])).data, typed.picture.data), 0);
  const [plain, none] = [
    {},
    { subseed: 9, subseed_strength: 0, seed_resize_from_w: -1, seed_resize_from_h: 0 },
  ];
  const [want, got] = [
    await server.post('/sdapi/v1/txt2img', { ...asked, ...plain }),
    await server.post('/sdapi/v1/txt2img', { ...asked, ...none }),
  ];
  t.same(got.body.images, want.body.images, 'what clients send anyway');
  t.same(JSON.parse(got.body.info).all_subseeds, [9], 'what counts for nothing comes back');
  t.match(JSON.parse(want.body.info), { all_subseeds: [-1], width: 64, height: 64, steps: 2, cfg_scale: 5 });
  t.equal(await server.end(), 143);
});
