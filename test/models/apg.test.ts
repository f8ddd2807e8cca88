// Adaptive projected guidance against diffusers' guider in whole calls (golden/apg.jsonl), and by hand; what it goes with, `sdxl sample`, and
// what is refused. Recorded steps: cuda_recorded.test.ts.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { preprocess } from '../../io/image.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import type { Asked } from '../../models/request.ts';
import { projection } from '../../models/unet/apg.ts';
import { refusesEach } from '../support/command_line.ts';
import { picture } from '../support/controlnet_golden.ts';
import { goldenLines, maxDifference } from '../support/golden.ts';
import {
  type Call,
  latentsOf,
  pipelineOf,
  sampleSmall,
  seeded,
  testCalls,
  testSample,
} from '../support/golden_calls.ts';
import { writeTold } from '../support/told_golden.ts';

testCalls(goldenLines<Call>('apg'), 4, 3);

const apg = { momentum: -0.5, rescale: 1, eta: 0 };
test('by hand: each image has a length, a direction and a sum of its own', (t) => {
  const guide = projection({ momentum: -0.5, rescale: 5, eta: 0.5 }, 2, [3, 2, 1, 1]);
  // Of each image [rest, change, text]; the last has neither change nor text, of which the length is 0.
  const said = (changes: number[], texts: number[]) =>
    Float32Array.of(...[1, 1, 2, 2, 3, 3], ...changes, ...texts);
  const first = guide(said([6, 8, 3, 4, 0, 0], [7, 0, 0, -1, 0, 0]));
  // (6, 8) is cut to (3, 4), of which 3 lies along the text; of (3, 4), just as long as may be, 4 does.
  t.same([...first], [1 + 2 * 1.5, 1 + 2 * 4, 2 + 2 * 3, 2 + 2 * 2, 3, 3, ...[7, 0, 0, -1, 0, 0]]);
  const second = guide(said([3, 7, 1.5, 2, 1, 0], [7, 0, 1, 0, 1, 0]));
  // What was summed is not what was cut: (3, 7) - (6, 8) / 2 is (0, 3); (1.5, 2) - (3, 4) / 2 is nothing.
  t.same([...second.subarray(0, 6)], [1, 1 + 2 * 3, 2, 2, 3 + 2 * 0.5, 3]);
  t.end();
});

test('numbers that leave guidance as it is, and what it goes with', async (t) => {
  const device = openDevice('cpu');
  const before = device.memory.storages;
  const pipeline = pipelineOf('text2img', device);
  const drawn = (more: Partial<Asked>) => latentsOf(pipeline, seeded(more));
  const plain = await drawn({});
  const none = await drawn({ adaptive_projected_guidance: { momentum: 0, rescale: 0, eta: 1 } });
  t.ok(maxDifference(none, plain) < 1e-4, 'but for rounding');
  const projected = await drawn({ adaptive_projected_guidance: apg });
  t.ok(maxDifference(projected, plain) > 0.1);
  t.equal(maxDifference(await drawn({ adaptive_projected_guidance: apg }), projected), 0, 'sums begin anew');
  const off = { guidance_start: 0.5, guidance_stop: 0.5, adaptive_projected_guidance: apg };
  t.ok(maxDifference(await drawn(off), await drawn({ guidance_scale: 1 })) < 1e-5, 'calls without guidance');
  const caching = { cache_interval: 2, cache_branch_id: 8 };
  const cached = await drawn({ adaptive_projected_guidance: apg, ...caching });
  t.ok(maxDifference(cached, projected) < maxDifference(cached, plain), 'DeepCache');
  t.ok(maxDifference(cached, await drawn(caching)) > 0.1, 'each has its part');
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
});

testSample(
  ['--negative-prompt', 'rain', '--apg', '--apg-momentum', '-0.25', '--apg-rescale', '1'],
  seeded({ adaptive_projected_guidance: { momentum: -0.25, rescale: 1, eta: 0 } }),
);

test('mistakes', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'sdxl-apg-'));
  const told = writeTold(join(folder, 'told'));
  await refusesEach(t, sampleSmall, [
    [['--apg-eta', '0'], /--apg-eta needs --apg, which it is a number of: give it, or leave both out/],
    [['--apg', '--apg-momentum', '-2'], /--apg-momentum takes a number from -1 to 1, not "-2"/],
    [['--apg', '--apg-rescale', '-1'], /--apg-rescale takes a number from 0/],
    [
      ['--apg', '--guidance-scale', '1'],
      /at a guidance_scale \(--guidance-scale\) of 1 there is none: give more/,
    ],
    [['--apg', '--model', told], /\(--apg\) projects guidance, and this UNet is told its guidance/],
  ]);
  const device = openDevice('cpu');
  const refuses = async (pipeline: ReturnType<typeof pipelineOf>, more: object, message: RegExp) => {
    const asked = seeded({ adaptive_projected_guidance: apg, ...more });
    await t.rejects(latentsOf(pipeline, asked), { name: 'UserError', message });
  };
  const pipeline = pipelineOf('text2img', device);
  for (const wrong of [
    { eta: 1 },
    { ...apg, start: 1 },
    { ...apg, momentum: 2 },
    { ...apg, rescale: -1 },
    true,
  ])
    await refuses(
      pipeline,
      { adaptive_projected_guidance: wrong },
      /^adaptive_projected_guidance is .*: give \{ momentum, rescale, eta \}: a number from -1 to 1, one from 0, and any$/,
    );
  await refuses(
    pipeline,
    { guidance_scale: 0.5 },
    /of 0\.5 there is none: give more than 1, or leave it out$/,
  );
  const others = [
    [loadPipeline(openModel(told), { device, dtype: 'float32' }), {}, /this UNet is told its guidance/],
    [
      pipelineOf('instruct_pix2pix', device),
      { image: preprocess(picture(4, 64, 64)) },
      /takes no adaptive_projected_guidance \(--apg\): leave it out/,
    ],
  ] as const;
  for (const [other, more, message] of others) await refuses(other, more, message);
  for (const each of [pipeline, ...others.map(([other]) => other)]) each.release();
  rmSync(folder, { recursive: true, force: true });
});
