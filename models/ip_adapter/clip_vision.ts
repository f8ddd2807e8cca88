// CLIP's vision encoder (Radford et al. 2021; transformers' CLIPVisionModelWithProjection), a Vision Transformer: patches of the
// picture and a class token, whose last state is the picture's embedding. IP-Adapters read that, or the states of all tokens before
// the last layer. `pre_layrnorm` is the checkpoints' own spelling.
import { embedding, layerNorm, linear } from '../../engine/layers.ts';
import { module, parameter } from '../../engine/module.ts';
import { add } from '../../engine/ops/binary.ts';
import { conv2d } from '../../engine/ops/conv2d.ts';
import { concat, slice } from '../../engine/ops/move.ts';
import { broadcast } from '../../engine/ops/reduce.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import { encoderLayers, type LayerConfig, numberIn, parseLayerConfig } from '../text/clip_layers.ts';

export interface VisionConfig extends LayerConfig {
  /** Pixels of a picture's side, and of a patch's. */
  image_size: number;
  patch_size: number;
  /** Width of image_embeds. */
  projection_dim: number;
}

/** Reads image_encoder/config.json. @throws UserError naming a field that is absent or not supported */
export function parseVisionConfig(json: Record<string, unknown>): VisionConfig {
  const what = 'image encoder';
  const number = numberIn(json, what);
  const config = {
    ...parseLayerConfig(json, what),
    image_size: number('image_size', 224),
    patch_size: number('patch_size', 32),
    projection_dim: number('projection_dim', 512),
  };
  if (number('num_channels', 3) !== 3)
    throw new UserError(`${what} config.json: "num_channels" is ${JSON.stringify(json.num_channels)}, not 3`);
  return config;
}

/** [n, h, w, 3] to [n, patches, c], row by row; what is no whole patch is left out. */
const patchEmbedding = (c: number, side: number) =>
  module({ weight: parameter([c, 3, side, side], 'conv') }, (m, pixels: Tensor) => {
    const grid = conv2d(pixels, m.weight.tensor, undefined, { stride: side });
    return grid.reshape(pixels.shape[0], -1, c);
  });

const embeddings = ({ hidden_size: c, image_size, patch_size }: VisionConfig) =>
  module(
    {
      class_embedding: parameter([c]),
      patch_embedding: patchEmbedding(c, patch_size),
      position_embedding: embedding(Math.floor(image_size / patch_size) ** 2 + 1, c),
    },
    (m, pixels: Tensor) => {
      const first = broadcast(m.class_embedding.tensor.reshape(1, c), 0, pixels.shape[0]);
      const tokens = concat([first, m.patch_embedding(pixels)], 1);
      return add(tokens, m.position_embedding.children.weight.tensor);
    },
  );

/**
 * Of pixels [n, image_size, image_size, 3] in the model's type, normalised by preprocessClip: `image_embeds` [n, projection_dim],
 * or the `penultimate` of hidden_states, [n, 1 + patches, hidden_size].
 */
export function visionEncoder(config: VisionConfig) {
  const { hidden_size: c, num_hidden_layers: depth, layer_norm_eps: eps } = config;
  const visionModel = module(
    {
      embeddings: embeddings(config),
      pre_layrnorm: layerNorm(c, { eps }),
      encoder: encoderLayers(config, { causal: false }),
      post_layernorm: layerNorm(c, { eps }),
    },
    (m, pixels: Tensor, upTo: number) => m.encoder(m.pre_layrnorm(m.embeddings(pixels)), upTo),
  );
  const encoder = module(
    { vision_model: visionModel, visual_projection: linear(c, config.projection_dim, { bias: false }) },
    (m, pixels: Tensor, wanted: 'image_embeds' | 'penultimate') => {
      if (wanted === 'penultimate') return m.vision_model(pixels, depth - 1);
      const first = slice(m.vision_model(pixels, depth), 1, 0, 1).reshape(pixels.shape[0], c);
      return m.visual_projection(m.vision_model.children.post_layernorm(first));
    },
  );
  return Object.assign(encoder, { config });
}

export type VisionEncoder = ReturnType<typeof visionEncoder>;
