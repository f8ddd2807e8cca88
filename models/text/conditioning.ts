// What the UNet is told besides the latents: prompts through one or two text encoders (diffusers' encode_prompt) and the
// micro-conditioning numbers (Podell et al. 2023, section 2.2). Unconditional rows come first.
import type { Device } from '../../engine/device.ts';
import { concat, slice } from '../../engine/ops/move.ts';
import { cast, scale } from '../../engine/ops/unary.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { endsOf, splitTokens, type TextEncoder, type Tokens } from './clip.ts';
import { type Emphasis, emphasize, readPrompt, type Weighted, weightRows } from './emphasis.ts';
import type { Chunks, Tokenizer } from './tokenizer.ts';

export interface TokenizedEncoder {
  tokenizer: Tokenizer;
  encoder: TextEncoder;
}

/** One or two encoders in order; the last gives the pooled vector. The refiner has only the second. */
export interface TextStack {
  encoders: readonly TokenizedEncoder[];
  /** Base: no negative prompt at all means zero embeddings rather than the embedding of "". */
  forceZeros: boolean;
  /** How many chunks of 75 tokens every text takes; where absent as many as a request's texts need and it allows. */
  chunks?: number;
  /** What the encoders have said of prompts, by textKey, where they may be gone since. */
  encoded?: ReadonlyMap<string, PromptEmbeds>;
}

/** Numbers on the host. */
export interface Embeds {
  shape: readonly number[];
  data: Float32Array;
}

/** What the text encoders would say, of a program's own, in place of texts. */
export interface PromptEmbeds {
  /** [prompts, tokens, c], where c is that of all encoders together. */
  prompt_embeds?: Embeds;
  /** [prompts, p], the last encoder's. */
  pooled_prompt_embeds?: Embeds;
  negative_prompt_embeds?: Embeds;
  negative_pooled_prompt_embeds?: Embeds;
}

/** Lists of one length: a text for each picture (or for each group of `num_images_per_prompt`). */
export interface Prompts extends PromptEmbeds {
  prompt?: readonly string[];
  /** For the second of two text encoders; the same where absent, as for the negative ones. */
  prompt_2?: readonly string[];
  negative_prompt?: readonly string[];
  negative_prompt_2?: readonly string[];
  /**
   * One picture is drawn of all prompts together, each counting so much: composable diffusion, Liu et al. 2022. Of negative prompts the
   * first counts. Where absent each prompt has a picture.
   */
  prompt_weights?: readonly number[];
  /**
   * The most tokens of a prompt that are read, in chunks of 75 whose hidden states stand one after the other, as in kohya's
   * programs, A1111 and ComfyUI; the pooled vector is the first chunk's. 75 where absent, as diffusers.
   */
  max_token_length?: number;
  /** Layers to skip from the end of the text encoders, beside the last, which is always skipped; 0 where absent. */
  clip_skip?: number;
  /** How weights in the texts are read, as `(word:1.2)`; where absent, as in diffusers, they are text like any other. */
  emphasis?: Emphasis;
}

export interface Embeddings {
  /** [rows, 77, c], or a multiple of 77 for long prompts, and [rows, p]; rows are negative then positive when guided. */
  context: Tensor;
  pooled: Tensor;
  /** Text that did not fit, one entry for each prompt cut. */
  truncated: string[];
}

const PENULTIMATE = -2;

/** How many prompts there are. @throws UserError where there is none */
export function promptCount({ prompt, prompt_embeds }: Prompts): number {
  const count = prompt?.length ?? prompt_embeds?.shape[0];
  if (count) return count;
  throw new UserError('there is no prompt to draw: give prompt, or prompt_embeds with pooled_prompt_embeds');
}

/** How many pictures are drawn at once, but for num_images_per_prompt. */
export const pictureCount = (prompts: Prompts): number => (prompts.prompt_weights ? 1 : promptCount(prompts));

/** All that the embeddings of texts come of: without guidance nobody reads the negative one, nor is the other as long as it. */
export const textKey = (prompts: Prompts, guided: boolean): string => {
  const { prompt, prompt_2, negative_prompt, negative_prompt_2 } = prompts;
  const { max_token_length, clip_skip, emphasis } = prompts;
  return JSON.stringify([
    ...[prompt, prompt_2, negative_prompt, negative_prompt_2],
    ...[max_token_length, clip_skip, emphasis, guided],
  ]);
};

/**
 * Encodes all prompts, each repeated `copies` times, with the unconditional rows first when `guided`, of prompts that are drawn together
 * once. Embeddings stay as they are.
 */
export function encodePrompts(
  stack: TextStack,
  asked: Prompts,
  { guided, copies, device, dtype }: { guided: boolean; copies: number; device: Device; dtype: FloatDType },
): Embeddings {
  const truncated: string[] = [];
  const prompts = { ...asked, ...stack.encoded?.get(textKey(asked, guided)) };
  const { emphasis = 'none', prompt = [], prompt_2 = prompt } = prompts;
  const read = (texts: readonly (readonly string[])[]) =>
    stack.encoders.map(({ tokenizer }, i) => texts[i].map((text) => readPrompt(tokenizer, text, emphasis)));
  const given = placed(prompts.prompt_embeds, prompts.pooled_prompt_embeds, device);
  const givenNegative = placed(prompts.negative_prompt_embeds, prompts.negative_pooled_prompt_embeds, device);
  const texts = given ? [] : read([prompt, prompt_2]);
  const negatives = guided && !givenNegative ? negativesOf(stack, prompts) : undefined;
  const negative = negatives && read(negatives);
  const all = [texts, negative ?? []].flat(2);
  const beside = all.length > 0 ? (given ?? givenNegative) : undefined;
  const chunks =
    stack.chunks ?? (beside ? chunksBeside(stack, beside) : chunksFor(all, prompts.max_token_length));
  const encodeAt = (each: readonly Weighted[][], layer: number) =>
    encode(stack, each, { layer, chunks, emphasis, device }, truncated);
  const positive = given ?? encodeAt(texts, PENULTIMATE - (prompts.clip_skip ?? 0));
  const parts = [repeated(positive, copies)];
  if (guided) {
    // clip_skip is for the prompt alone: diffusers reads the negative one at the penultimate layer always.
    const other = givenNegative ?? (negative ? encodeAt(negative, PENULTIMATE) : nothingLike(positive));
    parts.unshift(repeated(prompts.prompt_weights ? firstOf(other) : other, copies));
  }
  const rows = (name: keyof Encoded) =>
    concat(
      parts.map((part) => cast(part[name], dtype)),
      0,
    );
  return { context: rows('context'), pooled: rows('pooled'), truncated };
}

const firstOf = ({ context, pooled }: Encoded): Encoded => ({
  context: slice(context, 0, 0, 1),
  pooled: slice(pooled, 0, 0, 1),
});

const placed = (context: Embeds | undefined, pooled: Embeds | undefined, device: Device) =>
  context &&
  pooled && {
    context: tensor(context.data, context.shape, { device }),
    pooled: tensor(pooled.data, pooled.shape, { device }),
  };

export type Encoded = Pick<Embeddings, 'context' | 'pooled'>;

/** As many chunks as embeddings have, beside which texts stand. */
function chunksBeside({ encoders: [{ tokenizer }] }: TextStack, { context }: Encoded): number {
  const [, tokens] = context.shape;
  const chunks = tokens / tokenizer.modelMaxLength;
  if (Number.isInteger(chunks)) return chunks;
  throw new UserError(
    `prompt_embeds and negative_prompt_embeds are as long as each other, and a text comes to a multiple of ${tokenizer.modelMaxLength} tokens, not to the ${tokens} that one of them has: give both`,
  );
}

/** The unconditional's texts, for each encoder; none where zeros take their place. */
function negativesOf({ forceZeros }: TextStack, prompts: Prompts): (readonly string[])[] | undefined {
  const { negative_prompt, negative_prompt_2 } = prompts;
  if (!negative_prompt && forceZeros) return undefined;
  const first = negative_prompt ?? Array<string>(promptCount(prompts)).fill('');
  return [first, negative_prompt_2 ?? first];
}

const nothingLike = ({ context, pooled }: Encoded): Encoded => ({
  context: scale(context, 0),
  pooled: scale(pooled, 0),
});

/** As many chunks as the longest of the texts fills; no more than `most` tokens come to. */
function chunksFor(texts: readonly Weighted[], most?: number): number {
  if (most === undefined) return 1;
  return Math.min(mostChunks(most), Math.max(1, ...texts.map(({ chunks }) => chunks.length)));
}

/** Tokens of a chunk, of SDXL's tokenizers: BOS and EOS make them 77. */
const CHUNK_TOKENS = 75;

/** The most chunks of a prompt that are read. @throws UserError where `max_token_length`, given as `name`, is no multiple of 75 */
export function mostChunks(max_token_length: number, name = 'max_token_length'): number {
  const chunks = max_token_length / CHUNK_TOKENS;
  if (Number.isInteger(chunks) && chunks > 0) return chunks;
  throw new UserError(
    `${name} is ${max_token_length}; give a multiple of ${CHUNK_TOKENS}, as 150 or 225: prompts are read in chunks of that many tokens`,
  );
}

/** texts[0] goes to the first encoder, texts[1] to the second. The refiner's lone encoder gets texts[0], as in diffusers. */
function encode(
  stack: TextStack,
  texts: readonly Weighted[][],
  { layer, chunks, emphasis, device }: { layer: number; chunks: number; emphasis: Emphasis; device: Device },
  truncated: string[],
): Encoded {
  const place = ({ values, shape }: Rows) => tensor(values, shape, { device, dtype: 'int32' });
  const tokens = stack.encoders.map((encoder, i) => {
    const read = texts[i].map((text) => text.chunks);
    const { ids, ends, places } = tokensOf(encoder, read, chunks, truncated);
    return { ids: place(ids), ends: place(ends), places: places && place(places) };
  });
  return encodeTokens(stack, tokens, layer, (hidden, i) => {
    const [rows, length] = hidden.shape;
    const weights = weightRows(texts[i], chunks, length);
    return weights ? emphasize(hidden, tensor(weights, [rows, length], { device }), emphasis) : hidden;
  });
}

/** A tensor's numbers. */
interface Rows {
  values: Int32Array;
  shape: readonly number[];
}

/** n texts as an encoder's Tokens: ids and places [n * chunks, 77] and ends [n]. Adds to `truncated` what does not fit, once. */
export function tokensOf(
  { tokenizer, encoder }: TokenizedEncoder,
  texts: readonly (string | Chunks)[],
  chunks = 1,
  truncated: string[] = [],
): { ids: Rows; ends: Rows; places?: Rows } {
  const rows = texts.map((text) => tokenizer.encode(text, chunks));
  for (const row of rows)
    if (row.truncated && !truncated.includes(row.truncated)) truncated.push(row.truncated);
  const length = tokenizer.modelMaxLength;
  const values = new Int32Array(rows.length * chunks * length);
  rows.forEach((row, r) => {
    values.set(row.ids, r * chunks * length);
  });
  const shape = [rows.length * chunks, length];
  const ends = {
    values: endsOf(values, length, encoder).filter((_, i) => i % chunks === 0),
    shape: [rows.length],
  };
  if (!encoder.addedTokens()) return { ids: { values, shape }, ends };
  const { ids, places } = splitTokens(values, encoder);
  return { ids: { values: ids, shape }, ends, places: { values: places, shape } };
}

/**
 * What the encoders say of their tokens: hidden states side by side, chunk after chunk, and the last one's pooled vector.
 * `emphasis` may weigh an encoder's states, [n * chunks, 77, c], before.
 */
export function encodeTokens(
  stack: TextStack,
  tokens: readonly Tokens[],
  layer = PENULTIMATE,
  emphasis: (hidden: Tensor, encoder: number) => Tensor = (hidden) => hidden,
): Encoded {
  const last = stack.encoders.length - 1;
  const states = stack.encoders.map(({ encoder }, i) => encoder(tokens[i], { layer, pooled: i === last }));
  const [n] = tokens[0].ends.shape;
  const hidden = states.map((state, i) => emphasis(state.hidden, i).reshape(n, -1, state.hidden.shape[2]));
  return { context: concat(hidden, 2), pooled: states[last].pooled as Tensor };
}

/** Row i of the prompts becomes rows i*copies .. (i+1)*copies-1. */
function repeated({ context, pooled }: Encoded, copies: number): Encoded {
  if (copies === 1) return { context, pooled };
  const [n, tokens, c] = context.shape;
  const times = (t: Tensor) => concat(Array<Tensor>(copies).fill(t.reshape(n, 1, -1)), 1);
  return {
    context: times(context).reshape(n * copies, tokens, c),
    pooled: times(pooled).reshape(n * copies, -1),
  };
}

export type Size = readonly [height: number, width: number];

/** What the model is told of a training picture's size and crop, in pixels, and the refiner of its beauty. */
export interface MicroConditioning {
  original_size?: Size;
  crops_coords_top_left?: readonly [top: number, left: number];
  target_size?: Size;
  negative_original_size?: Size;
  negative_crops_coords_top_left?: readonly [top: number, left: number];
  negative_target_size?: Size;
  aesthetic_score?: number;
  negative_aesthetic_score?: number;
}

/**
 * Rows of time ids: (original h, w, crop top, left, target h, w), or for a model that wants an aesthetic score that score
 * in place of the target. `interleaved` is text-to-image's order in diffusers: the [negative, positive] pair is repeated
 * per image as a whole, so that with several images the rows alternate. `perturbed` rows, as positive ones, are the last of each.
 */
export function timeIds(
  micro: MicroConditioning,
  size: Size,
  options: {
    aesthetic: boolean;
    guided: boolean;
    perturbed?: boolean;
    /** So many prompts of each image; 1 where absent. */
    texts?: number;
    images: number;
    interleaved: boolean;
  },
): number[][] {
  const original = micro.original_size ?? size;
  const target = micro.target_size ?? size;
  const tail = (end: Size, score: number): readonly number[] => (options.aesthetic ? [score] : end);
  const corner = micro.crops_coords_top_left ?? [0, 0];
  const positive = [...original, ...corner, ...tail(target, micro.aesthetic_score ?? 6)];
  // Text-to-image heeds the negative sizes only when both are given; the other pipelines fill each from its positive. Of
  // the base, diffusers' others put the positive corner into the negative row whatever is asked; ours when none is.
  const given = !options.interleaved || (micro.negative_original_size && micro.negative_target_size);
  const negative = given
    ? [
        ...(micro.negative_original_size ?? original),
        ...(micro.negative_crops_coords_top_left ??
          (options.interleaved || options.aesthetic ? [0, 0] : corner)),
        ...tail(micro.negative_target_size ?? target, micro.negative_aesthetic_score ?? 2.5),
      ]
    : positive;
  const { texts = 1 } = options;
  const positives = Array<number[]>(texts + Number(options.perturbed ?? false)).fill(positive);
  const rows = [...(options.guided ? [negative] : []), ...positives];
  const each = (row: number[]) => Array.from({ length: options.images }, () => row);
  if (!options.interleaved || texts > 1) return rows.flatMap(each);
  return Array.from({ length: options.images }, () => rows).flat();
}
