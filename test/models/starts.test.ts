// Calls that begin with latents of a caller's own, as noise or as the picture, against diffusers (golden/starts.jsonl).
import { join } from 'node:path';
import { test } from 'tap';
import { decodeFloats } from '../../io/dtype.ts';
import { preprocess, preprocessMask } from '../../io/image.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { denoiseToEnd, loadPipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import type { Latents } from '../../models/vae/latents.ts';
import { disc, picture } from '../support/controlnet_golden.ts';
import { allClose, goldenFolder, goldenLines } from '../support/golden.ts';
import { devices } from '../support/models_golden.ts';

interface Call {
  kind: 'text2img' | 'img2img' | 'inpaint';
  /** A seed and rows of its noise, or a picture's numbers. */
  inputs: {
    latents?: [seed: number, rows: number];
    image?: [seed: number, rows: number] | [seed: number, width: number, height: number];
    mask?: boolean;
  };
  settings: Omit<Partial<Asked>, 'scheduler'> & { scheduler?: string };
  seed: number;
  atol: number;
  values: string;
}

const noise = (seed: number, rows: number): Latents => ({
  shape: [rows, 4, 8, 8],
  data: new TorchGenerator(seed).randn(rows * 4 * 8 * 8),
});

function requestOf({ kind, inputs: { latents, image, mask }, settings, seed }: Call): Asked {
  const [first, second, third] = image ?? [];
  const over =
    third === undefined ? undefined : preprocess(picture(first as number, second as number, third));
  const { scheduler, ...more } = settings;
  return {
    ...{
      prompt: 'a red fox in the snow',
      negative_prompt: 'rain',
      num_inference_steps: 6,
      guidance_scale: 5,
    },
    // Latents say their size themselves.
    ...(kind === 'inpaint' && { width: 64, height: 64 }),
    ...more,
    scheduler: { name: scheduler },
    generators: [new TorchGenerator(seed)],
    latents: latents && noise(...latents),
    image: over ?? (image && noise(image[0], image[1])),
    mask: mask ? preprocessMask(disc()) : undefined,
  };
}

const calls = goldenLines<Call>('starts');

test("latents of a caller's own", async (t) => {
  const [device] = devices;
  const before = device.memory.storages;
  const pipeline = loadPipeline(openModel(join(goldenFolder, 'tiny-sdxl')), { device, dtype: 'float32' });
  t.equal(calls.length, 6);
  for (const call of calls) {
    const { latents } = await denoiseToEnd(pipeline, requestOf(call));
    const want = decodeFloats(Buffer.from(call.values, 'base64'), 'float32');
    const { kind, inputs, settings, atol } = call;
    allClose(t, JSON.stringify({ kind, inputs, settings }), latents.data, want, { atol, rtol: 0 });
  }
  pipeline.release();
  t.equal(device.memory.storages, before, 'live tensors');
});
