// The captions of the UNet's passes. Where the text encoders are frozen and every caption is known, embeddings come from the cache.
// Where they or a token's vectors train, or tags are drawn anew, the tokens go to the device, and through the encoders in the pass.
import type { Tensors } from '../../engine/op.ts';
import { mul } from '../../engine/ops/binary.ts';
import { cast } from '../../engine/ops/unary.ts';
import { sizeOf } from '../../engine/tensor.ts';
import type { Json } from '../../models/checkpoint/checkpoint.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { parseTextConfig } from '../../models/text/clip.ts';
import { type Encoded, encodeTokens, tokensOf } from '../../models/text/conditioning.ts';
import { joined } from '../../models/vae/latents.ts';
import type { HostTensor, PassInputs } from '../objective/pass_inputs.ts';
import type { Networks } from '../parts/added.ts';
import type { TextEmbeddings } from '../pictures/cache.ts';
import type { PreparedTexts } from './preparation.ts';

export interface Texts {
  /** A pass's captions as its inputs; undefined is a caption that is left away. */
  inputs(captions: readonly (string | undefined)[]): PassInputs;
  /** Inputs of the shapes that so many captions have, without their numbers. */
  blank(n: number): PassInputs;
  /** What the UNet of `model` is told, from such inputs on its device. */
  encoded(model: Pipeline, inputs: Tensors): Encoded;
}

const ASIDE = 'unconditional_';

/** Such inputs under other names, for a pass that has two kinds of them. */
export const aside = (inputs: PassInputs): PassInputs =>
  Object.fromEntries(Object.entries(inputs).map(([name, input]) => [`${ASIDE}${name}`, input]));

/** Those inputs of a pass under their own names again. */
export const fromAside = (inputs: Tensors): Tensors =>
  Object.fromEntries(
    Object.entries(inputs).flatMap(([name, t]) =>
      name.startsWith(ASIDE) ? [[name.slice(ASIDE.length), t]] : [],
    ),
  );

export const preparedTexts = (pipeline: Pipeline, { read }: PreparedTexts, networks: Networks): Texts => ({
  inputs: (chosen) => embeddedInputs(pipeline, chosen.map(read)),
  blank: (n) => blankEmbeddings(pipeline, networks, n),
  encoded: fromEmbeddings,
});

export const textsInPass = (pipeline: Pipeline): Texts => ({
  inputs: (chosen) => tokenInputs(pipeline, chosen),
  // Left away, as what that takes is the most.
  blank: (n) => tokenInputs(pipeline, Array<undefined>(n).fill(undefined)),
  encoded: throughEncoders,
});

/** Captions that are inputs as embeddings. */
export const fromEmbeddings: Texts['encoded'] = (_, { context, pooled }) => ({ context, pooled });

/** What the cache has of captions, as inputs [n, 77, c] and [n, p]. */
function embeddedInputs({ dtype, unetConfig }: Pipeline, found: readonly TextEmbeddings[]): PassInputs {
  const n = found.length;
  const context = joined(found.map((row) => row.context));
  const pooled = joined(found.map((row) => row.pooled));
  const width = unetConfig.cross_attention_dim;
  return {
    context: { shape: [n, context.length / (n * width), width], values: context, dtype },
    pooled: { shape: [n, pooled.length / n], values: pooled, dtype },
  };
}

/** Inputs of their shapes without a caption. */
export function blankEmbeddings(
  { text, dtype, unetConfig }: Pipeline,
  { texts }: Networks,
  n: number,
): PassInputs {
  const tokens = tokensOf(text.encoders[0], [''], text.chunks).ids.values.length;
  const { projection_dim = 0 } = parseTextConfig(texts[texts.length - 1].config as Json);
  const blank = (...shape: number[]): HostTensor => ({
    shape,
    values: new Float32Array(sizeOf(shape)),
    dtype,
  });
  return { context: blank(n, tokens, unetConfig.cross_attention_dim), pooled: blank(n, projection_dim) };
}

/** Captions for encoders that run in the pass: their tokens, and masks where a model wants zeros for those left away. */
function tokenInputs({ text, dtype }: Pipeline, captions: readonly (string | undefined)[]): PassInputs {
  const n = captions.length;
  const texts = captions.map((caption) => caption ?? '');
  const tokens = text.encoders.flatMap((encoder, i) =>
    Object.entries(tokensOf(encoder, texts, text.chunks)).map(
      ([name, rows]) => [`${name}_${i}`, { ...rows, dtype: 'int32' as const }] as const,
    ),
  );
  const masked = text.forceZeros && captions.includes(undefined);
  const kept = Float32Array.from(captions, (caption) => (caption === undefined ? 0 : 1));
  return { ...Object.fromEntries(tokens), ...(masked && { kept: { shape: [n], values: kept, dtype } }) };
}

/** Those captions through the encoders; the rows of those left away are zero. */
function throughEncoders({ text, dtype }: Pipeline, inputs: Tensors): Encoded {
  const states = encodeTokens(
    text,
    text.encoders.map((_, i) => ({
      ids: inputs[`ids_${i}`],
      ends: inputs[`ends_${i}`],
      places: inputs[`places_${i}`],
    })),
  );
  const [context, pooled] = [cast(states.context, dtype), cast(states.pooled, dtype)];
  const { kept } = inputs;
  if (!kept) return { context, pooled };
  return { context: mul(context, kept.reshape(-1, 1, 1)), pooled: mul(pooled, kept.reshape(-1, 1)) };
}
