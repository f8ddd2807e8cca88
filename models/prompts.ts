// The prompts of a request as a program gives them, texts or embeddings of its own: what stands for what, the checks, and encodePrompt,
// which makes embeddings of texts, to be kept or mixed.
import { noGrad } from '../engine/grad.ts';
import { type AnyModule, namedParameters } from '../engine/module.ts';
import { slice } from '../engine/ops/move.ts';
import { scope } from '../engine/scope.ts';
import type { Tensor } from '../engine/tensor.ts';
import { UserError } from '../io/errors.ts';
import type { GuidedModel } from './denoiser_inputs.ts';
import {
  type Embeds,
  encodePrompts,
  type PromptEmbeds,
  type Prompts,
  promptCount,
} from './text/conditioning.ts';
import type { UNetConfig } from './unet/unet.ts';
import { pooledTaken } from './unet/unet_encoder.ts';
import { checkShape } from './vae/latents.ts';

/** A text stands for a list of one; for as many as there are prompts where it is no prompt itself. */
export interface Texts {
  /** Or prompt_embeds and pooled_prompt_embeds. */
  prompt?: string | readonly string[];
  prompt_2?: string | readonly string[];
  negative_prompt?: string | readonly string[];
  negative_prompt_2?: string | readonly string[];
}

/** Prompts as they may be written. */
export type AskedPrompts = Texts & Omit<Prompts, keyof Texts>;

/** The same with a list for each text; a second one that is empty is as none, as in diffusers. @throws UserError where there is no prompt */
export function listed<A extends AskedPrompts>(asked: A): Omit<A, keyof Texts> & Prompts {
  const prompt = typeof asked.prompt === 'string' ? [asked.prompt] : asked.prompt;
  const count = promptCount({ prompt, prompt_embeds: asked.prompt_embeds });
  const each = (texts: Texts[keyof Texts]) =>
    typeof texts === 'string' ? Array<string>(count).fill(texts) : texts;
  return {
    ...asked,
    prompt,
    prompt_2: each(asked.prompt_2 || undefined),
    negative_prompt: each(asked.negative_prompt),
    negative_prompt_2: each(asked.negative_prompt_2 || undefined),
  };
}

/** The part of a pipeline that says how wide embeddings are. */
interface TextTaker {
  unetConfig: UNetConfig;
  aesthetic: boolean;
}

/** Embeddings, their pooled vectors, and the texts in whose place they stand. */
const kinds = [
  ['prompt_embeds', 'pooled_prompt_embeds', ['prompt', 'prompt_2']],
  ['negative_prompt_embeds', 'negative_pooled_prompt_embeds', ['negative_prompt', 'negative_prompt_2']],
] as const;

/** @throws UserError where there is not one of each thing to each prompt, or two of one, or embeddings are none of this model's */
export function checkPrompts({ unetConfig, aesthetic }: TextTaker, prompts: Prompts): void {
  const count = promptCount(prompts);
  const { prompt_weights: weights } = prompts;
  if (weights && weights.length !== count)
    throw new UserError(
      `prompt_weights has ${weights.length} numbers for ${count} prompts: give one to each, of which one picture is drawn together`,
    );
  const pooledWidth = pooledTaken(unetConfig, aesthetic);
  let tokens: number | undefined;
  for (const [name, pooledName, texts] of kinds) {
    const [embeds, pooled] = [prompts[name], prompts[pooledName]];
    for (const key of texts) {
      const list = prompts[key];
      if (list && embeds)
        throw new UserError(`${name} and ${key} are both given, and either is the prompt: leave out one`);
      if (list && list.length !== count)
        throw new UserError(
          `${prompts.prompt ? 'prompt' : 'prompt_embeds'} has ${count} texts and ${key} ${list.length}: give one to each`,
        );
    }
    if (!embeds && !pooled) continue;
    if (!embeds || !pooled)
      throw new UserError(
        `${embeds ? name : pooledName} is given without ${embeds ? pooledName : name}: give both, as encodePrompt makes them`,
      );
    tokens ??= embeds.shape[1] || 1;
    checkShape(name, embeds, [count, tokens, unetConfig.cross_attention_dim]);
    checkShape(pooledName, pooled, [count, pooledWidth]);
  }
}

/** @throws UserError for a part that is freed */
export function checkLoaded(part: AnyModule): void {
  const [first] = namedParameters(part).values();
  if (!first.loaded)
    throw new UserError('the pipeline was released, or has drawn its last request: load it again');
}

/**
 * What the text encoders say of prompts, a row for each, to be given in a request in the prompts' place. (Rows are repeated for
 * num_images_per_prompt there, not here.) `truncated` is text past the tokens that are read.
 * @throws UserError where there is not one text to each prompt, or the encoders are freed
 */
export function encodePrompt(
  pipeline: Pick<GuidedModel, 'text' | 'device' | 'dtype'> & TextTaker,
  asked: AskedPrompts,
): Required<PromptEmbeds> & { truncated: readonly string[] } {
  const { text, device } = pipeline;
  for (const { encoder } of text.encoders) checkLoaded(encoder);
  const prompts = { ...listed(asked), prompt_weights: undefined };
  checkPrompts(pipeline, prompts);
  const count = promptCount(prompts);
  const part = (t: Tensor, from: number): Embeds => ({
    shape: [count, ...t.shape.slice(1)],
    data: slice(t, 0, from, count).floats(),
  });
  return noGrad(() =>
    scope(() => {
      const options = { guided: true, copies: 1, device, dtype: 'float32' } as const;
      const { context, pooled, truncated } = encodePrompts(text, prompts, options);
      return {
        prompt_embeds: part(context, count),
        pooled_prompt_embeds: part(pooled, count),
        negative_prompt_embeds: part(context, 0),
        negative_pooled_prompt_embeds: part(pooled, 0),
        truncated,
      };
    }),
  );
}
