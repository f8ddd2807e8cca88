// Golden area pipeline: diffusers' calls as requests of ours, and the latents of each step.
import { preprocess, preprocessMask } from '../../io/image.ts';
import { type Denoised, denoise, type Pipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked, Request } from '../../models/request.ts';
import type { SchedulerConfig } from '../../models/samplers/config.ts';
import { type GoldenCase, goldenArea } from './golden.ts';

export const area = goldenArea('pipeline');
const list = (value: unknown): string[] | undefined =>
  value === undefined || value === null
    ? undefined
    : Array.isArray(value)
      ? (value as string[])
      : [value as string];

/** A stored picture [h, w, 3] or mask [h, w]. */
function stored(name: string) {
  const shape = area.shape(name);
  const grey = shape.at(-1) !== 3;
  const [height, width] = grey ? shape.slice(-2) : shape.slice(-3);
  return { width, height, channels: grey ? 1 : 3, data: area.bytes(name) };
}

/** What a golden call asks for. */
export function requestOf(c: GoldenCase, settings: Record<string, unknown>): Request {
  const scheduler = settings.scheduler as { class: string; config: Partial<SchedulerConfig> } | undefined;
  const seeds = ([] as number[]).concat(c.seed as number | number[]);
  const request: Request = {
    height: 128,
    width: 128,
    guidance_scale: 5,
    num_inference_steps: 20,
    ...(settings as Partial<Request>),
    prompt: list(settings.prompt) as string[],
    prompt_2: list(settings.prompt_2),
    negative_prompt: list(settings.negative_prompt),
    negative_prompt_2: list(settings.negative_prompt_2),
    generators: seeds.map((seed) => new TorchGenerator(seed)),
    scheduler: scheduler && { name: scheduler.class, config: scheduler.config },
  };
  if (c.inputs?.image) request.image = preprocess(stored(c.inputs.image) as Parameters<typeof preprocess>[0]);
  if (c.inputs?.mask_image) {
    request.mask = preprocessMask(stored(c.inputs.mask_image) as Parameters<typeof preprocessMask>[0]);
  }
  return request;
}

/** Drives the loop and keeps the latents after every step. */
export function run(pipeline: Pipeline, request: Asked): Denoised & { history: Float32Array[] } {
  const history: Float32Array[] = [];
  const loop = denoise(pipeline, request);
  for (;;) {
    const turn = loop.next();
    if (turn.done) return { ...turn.value, history };
    history.push(turn.value.latents.data);
  }
}
