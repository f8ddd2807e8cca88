// CLIP text encoders (Radford et al. 2021): ViT-L (quick_gelu) and OpenCLIP bigG (gelu, with a projection). SDXL reads
// an inner layer's hidden states without the final norm, so layers past it run only when the pooled vector is wanted.
import type { Device } from '../engine/device.ts';
import { noGrad } from '../engine/grad.ts';
import { embedding, layerNorm, linear } from '../engine/layers.ts';
import { type Module, module, type Parameter, parameter } from '../engine/module.ts';
import { add } from '../engine/ops/binary.ts';
import { concat, embedding as rowsAt, slice } from '../engine/ops/move.ts';
import { cast } from '../engine/ops/unary.ts';
import { keep, scope } from '../engine/scope.ts';
import { type Tensor, tensor } from '../engine/tensor.ts';
import { UserError } from '../io/errors.ts';
import { encoderLayers, type LayerConfig, numberIn, parseLayerConfig } from './clip_layers.ts';

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
}

export type TextEncoder = Module<
  [tokens: Tokens, options: { layer: number; pooled: boolean }],
  TextStates
> & {
  readonly eos_token_id: number;
  readonly hidden_size: number;
  /** How many tokens the config counts; what addTokens adds comes after them. */
  readonly vocab_size: number;
  /** Adds rows of the embeddings' width to the loaded table, and returns the first one's id. */
  addTokens(rows: Float32Array): number;
};

/**
 * `layer` indexes hidden_states as Python would (0 is the embeddings, -1 the last layer, -2 what
 * SDXL uses); `pooled` also runs the rest of the layers and the projection.
 */
export function textEncoder(config: TextConfig): TextEncoder {
  const { hidden_size: c, num_hidden_layers: depth, projection_dim: projection } = config;
  const textModel = module(
    {
      embeddings: module(
        {
          token_embedding: embedding(config.vocab_size, c),
          position_embedding: embedding(config.max_position_embeddings, c),
        },
        (m, ids: Tensor) => {
          const positions = m.position_embedding.children.weight.tensor;
          return add(m.token_embedding(ids), slice(positions, 0, 0, ids.shape[1]));
        },
      ),
      encoder: encoderLayers(config, { causal: true }),
      final_layer_norm: layerNorm(c, { eps: config.layer_norm_eps }),
    },
    (m, ids: Tensor, layer: number, pooled: boolean) => {
      const entry = layer < 0 ? depth + 1 + layer : layer;
      if (entry < 0 || entry > depth)
        throw new UserError(
          `--clip-skip: of a text encoder's ${depth} layers at most ${depth - 1} can be skipped`,
        );
      const hidden = m.encoder(m.embeddings(ids), entry);
      const rest = pooled
        ? m.encoder.children.layers.slice(entry).reduce((h, next) => next(h), hidden)
        : undefined;
      return { hidden, final: rest && m.final_layer_norm(rest) };
    },
  );
  const text_projection = projection === undefined ? undefined : linear(c, projection, { bias: false });
  const encoder = module(
    { text_model: textModel, text_projection },
    (m, { ids, ends }: Tokens, options: { layer: number; pooled: boolean }) => {
      const { hidden, final } = m.text_model(ids, options.layer, options.pooled);
      return { hidden, pooled: final && m.text_projection?.(rowsAt(ends, final.reshape(-1, c))) };
    },
  );
  const addTokens = (rows: Float32Array): number =>
    addRows(textModel.children.embeddings.children.token_embedding.children, rows);
  const { eos_token_id, hidden_size, vocab_size } = config;
  return Object.assign(encoder, { eos_token_id, hidden_size, vocab_size, addTokens });
}

/** A parameter's shape is fixed, so a longer table is another one. */
function addRows(table: { weight: Parameter }, rows: Float32Array): number {
  const [count, c] = table.weight.shape;
  const { device, dtype } = table.weight.tensor;
  const longer = parameter([count + rows.length / c, c]);
  longer.tensor = keep(
    noGrad(() =>
      scope(() =>
        concat([table.weight.tensor, cast(tensor(rows, [rows.length / c, c], { device }), dtype)], 0),
      ),
    ),
  );
  table.weight.unload();
  table.weight = longer;
  return count;
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

/** Rows of `length` ids on a device, for `encoder`. */
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
