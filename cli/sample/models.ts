// The models of calls of `sdxl sample` and `sdxl grid` in turn: the text encoders say what they have to say of all prompts and leave the
// device, then the UNet and the VAE come. So a call shares its memory with none of the encoders' 1.5 GiB, however many pictures it draws.
import type { Device } from '../../engine/device.ts';
import { built } from '../../engine/scope.ts';
import type { FloatDType } from '../../io/dtype.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { type LoadOptions, type Part, parts, textParts } from '../../models/load_options.ts';
import type { AdapterFile } from '../../models/lora/lora.ts';
import { isGuided, loadPipeline, type Pipeline } from '../../models/pipeline.ts';
import { planOf, promptsThrough } from '../../models/plan.ts';
import { encodePrompt } from '../../models/prompts.ts';
import type { Request } from '../../models/request.ts';
import { parseSchedulerConfig } from '../../models/samplers/config_checks.ts';
import { type PromptEmbeds, type Prompts, textKey } from '../../models/text/conditioning.ts';
import { loadTextualInversion } from '../../models/text/textual_inversion.ts';
import { parseUNetConfig } from '../../models/unet/unet.ts';
import { inOneLine } from '../terminal.ts';
import { type SampleOptions, textualInversionOf } from './options.ts';
import { plannedSecond } from './request.ts';

/** What a pipeline is loaded with beside its model. */
export type Under = Partial<Pick<LoadOptions, 'controlnet' | 'adapter' | 'ipAdapter' | 'lora'>>;

/** The options by which a model is opened, once it is found. */
export const openingOptions = ['vaeDtype', 'q8', 'fp8', 'textualInversion'] as const;

/** Where a model is loaded, and how. */
export interface Place {
  options: Pick<SampleOptions, (typeof openingOptions)[number]>;
  device: Device;
  dtype: FloatDType;
  vaeSource?: ModelSource;
}

/** What loads it for a call. */
interface Caller {
  /** Hears of text past the tokens that are read. */
  tell(cut: readonly string[]): void;
  /** Adds up what loading and encoding take. */
  timed<R>(part: 'load' | 'sample', fn: () => R): Promise<R>;
}

/** Tells of text that is cut off, of each once for all models. */
export function onceOf(warn: (line: string) => void) {
  const told = new Set<string>();
  return (cut: readonly string[], before?: () => void): void => {
    for (const text of cut.filter((each) => !told.has(each))) {
      told.add(text);
      before?.();
      warn(
        `the prompt has more tokens than are read; this part was cut off (--max-token-length reads more): "${inOneLine(text)}"`,
      );
    }
  };
}

/** The most prompts that are encoded ahead: each takes 1.3 MB of the host's memory. For more the encoders stay. */
const MOST_AHEAD = 1000;

/** What a model is opened for: requests, perhaps with adapters for each, and what their second passes go by. */
export interface Wanted {
  options: SampleOptions;
  requests: readonly Request[];
  adapters?: readonly (readonly AdapterFile[])[];
}

/**
 * Opens a model for calls, with the adapters of the first request where there are some for each: release its pipeline when done.
 * @throws UserError
 */
export async function openFor(
  source: ModelSource,
  wanted: readonly Wanted[],
  place: Place & Caller,
  others: Under = {},
): Promise<Pipeline> {
  const { timed } = place;
  const lora = wanted[0].adapters?.[0] ?? [];
  const under = { ...others, lora };
  const told = toldBy(source, wanted);
  if (!told) return timed('load', () => openPipeline(source, place, under));
  const texts = await timed('load', () => openPipeline(source, place, { lora }, textParts(source)));
  let encoded: Encoded;
  try {
    encoded = await timed('sample', () => inEmbeddings(texts, told, place));
  } finally {
    texts.release();
  }
  const pipeline = await timed('load', () => openPipeline(source, place, under, ['unet', 'vae']));
  let said = encoded.get(keyOf(lora));
  return {
    ...pipeline,
    text: {
      ...pipeline.text,
      get encoded() {
        return said;
      },
    },
    setAdapters(files) {
      pipeline.setAdapters(files);
      said = encoded.get(keyOf(files));
    },
  };
}

type Told = Prompts & { guided: boolean };

/** What the encoders say by the texts' keys, by the adapters that they say it with. */
type Encoded = ReadonlyMap<string, ReadonlyMap<string, PromptEmbeds>>;

const keyOf = (adapters: readonly AdapterFile[]): string => JSON.stringify(adapters);

/** Texts by their keys, and the adapters that they are told with. */
interface Group {
  lora: readonly AdapterFile[];
  told: Map<string, Told>;
}

/** What a model is told in the passes of requests, once each; undefined where that is too much to be encoded ahead. */
function toldBy(source: ModelSource, wanted: readonly Wanted[]): Group[] | undefined {
  const scheduler = parseSchedulerConfig(source.config('scheduler'));
  const unetConfig = parseUNetConfig(source.config('unet'));
  const groups = new Map<string, Group>();
  for (const { options, requests, adapters } of wanted) {
    const asked = requests.map((request, i) => {
      const lora = adapters?.[i] ?? [];
      return [keyOf(lora) + textKey(request, isGuided(unetConfig, request)), { request, lora }] as const;
    });
    const once = new Map(asked);
    if (once.size > MOST_AHEAD) return undefined;
    for (const { request, lora } of once.values()) {
      const group = groups.get(keyOf(lora)) ?? { lora, told: new Map() };
      groups.set(keyOf(lora), group);
      for (const pass of options.hires ? [request, plannedSecond(options, request, request)] : [request]) {
        const guided = isGuided(unetConfig, pass);
        for (const prompts of promptsThrough(pass, planOf({ scheduler, unetConfig }, pass)).prompts)
          group.told.set(textKey(prompts, guided), { ...prompts, guided });
      }
    }
  }
  const all = [...groups.values()];
  return all.reduce((sum, { told }) => sum + told.size, 0) > MOST_AHEAD ? undefined : all;
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
      ...{ device, dtype, only, vaeSource, vaeDtype, q8: options.q8, fp8: options.fp8 },
      ...under,
    });
    if (only.includes('text_encoder_2'))
      for (const { file, token } of (options.textualInversion ?? []).map(textualInversionOf))
        loadTextualInversion(pipeline, file, token);
    return pipeline;
  });

/** What the text encoders say of all that is told. */
function inEmbeddings(texts: Pipeline, groups: readonly Group[], { tell }: Caller): Encoded {
  const encodedOf = ({ prompt, prompt_2, negative_prompt, negative_prompt_2, ...others }: Told) => {
    const { max_token_length, clip_skip, emphasis, guided } = others;
    const negative = guided ? { negative_prompt, negative_prompt_2 } : {};
    const { truncated, ...embeds } = encodePrompt(texts, {
      ...{ prompt, prompt_2, ...negative, max_token_length, clip_skip, emphasis },
    });
    tell(truncated);
    return embeds;
  };
  return new Map(
    groups.map(({ lora, told }) => {
      texts.setAdapters(lora);
      return [keyOf(lora), new Map([...told].map(([key, prompts]) => [key, encodedOf(prompts)]))];
    }),
  );
}
