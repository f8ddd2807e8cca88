// CLIP text encoders (Radford et al. 2021): ViT-L (quick_gelu) and OpenCLIP bigG (gelu, with a projection). SDXL reads
// an inner layer's hidden states without the final norm, so layers past it run only when the pooled vector is wanted.
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { embedding, layerNorm, linear } from '../../engine/layers.ts';
import { type Module, module, type Parameter, parameter } from '../../engine/module.ts';
import { add } from '../../engine/ops/binary.ts';
import { concat, embedding as rowsAt, slice } from '../../engine/ops/move.ts';
import { cast } from '../../engine/ops/unary.ts';
import { keep, scope } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import { encoderLayers, type LayerConfig, numberIn, parseLayerConfig } from './clip_layers.ts';
import { loadTokenizer, type Tokenizer } from './tokenizer.ts';

export interface TextConfig extends LayerConfig {
  vocab_size: number;
  max_position_embeddings: number;
  eos_token_id: number;
  /** Width of the pooled projection; undefined for an encoder without one. */
  projection_dim: number | undefined;
}

/** Reads text_encoder/config.json. The projection exists only in CLIPTextModelWithProjection. */
export function parseTextConfig(json: Record<string, unknown>): TextConfig {
  const number = numberIn(json, 'text encoder');
  const projected = (json.architectures as string[] | undefined)?.[0] === 'CLIPTextModelWithProjection';
  return {
    ...parseLayerConfig(json, 'text encoder'),
    vocab_size: number('vocab_size'),
    max_position_embeddings: number('max_position_embeddings', 77),
    eos_token_id: number('eos_token_id', 2),
    projection_dim: projected ? number('projection_dim') : undefined,
  };
}

/** The tokenizer in `folder`, of an encoder. @throws UserError for one whose prompts are longer than the encoder takes */
export function tokenizerFor(folder: string, { max_position_embeddings: most }: TextConfig): Tokenizer {
  const tokenizer = loadTokenizer(folder);
  if (tokenizer.modelMaxLength <= most) return tokenizer;
  throw new UserError(
    `${folder} makes ${tokenizer.modelMaxLength} tokens of a prompt, and its text encoder takes ${most}: correct model_max_length in tokenizer_config.json to ${most}`,
  );
}

export interface TextStates {
  /** The asked-for entry of hidden_states, [n, 77, c], without the final norm. */
  hidden: Tensor;
  /** The final-normed state at EOS, projected: [n, projection_dim]. */
  pooled: Tensor | undefined;
}

/** Prompts as an encoder reads them. */
export interface Tokens {
  /** int32 [n, 77]; of prompts in several chunks each one's chunks are rows one after the other. */
  ids: Tensor;
  /** Where each prompt's first EOS is, as a row of all [n * 77]: int32 [n], by endsOf. */
  ends: Tensor;
  /** Where each token's vector is, of an encoder with tokens of its own: int32 [n, 77], by splitTokens. */
  places?: Tensor;
}

export type TextEncoder = Module<
  [tokens: Tokens, options: { layer: number; pooled: boolean }],
  TextStates
> & {
  readonly eos_token_id: number;
  readonly hidden_size: number;
  /** How many tokens the config counts; what addTokens adds comes after them. */
  readonly vocab_size: number;
  /** Adds tokens with vectors of the embeddings' width to a loaded encoder, and returns the first one's id. */
  addTokens(rows: Float32Array): number;
  /** The vectors of all that were added, [tokens, width]. */
  addedTokens(): Parameter | undefined;
};

/** The vectors of tokens and of their places, and of tokens that were added to these. */
const tokenEmbeddings = ({ vocab_size, max_position_embeddings, hidden_size: c }: TextConfig) =>
  module(
    {
      token_embedding: embedding(vocab_size, c),
      position_embedding: embedding(max_position_embeddings, c),
      added: undefined as Parameter | undefined,
    },
    (m, { ids, places }: Pick<Tokens, 'ids' | 'places'>) => {
      const positions = m.position_embedding.children.weight.tensor;
      const known = m.token_embedding(ids);
      const words =
        places && m.added ? rowsAt(places, concat([known.reshape(-1, c), m.added.tensor], 0)) : known;
      return add(words, slice(positions, 0, 0, ids.shape[1]));
    },
  );

/** What goes into the layer of this number, and, if `pooled`, what the last one gives, normed. */
function clipTextModel(config: TextConfig) {
  const { hidden_size: c, num_hidden_layers: depth } = config;
  return module(
    {
      embeddings: tokenEmbeddings(config),
      encoder: encoderLayers(config, { causal: true }),
      final_layer_norm: layerNorm(c, { eps: config.layer_norm_eps }),
    },
    (m, tokens: Tokens, layer: number, pooled: boolean) => {
      const entry = layer < 0 ? depth + 1 + layer : layer;
      if (entry < 0 || entry > depth)
        throw new UserError(
          `--clip-skip: of a text encoder's ${depth} layers at most ${depth - 1} can be skipped`,
        );
      const hidden = m.encoder(m.embeddings(tokens), entry);
      const rest = pooled
        ? m.encoder.children.layers.slice(entry).reduce((h, next) => next(h), hidden)
        : undefined;
      return { hidden, final: rest && m.final_layer_norm(rest) };
    },
  );
}

/**
 * `layer` indexes hidden_states as Python would (0 is the embeddings, -1 the last layer, -2 what
 * SDXL uses); `pooled` also runs the rest of the layers and the projection.
 */
export function textEncoder(config: TextConfig): TextEncoder {
  const { hidden_size: c, projection_dim: projection, eos_token_id, vocab_size } = config;
  const textModel = clipTextModel(config);
  const text_projection = projection === undefined ? undefined : linear(c, projection, { bias: false });
  const encoder = module(
    { text_model: textModel, text_projection },
    (m, tokens: Tokens, options: { layer: number; pooled: boolean }) => {
      const { hidden, final } = m.text_model(tokens, options.layer, options.pooled);
      return { hidden, pooled: final && m.text_projection?.(rowsAt(tokens.ends, final.reshape(-1, c))) };
    },
  );
  const { children: embeddings } = textModel.children.embeddings;
  return Object.assign(encoder, {
    ...{ eos_token_id, hidden_size: c, vocab_size },
    addedTokens: () => embeddings.added,
    addTokens(rows: Float32Array): number {
      const { added: before } = embeddings;
      embeddings.added = withRows(before, rows, embeddings.token_embedding.children.weight);
      before?.unload();
      return vocab_size + (before?.shape[0] ?? 0);
    },
  });
}

/** Vectors with more behind them, where a table is and of its type and width. */
function withRows(
  before: Parameter | undefined,
  rows: Float32Array,
  { shape: [, c], tensor: { device, dtype } }: Parameter,
): Parameter {
  const more = [rows.length / c, c];
  const all = parameter([more[0] + (before?.shape[0] ?? 0), c]);
  all.tensor = keep(
    noGrad(() =>
      scope(() => {
        const last = cast(tensor(rows, more, { device }), dtype);
        return before ? concat([before.tensor, last], 0) : last;
      }),
    ),
  );
  return all;
}

/**
 * The row of each prompt's EOS in ids [n, length]: the largest id where the config says 2 (as published), else the first equal
 * one. Ids past the config's vocabulary are added tokens, which transformers takes for that largest one; A1111 and kohya do not.
 */
export function endsOf(
  ids: Int32Array,
  length: number,
  { eos_token_id: eos, vocab_size }: Pick<TextConfig, 'eos_token_id' | 'vocab_size'>,
): Int32Array {
  return Int32Array.from({ length: ids.length / length }, (_, i) => {
    const row = ids.subarray(i * length, (i + 1) * length);
    const largest = () => row.reduce((a, b) => (b < vocab_size ? Math.max(a, b) : a), 0);
    return i * length + Math.max(0, row.indexOf(eos === 2 ? largest() : eos));
  });
}

/**
 * Ids of which some are of added tokens, as the encoder looks them up: `ids` in its own table, where the added ones are 0, and `places`
 * among the vectors found so and those of the added ones behind them. So the table itself is neither copied nor, where the added vectors
 * are trained, given a gradient.
 */
export function splitTokens(
  given: Int32Array,
  { vocab_size }: Pick<TextConfig, 'vocab_size'>,
): { ids: Int32Array; places: Int32Array } {
  const ids = given.map((id) => (id < vocab_size ? id : 0));
  const places = given.map((id, i) => (id < vocab_size ? i : given.length + id - vocab_size));
  return { ids, places };
}

/** Rows of `length` ids on a device, for `encoder`; none of added tokens. */
export function placeTokens(
  encoder: Pick<TextConfig, 'eos_token_id' | 'vocab_size'>,
  ids: Int32Array,
  length: number,
  device: Device,
): Tokens {
  const ends = endsOf(ids, length, encoder);
  const options = { device, dtype: 'int32' } as const;
  return { ids: tensor(ids, [ends.length, length], options), ends: tensor(ends, [ends.length], options) };
}
