// Whole pipelines against diffusers (golden area pipeline): latents after the recorded steps, time ids, and pixels.
import { join } from 'node:path';
import { test } from 'tap';
import type { Picture } from '../io/image.ts';
import { openModel } from '../models/checkpoint.ts';
import { createPipeline, type Generated, type GenerateOptions, type Latents } from '../models/pipeline.ts';
import type { SchedulerConfig } from '../models/samplers/config.ts';
import { allClose, type GoldenCase, goldenArea, goldenFolder } from './golden.ts';

const area = goldenArea('pipeline');
const load = (name: string) => createPipeline(openModel(join(goldenFolder, name)));
const base = load('tiny-sdxl');
const refiner = load('tiny-sdxl-refiner');

const names: Record<string, keyof GenerateOptions> = {
  prompt_2: 'prompt2',
  negative_prompt: 'negativePrompt',
  negative_prompt_2: 'negativePrompt2',
  num_inference_steps: 'steps',
  guidance_scale: 'guidanceScale',
  guidance_rescale: 'guidanceRescale',
  num_images_per_prompt: 'imagesPerPrompt',
  clip_skip: 'clipSkip',
  original_size: 'originalSize',
  crops_coords_top_left: 'cropsCoordsTopLeft',
  target_size: 'targetSize',
  negative_original_size: 'negativeOriginalSize',
  negative_crops_coords_top_left: 'negativeCropsCoordsTopLeft',
  negative_target_size: 'negativeTargetSize',
  denoising_end: 'denoisingEnd',
  denoising_start: 'denoisingStart',
  aesthetic_score: 'aestheticScore',
  negative_aesthetic_score: 'negativeAestheticScore',
};

function optionsOf(settings: Record<string, unknown>, seed: unknown): GenerateOptions {
  const { scheduler, ...rest } = settings;
  const options = Object.fromEntries(Object.entries(rest).map(([key, value]) => [names[key] ?? key, value]));
  const chosen = scheduler as { class: string; config: Partial<SchedulerConfig> } | undefined;
  const sampling = chosen && { scheduler: chosen.class, schedulerConfig: chosen.config };
  return { ...options, ...sampling, seed } as unknown as GenerateOptions;
}

function picture(name: string): Picture {
  const [height, width] = area.shape(name);
  return { width, height, channels: 3, data: area.bytes(name) };
}

async function runCase(c: GoldenCase): Promise<{ steps: Latents[]; made: Generated; refined?: Generated }> {
  const steps: Latents[] = [];
  const onStep = ({ latents }: { latents: Latents }) => void steps.push(latents);
  const options = { ...optionsOf(c.settings ?? {}, c.seed), onStep };
  if (c.inputs?.image) options.image = picture(c.inputs.image);
  if (c.inputs?.mask_image) {
    const [height, width] = area.shape(c.inputs.mask_image);
    options.mask = { width, height, channels: 1, data: area.bytes(c.inputs.mask_image) };
  }
  const made = await (c.pipeline === 'tiny-sdxl' ? base : refiner).generate(options);
  if (!c.refiner_settings) return { steps, made };
  const second = optionsOf(c.refiner_settings as Record<string, unknown>, c.seed);
  const refined = await refiner.generate({
    ...second,
    onStep,
    image: made.latents,
    generators: made.generators,
  });
  return { steps, made, refined };
}

for (const c of area.cases) {
  test(c.id, async (t) => {
    const before = base.device.memory.storages;
    const { steps, made, refined } = await runCase(c);
    const { expect } = c;
    const wanted = (c.latents_steps as number[]).flatMap((i) => [...(steps[i]?.data ?? [])]);
    const exact = { atol: 0, rtol: 0 };
    allClose(t, 'latents', wanted, area.floats(expect.latents.tensor), expect.latents);
    allClose(t, 'time ids', made.timeIds.flat(), area.floats(expect.time_ids.tensor), exact);
    allClose(
      t,
      'timesteps',
      made.timesteps,
      area.floats(expect.scheduler_timesteps.tensor),
      expect.scheduler_timesteps,
    );
    if (refined)
      allClose(
        t,
        'refiner time ids',
        refined.timeIds.flat(),
        area.floats(expect.refiner_time_ids.tensor),
        exact,
      );
    const final = (refined ?? made).latents;
    const want = area.bytes(expect.image_uint8.tensor);
    const got = (refined ? refiner : base).decode(final).flatMap(({ data }) => [...data]);
    allClose(t, 'pixels within one', got, want, { atol: 1, rtol: 0 });
    const differ = got.filter((value, i) => value !== want[i]).length;
    t.ok(differ <= 0.001 * want.length, `${differ} of ${want.length} pixel values differ`);
    t.equal(base.device.memory.storages, before, 'no tensor is left over');
  });
}
