// What the UNet is told besides the latents: prompts through one or two text encoders (diffusers' encode_prompt) and the
// micro-conditioning numbers (Podell et al. 2023, section 2.2). Unconditional rows come first.
import type { Device } from '../engine/device.ts';
import { concat } from '../engine/ops/move.ts';
import { cast, scale } from '../engine/ops/unary.ts';
import type { Tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import { endsOf, placeTokens, type TextEncoder, type Tokens } from './clip.ts';
import type { Tokenizer } from './tokenizer.ts';

export interface TokenizedEncoder {
  tokenizer: Tokenizer;
  encoder: TextEncoder;
}

/** One or two encoders in order; the last gives the pooled vector. The refiner has only the second. */
export interface TextStack {
  encoders: readonly TokenizedEncoder[];
  /** Base: no negative prompt at all means zero embeddings rather than the embedding of "". */
  forceZeros: boolean;
}

/** Lists of one length: a text for each picture (or for each group of `num_images_per_prompt`). */
export interface Prompts {
  prompt: readonly string[];
  /** For the second of two text encoders; the same where absent, as for the negative ones. */
  prompt_2?: readonly string[];
  negative_prompt?: readonly string[];
  negative_prompt_2?: readonly string[];
  /** Layers to skip from the end of the text encoders, beside the last, which is always skipped; 0 where absent. */
  clip_skip?: number;
}

export interface Embeddings {
  /** [rows, 77, c] and [rows, p]; rows are negative then positive when guided. */
  context: Tensor;
  pooled: Tensor;
  /** Text that did not fit into 77 tokens, one entry for each prompt cut. */
  truncated: string[];
}

const PENULTIMATE = -2;

/** Encodes all prompts, each repeated `copies` times, with the unconditional rows first when `guided`. */
export function encodePrompts(
  stack: TextStack,
  prompts: Prompts,
  options: { guided: boolean; copies: number; device: Device; dtype: FloatDType },
): Embeddings {
  const truncated: string[] = [];
  const second = prompts.prompt_2 ?? prompts.prompt;
  const layer = PENULTIMATE - (prompts.clip_skip ?? 0);
  const positive = encode(stack, [prompts.prompt, second], layer, options.device, truncated);
  const parts = [repeated(positive, options.copies)];
  if (options.guided)
    parts.unshift(repeated(negativeOf(stack, prompts, positive, options.device, truncated), options.copies));
  const rows = (name: keyof Encoded) => parts.map((part) => part[name]);
  return {
    context: cast(concat(rows('context'), 0), options.dtype),
    pooled: cast(concat(rows('pooled'), 0), options.dtype),
    truncated,
  };
}

export type Encoded = Pick<Embeddings, 'context' | 'pooled'>;

function negativeOf(
  stack: TextStack,
  prompts: Prompts,
  positive: Encoded,
  device: Device,
  truncated: string[],
): Encoded {
  if (!prompts.negative_prompt && stack.forceZeros) {
    return { context: scale(positive.context, 0), pooled: scale(positive.pooled, 0) };
  }
  const first = prompts.negative_prompt ?? prompts.prompt.map(() => '');
  const second = prompts.negative_prompt_2 ?? first;
  // clip_skip is for the prompt alone: diffusers reads the negative one at the penultimate layer always.
  return encode(stack, [first, second], PENULTIMATE, device, truncated);
}

/** texts[0] goes to the first encoder, texts[1] to the second. The refiner's lone encoder gets texts[0], as in diffusers. */
function encode(
  stack: TextStack,
  texts: readonly (readonly string[])[],
  layer: number,
  device: Device,
  truncated: string[],
): Encoded {
  const tokens = stack.encoders.map((encoder, i) => {
    const { values, shape } = tokensOf(encoder, texts[i], truncated).ids;
    return placeTokens(encoder.encoder, values, shape[1], device);
  });
  return encodeTokens(stack, tokens, layer);
}

/** A tensor's numbers. */
interface Rows {
  values: Int32Array;
  shape: readonly number[];
}

/** Texts as an encoder's Tokens: ids [n, 77] and ends [n]. Adds to `truncated` what does not fit, once. */
export function tokensOf(
  { tokenizer, encoder }: TokenizedEncoder,
  texts: readonly string[],
  truncated: string[] = [],
): Record<keyof Tokens, Rows> {
  const rows = texts.map((text) => tokenizer.encode(text));
  for (const row of rows)
    if (row.truncated && !truncated.includes(row.truncated)) truncated.push(row.truncated);
  const length = rows[0].ids.length;
  const values = new Int32Array(rows.length * length);
  rows.forEach((row, r) => {
    values.set(row.ids, r * length);
  });
  return {
    ids: { values, shape: [rows.length, length] },
    ends: { values: endsOf(values, length, encoder.eos_token_id), shape: [rows.length] },
  };
}

/** What the encoders say of their tokens: hidden states side by side, and the last one's pooled vector. */
export function encodeTokens(stack: TextStack, tokens: readonly Tokens[], layer = PENULTIMATE): Encoded {
  const last = stack.encoders.length - 1;
  const states = stack.encoders.map(({ encoder }, i) => encoder(tokens[i], { layer, pooled: i === last }));
  const hidden = states.map((state) => state.hidden);
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
 * per image as a whole, so that with several images the rows alternate.
 */
export function timeIds(
  micro: MicroConditioning,
  size: Size,
  options: { aesthetic: boolean; guided: boolean; images: number; interleaved: boolean },
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
  const rows = options.guided ? [negative, positive] : [positive];
  const each = (row: number[]) => Array.from({ length: options.images }, () => row);
  if (!options.interleaved) return rows.flatMap(each);
  return Array.from({ length: options.images }, () => rows).flat();
}
