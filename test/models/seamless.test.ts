// Pictures without seams (golden/seamless.jsonl, diffusers' pipelines whose convolutions torch pads in circles): latents and pixels. That
// one drawn from noise moved around is moved around, that nothing is left of it in the model, and `sdxl sample`.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { readPicture } from '../../io/image.ts';
import { readPngText } from '../../io/png.ts';
import { decode, denoiseToEnd } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import { decodeLatents, type Latents } from '../../models/vae/latents.ts';
import { refusesEach, sdxl } from '../support/command_line.ts';
import { allClose, goldenFolder, goldenLines, maxDifference } from '../support/golden.ts';
import { at, type Call, latentsOf, pipelineOf, testCalls } from '../support/golden_calls.ts';
import { nonEmpty } from '../support/non_empty.ts';

interface Drawn extends Call {
  pixels: { atol: number; values: string };
}
const golden = goldenLines<Drawn>('seamless');
testCalls(golden, 5, 0);

const [height, width] = [8, 16];
const seeded = (more: Partial<Asked>): Asked => ({
  ...{ prompt: 'a red fox in the snow', width: 8 * width, height: 8 * height, num_inference_steps: 3 },
  ...{ generators: [new TorchGenerator(3)], ...more },
});

test('pixels', async (t) => {
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  for (const { settings, seed, pixels } of nonEmpty(golden.filter(({ kind }) => kind === 'text2img'))) {
    const { seamless, num_images_per_prompt: n = 1 } = settings;
    const asked = { ...settings, scheduler: undefined, width: 64, height: 64 };
    const data = await latentsOf(pipeline, { ...asked, generators: [new TorchGenerator(Number(seed))] });
    const made = decodeLatents(pipeline.vae, { shape: [n, 4, 8, 8], data }, { seamless }).data;
    const want = decodeFloats(Buffer.from(pixels.values, 'base64'), 'float32');
    const some = made.filter((_, i) => i % 50 === 0);
    allClose(t, `${seamless}`, some, want, { atol: pixels.atol, rtol: 0 });
  }
  pipeline.release();
});

/** Planes moved around to the right and down. */
function moved({ shape, data }: Latents, right: number, down: number): Latents {
  const [, , h, w] = shape;
  const from = (i: number) => {
    const [plane, y, x] = [Math.floor(i / (h * w)), Math.floor(i / w) % h, i % w];
    return (plane * h + ((y - down + h) % h)) * w + ((x - right + w) % w);
  };
  return { shape, data: data.map((_, i) => data[from(i)]) };
}

test('a pattern has no place where it begins', async (t) => {
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  const shape = [1, 4, height, width];
  const noise = { shape, data: new TorchGenerator(5).randn(4 * height * width) as Float32Array };
  const drawn = async (latents: Latents, more: Partial<Asked>) => ({
    shape,
    data: await latentsOf(pipeline, seeded({ latents, ...more })),
  });
  const plain = await drawn(noise, {});
  // The UNet halves sides twice, so whole blocks of four latents are moved.
  for (const [seamless, right, down] of [
    ['xy', 12, 4],
    ['x', 8, 0],
    ['y', 0, 4],
  ] as const) {
    for (const cache_interval of [1, 2]) {
      const here = await drawn(noise, { seamless, cache_interval });
      const there = await drawn(moved(noise, right, down), { seamless, cache_interval });
      t.ok(maxDifference(there.data, moved(here, right, down).data) < 1e-4, `${seamless} ${cache_interval}`);
      const pixels = (latents: Latents) => decodeLatents(pipeline.vae, latents, { seamless });
      const want = moved(pixels(here), 8 * right, 8 * down).data;
      t.ok(maxDifference(pixels(moved(here, right, down)).data, want) < 1e-4, `pixels ${seamless}`);
      t.ok(maxDifference(here.data, plain.data) > 1e-3, 'which it has otherwise');
    }
  }
  t.equal(
    maxDifference((await drawn(noise, {})).data, plain.data),
    0,
    'the next picture has its edges again',
  );
  pipeline.release();
});

test('sdxl sample, with a preview, and its picture again by its settings', async (t) => {
  const model = ['--model', join(goldenFolder, 'tiny-sdxl'), '--prompt', 'a red fox in the snow'];
  const size = ['--width', '128', '--height', '64', '--steps', '3', '--seed', '3'];
  const look = ['--preview', 'vae', '--preview-path', at('look.png')];
  const drawn = (...argv: string[]) => sdxl('sample', ...argv, '--quiet');
  const { status, err } = await drawn(
    ...model,
    ...size,
    ...look,
    '--seamless',
    'xy',
    '--output',
    at('x.png'),
  );
  t.equal(status, 0, err);
  const pipeline = pipelineOf('text2img', openDevice('cpu'));
  const request = seeded({ seamless: 'xy' });
  const { latents } = await denoiseToEnd(pipeline, request);
  const [{ data }] = decode(pipeline, latents, request);
  pipeline.release();
  t.same(Buffer.from((await readPicture(at('x.png'))).data), Buffer.from(data));
  t.same(
    Buffer.from((await readPicture(at('look.png'))).data),
    Buffer.from(data),
    'the last preview is the picture',
  );
  t.match(readPngText(at('x.png')).parameters, /, Tiling: True,/);
  t.equal((await drawn('--from', at('x.png'), '--output', at('y.png'))).status, 0);
  t.ok(readFileSync(at('y.png')).equals(readFileSync(at('x.png'))));
  await refusesEach(t, (...argv) => drawn(...model, ...size, ...argv), [
    [['--seamless', 'z'], /--seamless/],
    [['--seamless', 'xy', '--vae-tiling'], /--vae-tiling \(vae_tiling\) codes tiles/],
  ]);
});
