// One ControlNet for many kinds of control pictures (ControlNet++ by xinsir, 2024; ControlNetUnionModel of diffusers): a ControlNet that
// is told which kinds it is shown, beside the time, and weighs several pictures against each other and the latents: their means over
// the pixels, each with what is learnt of its kind, go through a small transformer, whose outputs are added to the pictures' features.
// Its attention is over the rows of the batch, not over the pictures: so it was trained, and so diffusers runs it. The tree spells
// diffusers' keys, `transformer_layes` included.
import { layerNorm, linear } from '../../engine/layers.ts';
import { module, parameter } from '../../engine/module.ts';
import { attention } from '../../engine/ops/attention.ts';
import { add } from '../../engine/ops/binary.ts';
import { linear as linearOp } from '../../engine/ops/linear.ts';
import { concat, slice } from '../../engine/ops/move.ts';
import { broadcast, sum } from '../../engine/ops/reduce.ts';
import { timestepEmbedding } from '../../engine/ops/timestep_embedding.ts';
import { cast, scale } from '../../engine/ops/unary.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import type { Json, ModelSource } from '../checkpoint/checkpoint.ts';
import type { WeightSource } from '../checkpoint/weights.ts';
import { once } from '../unet/context_cache.ts';
import {
  embeddingMlp,
  encode,
  encoder,
  parseConfig,
  type Question,
  timeWidth,
} from '../unet/unet_encoder.ts';
import {
  type ControlNetConfig,
  conditioningEmbedding,
  controlBlocks,
  controlnetRules,
  residualsFrom,
} from './controlnet.ts';

export interface ControlNetUnionConfig extends ControlNetConfig {
  /** How many kinds it knows. */
  num_control_type: number;
  /** Width, heads and depth of the small transformer. */
  num_trans_channel: number;
  num_trans_head: number;
  num_trans_layer: number;
}

/** The kinds of the published models, by their numbers; those of six kinds end before `tile`. */
export const controlModes: readonly (readonly string[])[] = [
  ['openpose'],
  ['depth'],
  ['hed', 'pidi', 'scribble', 'ted'],
  ['canny', 'lineart', 'anime_lineart', 'mlsd'],
  ['normal'],
  ['segment'],
  ['tile'],
  ['repaint'],
];

/** A kind's number by one of its names; undefined for no name of one. */
export function controlModeOf(name: string): number | undefined {
  const found = controlModes.findIndex((names) => names.includes(name));
  return found < 0 ? undefined : found;
}

/**
 * Reads a union ControlNet's config.json, which errors call `file`.
 * @throws UserError naming a field that is absent, or asks for another architecture
 */
export function parseControlNetUnionConfig(json: Json, file: string): ControlNetUnionConfig {
  const config = parseConfig<ControlNetUnionConfig & { num_proj_channel: number }>(json, {
    ...controlnetRules(file),
    what: "a ControlNet union of diffusers' for SDXL",
    counts: ['num_control_type', 'num_trans_channel', 'num_trans_head', 'num_proj_channel'],
    layers: ['num_trans_layer'],
    defaults: {
      ...{ conditioning_embedding_out_channels: [48, 96, 192, 384], num_control_type: 6 },
      ...{ num_trans_channel: 320, num_trans_head: 8, num_trans_layer: 1, num_proj_channel: 320 },
    },
  });
  const [width] = config.block_out_channels;
  for (const key of ['num_trans_channel', 'num_proj_channel'] as const)
    if (config[key] !== width)
      throw new UserError(
        `${file}: "${key}" is ${config[key]}, and the pictures' features that it is for are ${width} wide; take config and weights from one model`,
      );
  return config;
}

/** diffusers' name of it. */
const unionClass = 'ControlNetUnionModel';

/** The config.json of a union ControlNet, or nothing for another one. */
export function unionConfigOf(source: ModelSource): Json | undefined {
  const json = source.config('controlnet');
  return json._class_name === unionClass ? json : undefined;
}

/**
 * The config of a component under the class that its weights tell. What xinsir published calls itself a plain ControlNet, and beside his
 * model of more kinds lies the config of the first.
 */
export function asWeightsTell(config: Json, weights: WeightSource): Json {
  const learnt = weights.info('task_embedding')?.shape;
  return learnt ? { ...config, _class_name: unionClass, num_control_type: learnt[0] } : config;
}

/** The same of a ControlNet. */
export function asItsWeightsTell(source: ModelSource): ModelSource {
  const own = source.config('controlnet');
  const weights = source.weights('controlnet');
  const config = asWeightsTell(own, weights);
  weights.close();
  return { ...source, config: () => config };
}

/** residual + attention of x [l, n, c] over its n, in each of l. torch's MultiheadAttention. */
const attentionOverRows = (c: number, heads: number) =>
  module(
    {
      in_proj_weight: parameter([3 * c, c]),
      in_proj_bias: parameter([3 * c]),
      out_proj: linear(c, c),
    },
    (m, x: Tensor, residual: Tensor) => {
      const all = linearOp(x, m.in_proj_weight.tensor, m.in_proj_bias.tensor);
      const [q, k, v] = [0, 1, 2].map((i) => slice(all, 2, i * c, c));
      return m.out_proj(attention(q, k, v, { heads }), { residual });
    },
  );

const transformerLayer = (c: number, heads: number) =>
  module(
    {
      attn: attentionOverRows(c, heads),
      ln_1: layerNorm(c),
      mlp: module({ c_fc: linear(c, 4 * c), c_proj: linear(4 * c, c) }, (m, x: Tensor, residual: Tensor) =>
        m.c_proj(m.c_fc(x, { activation: 'quick_gelu' }), { residual }),
      ),
      ln_2: layerNorm(c),
    },
    (m, x: Tensor) => {
      const h = m.attn(m.ln_1(x), x);
      return m.mlp(m.ln_2(h), h);
    },
  );

/** [n, h, w, c] to [n, c], a side at a time: sums of a whole picture would overflow in float16. */
function meanOverPixels(x: Tensor): Tensor {
  const [, h, w] = x.shape;
  return scale(sum(scale(sum(x, 2), 1 / w), 1), 1 / h);
}

/** A tensor with one row, or with all, as all. */
const asRows = (x: Tensor, rows: number): Tensor =>
  x.shape[0] === rows ? x : broadcast(x, 0, rows).reshape(rows, ...x.shape.slice(1));

/** A picture as controlnet() takes it, its kind, and how strongly it counts beside the others. */
export interface UnionControl {
  picture: Tensor;
  mode: number;
  weight: number;
}

/** The modules, under diffusers' names: `transformer_layes` is spelt so there. */
function modulesOf(config: ControlNetUnionConfig) {
  const [width] = config.block_out_channels;
  const { num_control_type: kinds, addition_time_embed_dim: dim } = config;
  return {
    ...encoder(config),
    controlnet_cond_embedding: conditioningEmbedding(config.conditioning_embedding_out_channels, width),
    task_embedding: parameter([kinds, width]),
    transformer_layes: Array.from({ length: config.num_trans_layer }, () =>
      transformerLayer(width, config.num_trans_head),
    ),
    spatial_ch_projs: linear(width, width),
    control_add_embedding: embeddingMlp(kinds * dim, timeWidth(config)),
    ...controlBlocks(config),
  };
}

type Modules = ReturnType<typeof modulesOf>;

/**
 * The image h [n, h, w, c] with the embedded pictures added, each moved by what a transformer makes of the means of all: a token for each
 * picture, to which its kind is added, and one for the image.
 */
function fused(
  m: Modules,
  h: Tensor,
  pictures: readonly Tensor[],
  controls: readonly UnionControl[],
): Tensor {
  const [n, height, width, c] = h.shape;
  const tokens = pictures.map((x, i) => {
    const { mode, weight } = controls[i];
    return scale(asRows(add(meanOverPixels(x), slice(m.task_embedding.tensor, 0, mode, 1)), n), weight);
  });
  let x = concat(
    [...tokens, meanOverPixels(h)].map((each) => each.reshape(1, n, c)),
    0,
  );
  for (const layer of m.transformer_layes) x = layer(x);
  const shifts = m.spatial_ch_projs(x);
  return pictures.reduce((sum, picture, i) => {
    const shift = broadcast(slice(shifts, 0, i, 1).reshape(n, c), 1, height * width);
    const more = add(asRows(picture, n), shift.reshape(n, height, width, c));
    return add(sum, scale(more, controls[i].weight));
  }, h);
}

/** What is added to the embedded time: which kinds of pictures there are, a one or a zero for each. */
function embeddedKinds(
  m: Modules,
  { num_control_type: kinds, addition_time_embed_dim: dim }: ControlNetUnionConfig,
  { sample: { shape, device, dtype } }: Question,
  controls: readonly UnionControl[],
): Tensor {
  const [n] = shape;
  const told = Array.from({ length: kinds }, (_, kind) => Number(controls.some(({ mode }) => mode === kind)));
  const types = tensor(Array(n).fill(told).flat(), [n, kinds], { device });
  return m.control_add_embedding(cast(timestepEmbedding(types, dim).reshape(n, kinds * dim), dtype));
}

/** As controlnet(), of several pictures: what has a weight of 0 is still told of by its kind. */
export const controlnetUnion = (config: ControlNetUnionConfig) =>
  module(modulesOf(config), (m, question: Question, controls: readonly UnionControl[]): Tensor[] => {
    const pictures = once(question.conditioning.cache, m.controlnet_cond_embedding, () =>
      controls.map(({ picture }) => m.controlnet_cond_embedding(picture)),
    );
    const fuse = (h: Tensor): Tensor => fused(m, h, pictures, controls);
    const more = (): Tensor => embeddedKinds(m, config, question, controls);
    return residualsFrom(m, encode(m, config, { ...question, fuse, more }));
  });

export type ControlNetUnion = ReturnType<typeof controlnetUnion>;
