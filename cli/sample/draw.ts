// The drawing of a call: base, perhaps a second pass over each picture enlarged, perhaps a refiner, then pictures. Which models are in
// memory at what time, where steps are told of and where pictures go is the caller's: `sdxl sample` has one model after the other and
// files, `sdxl serve` keeps its models and answers.
import { MemoryError } from '../../engine/memory.ts';
import { decode, type Pipeline } from '../../models/pipeline.ts';
import type { Request } from '../../models/request.ts';
import type { DecodedPicture, Latents } from '../../models/vae/latents.ts';
import type { SampleCall } from './call.ts';
import { enlarged } from './hires_options.ts';
import { pictureText } from './picture_settings.ts';
import { hiresRequest, refinerRequest, seedOf, subseedOf } from './request.ts';
import type { Upscalers } from './upscale_options.ts';

/** What a call draws with. */
export interface Studio {
  base: Pipeline;
  /** The refiner, for such requests; the base may be gone from then on. */
  refiner?(requests: readonly Request[]): Promise<Pipeline>;
  upscalers: Upscalers;
  /** What drives a request's loop in a part of the call, such as "sampling". */
  stage(label: string): (pipeline: Pipeline, request: Request) => Promise<Latents>;
  /** Hears how far a network is with a picture that it enlarges. */
  onTile(done: number, all: number): void;
  warn(line: string): void;
  /** Adds up what the parts take. */
  timed<R>(part: 'load' | 'sample' | 'decode', work: () => R | Promise<R>): Promise<R>;
  /** Takes the pictures of a request as they are finished, with the text that their files carry. */
  add(
    pictures: readonly DecodedPicture[],
    latents: Latents,
    text: Record<string, string>,
    origin: Origin,
  ): Promise<void>;
}

/** What pictures are drawn from. */
export interface Origin {
  seed: number;
  subseed?: number;
  prompt: string;
}

export async function drawCall(call: SampleCall, studio: Studio): Promise<void> {
  const { options, requests, adapters, canvas, larger, seed } = call;
  const { refiner, upscalers, stage, onTile, timed } = studio;
  let pipeline = studio.base;
  const finish = finishing(call, studio, (latents) =>
    decode(pipeline, latents, requests[0]).map(({ finite, ...drawn }) => ({
      ...upscalers.finish(canvas.finish(drawn), { seamless: options.seamless, onTile }),
      finite,
    })),
  );
  const halfway: Latents[] = [];
  const [sampling, again] = [stage('sampling'), stage('second pass')];
  for (const [i, request] of requests.entries()) {
    await timed('load', () => pipeline.setAdapters(adapters[i]));
    let latents = await timed('sample', () => sampling(pipeline, request));
    if (larger) {
      const enlarging = { ...options, how: request, network: upscalers.hires, onTile };
      const second = () =>
        hiresRequest({ options, larger, inputs: canvas.inputs, seed }, requests, i, (draw) =>
          enlarged(pipeline, latents, larger, enlarging, draw),
        );
      latents = await timed('sample', () => again(pipeline, second()));
    }
    if (refiner) halfway.push(latents);
    else await timed('decode', () => finish(i, latents));
  }
  if (!refiner) return;
  const refined = requests.map((request, i) => refinerRequest(options, request, halfway[i]));
  pipeline = await refiner(refined);
  const refining = stage('refining');
  for (const [i, request] of refined.entries()) {
    const latents = await timed('sample', () => refining(pipeline, request));
    await timed('decode', () => finish(i, latents));
  }
}

/** The text that the pictures of a request carry. */
export function textOf(
  { options, requests, typed, seed, sampler, hiresSampler }: SampleCall,
  i: number,
): Record<string, string> {
  const drawn = { ...options, subseed: subseedOf(options, i) };
  const own = seedOf(options, seed, i);
  return pictureText(drawn, { ...requests[i], prompt: [typed[i]] }, own, sampler, hiresSampler);
}

/**
 * Decodes the latents of a request and hands the pictures over; or has them wait for the last request, which frees the UNet, where there
 * is no memory to decode beside it.
 */
function finishing(
  call: SampleCall,
  { warn, add }: Studio,
  finished: (latents: Latents) => DecodedPicture[],
) {
  const { options, requests, typed, seed } = call;
  const finish = (i: number, latents: Latents) => {
    const origin = { seed: seedOf(options, seed, i), subseed: subseedOf(options, i), prompt: typed[i] };
    return add(finished(latents), latents, textOf(call, i), origin);
  };
  const waiting: [number, Latents][] = [];
  return async (i: number, latents: Latents): Promise<void> => {
    const isLast = i === requests.length - 1;
    try {
      if (waiting.length === 0) return await finish(i, latents);
    } catch (error) {
      if (!(error instanceof MemoryError) || isLast) throw error;
      warn('there is no memory to decode beside the UNet, so pictures come when all are sampled');
    }
    waiting.push([i, latents]);
    if (isLast) for (const each of waiting) await finish(...each);
  };
}
