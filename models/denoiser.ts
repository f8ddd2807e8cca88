// The UNet as the sampler sees it: a function of scaled latents and a timestep, under guidance. What stays over an image is
// done once: the prompts are encoded, their keys and values kept, and one pass becomes a step of the device, which a GPU
// replays from a recording.
import { noGrad } from '../engine/grad.ts';
import { unload } from '../engine/module.ts';
import { keep, scope } from '../engine/scope.ts';
import { empty, tensor } from '../engine/tensor.ts';
import { encodePrompts } from './conditioning.ts';
import { channelsLast, guide, toHost } from './latents.ts';
import type { Pipeline, Request } from './pipeline.ts';
import { newContextCache } from './unet.ts';

export interface Denoiser {
  /** The network's output at latents x [n, c, h, w], guided. */
  predict(x: Float32Array, timestep: number): Float32Array;
  /** Prompt text past the 77 tokens. */
  truncated: string[];
  release(): void;
}

/** `shape` is the latents' [n, c, h, w], `ids` the rows of time ids. */
export function openDenoiser(
  pipeline: Pipeline,
  request: Request,
  shape: readonly number[],
  ids: number[][],
  guided: boolean,
): Denoiser {
  const { device, dtype } = pipeline;
  const [images, c, h, w] = shape;
  const rows = guided ? 2 * images : images;
  const copies = request.num_images_per_prompt ?? 1;
  const cache = newContextCache();
  const made = noGrad(() =>
    scope(() => {
      const encoded = encodePrompts(pipeline.text, request, { guided, copies, device, dtype });
      const inputs = {
        context: encoded.context,
        pooled: encoded.pooled,
        timeIds: tensor(ids.flat(), [ids.length, ids[0].length], { device }),
        sample: empty([rows, h, w, c], { device, dtype }),
        times: empty([rows], { device }),
      };
      for (const t of Object.values(inputs)) keep(t);
      return { ...inputs, truncated: encoded.truncated };
    }),
  );
  if (request.last) {
    for (const { encoder } of pipeline.text.encoders) unload(encoder);
    device.memory.trim();
  }
  const { context, pooled, timeIds, sample, times, truncated } = made;
  const conditioning = { context, textEmbeds: pooled, timeIds, cache };
  const step = device.step(() => noGrad(() => pipeline.unet(sample, times, conditioning)));
  return {
    predict(x, timestep) {
      const doubled = guided ? new Float32Array(2 * x.length) : x;
      if (guided) for (const at of [0, x.length]) doubled.set(x, at);
      sample.set(channelsLast({ shape: [rows, c, h, w], data: doubled }));
      times.set(new Float32Array(rows).fill(timestep));
      const { data } = step.run(toHost);
      return guided ? guide(data, images, request.guidance_scale, request.guidance_rescale ?? 0) : data;
    },
    truncated,
    release() {
      step.release();
      cache.release();
      for (const t of [context, pooled, timeIds, sample, times]) t.release();
    },
  };
}
