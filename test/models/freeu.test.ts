import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { loadPipeline } from '../../models/pipeline.ts';
import type { Asked } from '../../models/request.ts';
import { lowestWaves } from '../../models/unet/freeu.ts';
import { refusesEach } from '../support/command_line.ts';
import { goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import {
  type Call,
  latentsOf,
  pipelineOf,
  sampleSmall,
  seeded,
  testCalls,
  testSample,
} from '../support/golden_calls.ts';
import { relativeError } from '../support/op_cases.ts';

testCalls(goldenLines<Call>('freeu'), 6, 0);

const freeu = { s1: 0.9, s2: 0.2, b1: 1.3, b2: 1.4 };
test('the waves are those of the frequencies -1 and 0 of both axes', (t) => {
  for (const [h, w, rank] of [
    [1, 1, 1],
    [1, 4, 3],
    [2, 2, 4],
    [3, 2, 6],
    [5, 6, 7],
  ]) {
    const waves = lowestWaves(h, w);
    t.equal(waves.length, rank, `${h}x${w}`);
    let apart = 0;
    for (let p = 0; p < h * w; p++)
      for (let q = 0; q < h * w; q++) {
        const [dy, dx] = [Math.floor(p / w) - Math.floor(q / w), (p % w) - (q % w)];
        // The real part of each frequency's share in what the inverse transform makes of a transform.
        const rows = h > 1 ? [0, -1] : [0];
        const columns = w > 1 ? [0, -1] : [0];
        const want = rows.flatMap((ky) =>
          columns.map((kx) => Math.cos(2 * Math.PI * ((ky * dy) / h + (kx * dx) / w))),
        );
        const got = waves.map((wave) => wave[p] * wave[q]);
        const sum = (values: number[]) => values.reduce((a, b) => a + b, 0);
        apart = Math.max(apart, Math.abs(sum(got) - sum(want)));
      }
    t.ok(apart < 1e-13, `${h}x${w}: ${apart}`);
  }
  t.end();
});

test('ones change nothing, and it goes with DeepCache', async (t) => {
  const device = openDevice('cpu');
  const before = device.memory.storages;
  const pipeline = pipelineOf('text2img', device);
  const plain = await latentsOf(pipeline, seeded());
  const ones = await latentsOf(pipeline, seeded({ freeu: { s1: 1, s2: 1, b1: 1, b2: 1 } }));
  t.equal(maxDifference(ones, plain), 0);
  const freed = await latentsOf(pipeline, seeded({ freeu }));
  // A shallow step takes what the deep layers gave before it was scaled, so one in which all layers run is a whole one.
  const caching = { cache_interval: 2, cache_branch_id: 8 };
  const cached = await latentsOf(pipeline, seeded({ freeu, ...caching }));
  t.ok(maxDifference(cached, freed) < maxDifference(cached, plain));
  t.ok(maxDifference(cached, await latentsOf(pipeline, seeded(caching))) > 1e-3, 'each has its part');
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
});

test('in bfloat16 it is no further from float32 than the model is', async (t) => {
  const drawn = async (dtype: 'float32' | 'bfloat16', more: Partial<Asked>) => {
    const source = openModel(join(goldenFolder, 'tiny-sdxl'));
    const pipeline = loadPipeline(source, { device: openDevice('cpu'), dtype, vaeDtype: 'float32' });
    const latents = await latentsOf(pipeline, seeded({ num_inference_steps: 2, ...more }));
    pipeline.release();
    return latents;
  };
  const error = async (more: Partial<Asked>) =>
    relativeError(await drawn('bfloat16', more), await drawn('float32', more));
  const [freed, plain] = [await error({ freeu }), await error({})];
  t.ok(freed < 2 * plain, `${freed} where the model has ${plain}`);
});

testSample(
  ['--negative-prompt', 'rain', '--freeu', '--freeu-b1', '1.1'],
  seeded({ freeu: { ...freeu, b1: 1.1 } }), // its authors' numbers for SDXL, but for the one that is typed
);

test('mistakes', async (t) => {
  await refusesEach(t, sampleSmall, [
    [['--freeu-s1', '0.9'], /--freeu-s1 needs --freeu/],
    [['--freeu', '--freeu-b2', '-1'], /--freeu-b2 takes a number from 0/],
  ]);
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  for (const wrong of [{ s1: 1 }, { ...freeu, b3: 1 }, { ...freeu, s1: -1 }, true])
    await t.rejects(latentsOf(pipeline, seeded({ freeu: wrong as typeof freeu })), {
      message: /^freeu is .*: give \{ s1, s2, b1, b2 \}, each a number from 0/,
    });
  pipeline.release();
});
