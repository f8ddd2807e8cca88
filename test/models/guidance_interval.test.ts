// Guidance in some of the calls (golden/guidance_interval.jsonl, diffusers' pipelines and the interval of its guiders): whole calls. That no
// interval is none, that it goes with DeepCache and IP-Adapters, and `sdxl sample`. Recorded steps: cuda_recorded.test.ts.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { preprocess, preprocessControl } from '../../io/image.ts';
import type { Asked } from '../../models/request.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { savedLatents } from '../support/contents.ts';
import { picture } from '../support/controlnet_golden.ts';
import { goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import {
  at,
  type Call,
  type Kind,
  latentsOf,
  pipelineOf,
  seeded,
  testCalls,
} from '../support/golden_calls.ts';

testCalls(goldenLines<Call>('guidance_interval'), 8, 2);

const inputs: Partial<Record<Kind, Partial<Asked>>> = {
  text2img: { pag_scale: 2 },
  controlled: { control_image: [preprocessControl(picture(1, 64, 64))] },
  adapted: { ip_adapter_image: [picture(1, 117, 149)] },
  instruct_pix2pix: { image: preprocess(picture(4, 64, 64)) },
};
test('an interval of nothing is no guidance, and one of all is the whole of it', async (t) => {
  const device = openDevice('cpu');
  const before = device.memory.storages;
  for (const [kind, more] of Object.entries(inputs)) {
    const pipeline = pipelineOf(kind as Kind, device);
    const drawn = (others: Partial<Asked>) => latentsOf(pipeline, seeded({ ...more, ...others }));
    const [none, all] = [await drawn({ guidance_scale: 1 }), await drawn({})];
    // Fewer rows in a product may be summed in another order.
    const apart = maxDifference(await drawn({ guidance_start: 0.5, guidance_stop: 0.5 }), none);
    t.ok(apart < 1e-5, `${kind}: ${apart}`);
    t.equal(maxDifference(await drawn({ guidance_start: 0, guidance_stop: 1 }), all), 0, kind);
    t.ok(maxDifference(await drawn({ guidance_stop: 0.5 }), all) > 1e-3, kind);
    pipeline.release();
  }
  t.equal(device.memory.storages, before, 'live tensors');
});

test('what deep layers gave of other rows is not taken', async (t) => {
  const pipeline = pipelineOf('adapted', openDevice('cpu'));
  const drawn = (more: Partial<Asked>) =>
    latentsOf(pipeline, seeded({ ...inputs.adapted, num_inference_steps: 10, cache_interval: 100, ...more }));
  // By hand: the first call without guidance is a whole one, as the first of a picture is.
  const shape = [1, 4, 8, 8];
  const half = { shape, data: await drawn({ denoising_end: 0.5 }) };
  const want = await drawn({ latents: half, denoising_start: 0.5, guidance_scale: 1 });
  t.ok(maxDifference(await drawn({ guidance_stop: 0.5 }), want) < 1e-5);
  const late = { shape, data: await drawn({ denoising_end: 0.5, guidance_scale: 1 }) };
  const then = await drawn({ latents: late, denoising_start: 0.5 });
  t.ok(maxDifference(await drawn({ guidance_start: 0.5 }), then) < 1e-5);
  pipeline.release();
});

test('sdxl sample, and its picture again by its settings', async (t) => {
  const model = join(goldenFolder, 'tiny-sdxl');
  const size = ['--width', '64', '--height', '64', '--steps', '4', '--seed', '3'];
  const prompt = ['--prompt', 'a red fox in the snow', '--negative-prompt', 'rain'];
  const interval = ['--guidance-start', '0.25', '--guidance-stop', '0.75'];
  const files = ['--output', at('x.png'), '--save-latents', at('x.safetensors')];
  const { status, err } = await sdxl(
    'sample',
    '--model',
    model,
    ...size,
    ...prompt,
    ...interval,
    ...files,
    '--quiet',
  );
  t.equal(status, 0, err);
  const saved = savedLatents(at('x.safetensors'));
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  const want = await latentsOf(pipeline, seeded({ guidance_start: 0.25, guidance_stop: 0.75 }));
  pipeline.release();
  t.equal(maxDifference(saved, want), 0);
  t.equal((await sdxl('sample', '--from', at('x.png'), '--output', at('y.png'), '--quiet')).status, 0);
  t.ok(readFileSync(at('y.png')).equals(readFileSync(at('x.png'))));
  await refusesEach(t, (...argv) => sdxl('sample', '--model', model, ...size, ...prompt, ...argv), [
    [['--guidance-start', '0.8', '--guidance-stop', '0.2'], /guidance_start \(--guidance-start\) is 0.8 and/],
    [['--guidance-stop', '2'], /--guidance-stop/],
  ]);
});
