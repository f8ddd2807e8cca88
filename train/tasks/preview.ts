// Pictures while a run trains: the same prompts and settings each time (log/preview_files.ts has their files).
import { UserError } from '../../io/errors.ts';
import type { Picture } from '../../io/pixels.ts';
import { isLLLite } from '../../models/control/controlnet_kinds.ts';
import { checkLLLiteSize } from '../../models/control/lllite.ts';
import { checkSquares } from '../../models/control/t2i_adapter.ts';
import { type Denoised, decode, denoise, denoiseToEnd, type Pipeline } from '../../models/pipeline.ts';
import { samplerFor } from '../../models/plan.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import type { Asked } from '../../models/request.ts';
import type { PromptEmbeds } from '../../models/text/conditioning.ts';
import type { Stop } from '../passes/task.ts';
import type { Preview, PreviewSettings } from '../run/preview_prompts.ts';

/** What ends a preview that the user no longer waits for. */
class Left extends Error {}

/** One picture a preview, or none at all once `stop.asked`. */
export async function samplePreviews(
  pipeline: Pipeline,
  requests: readonly Asked[],
  stop: Stop,
): Promise<Picture[]> {
  const pictures: Picture[] = [];
  const leave = () => {
    if (stop.asked) throw new Left();
  };
  try {
    for (const request of requests) {
      const { latents } = await denoiseToEnd(pipeline, request, leave);
      pictures.push(...decode(pipeline, latents));
    }
  } catch (error) {
    if (error instanceof Left) return [];
    throw error;
  }
  return pictures;
}

/**
 * Previews as requests, for one time: generators go on. `embeds` are the prompts', where the text encoders are gone. `more` is what each
 * is given besides.
 */
export const requestsOf = (
  previews: readonly Preview[],
  embeds?: readonly PromptEmbeds[],
  more: readonly Partial<Asked>[] = [],
): Asked[] =>
  previews.map(({ seed, scheduler, prompt, negative_prompt, ...preview }, i) => ({
    ...preview,
    ...(embeds ? embeds[i] : { prompt, negative_prompt: negative_prompt || undefined }),
    scheduler: { name: scheduler || undefined },
    generators: [new TorchGenerator(seed)],
    ...more[i],
  }));

/** @throws UserError for a scheduler, steps or a size that cannot be, so that it is told now and not at the first preview */
export function checkPreviews(
  pipeline: Pipeline,
  { scheduler: name }: PreviewSettings,
  previews: readonly Preview[],
): void {
  const { ratio, adapter, controlnet } = pipeline;
  samplerFor(pipeline, { scheduler: { name: name || undefined } });
  previews.forEach((preview, i) => {
    samplerFor(pipeline, requestsOf([preview])[0]).plan(preview.num_inference_steps);
    for (const side of ['width', 'height'] as const)
      if (preview[side] % ratio)
        throw new UserError(
          `"previews.prompts[${i}].${side}" is ${preview[side]}, which is not divisible by ${ratio}; ${Math.max(ratio, preview[side] - (preview[side] % ratio))} is`,
        );
    for (const { config } of adapter) checkSquares(config, [preview.height, preview.width]);
    for (const { config } of controlnet.filter(isLLLite))
      checkLLLiteSize(config, [preview.height, preview.width]);
  });
}

/** The most memory that previews take, each kind of them done for a step on a device without numbers. */
export function rehearsePreviews(pipeline: Pipeline, requests: readonly Asked[]): void {
  const kinds = new Map(requests.map((each) => [`${[each.width, each.height, each.guidance_scale]}`, each]));
  for (const request of kinds.values()) {
    const loop = denoise(pipeline, request);
    const { value } = loop.next();
    const { latents } = value;
    loop.return(value as Denoised);
    decode(pipeline, latents);
  }
}
