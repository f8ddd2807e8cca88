// The models of a call of `sdxl sample` in turn: the text encoders say what they have to say of all prompts and leave the device, then the
// UNet and the VAE come. So a call shares its memory with none of the encoders' 1.5 GiB, however many pictures it draws.
import type { Device } from '../../engine/device.ts';
import { built } from '../../engine/scope.ts';
import type { FloatDType } from '../../io/dtype.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { type LoadOptions, type Part, parts, textParts } from '../../models/load_options.ts';
import type { AdapterFile } from '../../models/lora/lora.ts';
import { loadPipeline, type Pipeline } from '../../models/pipeline.ts';
import { encodePrompt } from '../../models/prompts.ts';
import type { Request } from '../../models/request.ts';
import { loadTextualInversion } from '../../models/text/textual_inversion.ts';
import { feedForwardToFp8 } from '../../models/unet/fp8.ts';
import { type SampleOptions, textualInversionOf } from './options.ts';

/** What a pipeline is loaded with beside its model. */
export type Under = Partial<Pick<LoadOptions, 'controlnet' | 'adapter' | 'ipAdapter' | 'lora'>>;

/** A model with requests that it can answer. */
export interface Opened {
  pipeline: Pipeline;
  requests: readonly Request[];
}

/** Where a model is loaded, and how. */
export interface Place {
  options: SampleOptions;
  device: Device;
  dtype: FloatDType;
  vaeSource?: ModelSource;
}

/** Who loads it for a call. */
interface Caller {
  /** Hears of text past the tokens that are read. */
  tell(cut: readonly string[]): void;
  /** Adds up what loading and encoding take. */
  timed<R>(part: 'load' | 'sample', fn: () => R): Promise<R>;
}

/** The most prompts that are encoded ahead: each takes 1.3 MB of the host's memory. For more the encoders stay. */
const MOST_AHEAD = 1000;

/**
 * Opens a model for requests, with the adapters of the first where there are some for each: release its pipeline when done.
 * @throws UserError
 */
export async function openFor(
  source: ModelSource,
  requests: readonly Request[],
  place: Place & Caller,
  others: Under = {},
  adapters: readonly (readonly AdapterFile[])[] = [],
): Promise<Opened> {
  const { timed } = place;
  const [lora = []] = adapters;
  const under = { ...others, lora };
  if (new Set(requests.map(({ prompt }) => JSON.stringify(prompt))).size > MOST_AHEAD)
    return { pipeline: await timed('load', () => openPipeline(source, place, under)), requests };
  const texts = await timed('load', () => openPipeline(source, place, { lora }, textParts(source)));
  let encoded: Request[];
  try {
    encoded = await timed('sample', () => inEmbeddings(texts, requests, adapters, place));
  } finally {
    texts.release();
  }
  const pipeline = await timed('load', () => openPipeline(source, place, under, ['unet', 'vae']));
  return { pipeline, requests: encoded };
}

/** A model as the flags want it, or `only` some parts of it. Release it when done. @throws UserError */
export const openPipeline = (
  source: ModelSource,
  { options, device, dtype, vaeSource }: Place,
  under: Under,
  only: readonly Part[] = parts,
): Pipeline =>
  built(() => {
    const vaeDtype = options.vaeDtype === 'auto' ? undefined : options.vaeDtype;
    const pipeline = loadPipeline(source, {
      ...{ device, dtype, only, vaeSource, vaeDtype, q8: options.q8 },
      ...under,
    });
    const inFewBits = () => options.fp8 && only.includes('unet') && feedForwardToFp8(pipeline.unet);
    inFewBits();
    if (only.includes('text_encoder_2'))
      for (const { file, token } of (options.textualInversion ?? []).map(textualInversionOf))
        loadTextualInversion(pipeline, file, token);
    return {
      ...pipeline,
      setAdapters(files) {
        pipeline.setAdapters(files);
        inFewBits();
      },
    };
  });

/** Requests with what the text encoders say in their texts' place; those of the same texts and adapters share it. */
function inEmbeddings(
  texts: Pipeline,
  requests: readonly Request[],
  adapters: readonly (readonly AdapterFile[])[],
  { tell }: Caller,
): Request[] {
  const made = new Map<string, Omit<ReturnType<typeof encodePrompt>, 'truncated'>>();
  return requests.map(({ prompt, prompt_2, negative_prompt, negative_prompt_2, ...others }, i) => {
    const lora = adapters[i] ?? [];
    const { max_token_length, clip_skip, emphasis, guidance_scale } = others;
    // Without guidance nobody reads the negative prompt, nor is the other as long as it.
    const negative = guidance_scale > 1 ? { negative_prompt, negative_prompt_2 } : {};
    const asked = { prompt, prompt_2, ...negative, max_token_length, clip_skip, emphasis };
    const key = JSON.stringify([asked, lora]);
    let embeds = made.get(key);
    if (!embeds) {
      texts.setAdapters(lora);
      const { truncated, ...rest } = encodePrompt(texts, asked);
      tell(truncated);
      embeds = rest;
      made.set(key, embeds);
    }
    return { ...others, ...embeds };
  });
}
