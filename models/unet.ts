// SDXL's UNet (Podell et al. 2023, section 2.1), base and refiner from one description: a table of levels, each with its
// width and transformer depth; features pushed on the way down and popped on the way up. The tree spells diffusers' keys.
// What does not depend on the latents (keys and values of the prompt, the embedded sizes and times) is computed once an
// image when the conditioning carries a ContextCache; training passes none.
import { checkpointed } from '../engine/checkpointing.ts';
import { conv2d, groupNorm, layerNorm, linear } from '../engine/layers.ts';
import { type Module, module } from '../engine/module.ts';
import { attention as attentionOp } from '../engine/ops/attention.ts';
import { concat, timestepEmbedding } from '../engine/ops/move.ts';
import { broadcast } from '../engine/ops/reduce.ts';
import { cast, silu } from '../engine/ops/unary.ts';
import { Tensor } from '../engine/tensor.ts';
import type { DType } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { downsample, type NormConfig, type Resnet, resnet, type Time, upsample } from './blocks.ts';
import { type ContextCache, once } from './context_cache.ts';

/** The fields of diffusers' unet/config.json that SDXL's UNets differ in. */
export interface UNetConfig {
  in_channels: number;
  out_channels: number;
  /** The latent's side that the model was trained for. */
  sample_size: number;
  block_out_channels: readonly number[];
  layers_per_block: number;
  down_block_types: readonly string[];
  up_block_types: readonly string[];
  /** Per level or one for all. Despite its name in diffusers, the NUMBER of heads. */
  attention_head_dim: number | readonly number[];
  transformer_layers_per_block: number | readonly number[];
  cross_attention_dim: number;
  addition_time_embed_dim: number;
  projection_class_embeddings_input_dim: number;
  norm_num_groups: number;
  norm_eps: number;
}

/** What config.json may say in one way only, because SDXL's UNets all say so; what else changes a weight's shape shows there. */
const fixed: Record<string, unknown> = {
  act_fn: 'silu',
  addition_embed_type: 'text_time',
  center_input_sample: false,
  class_embed_type: null,
  downsample_padding: 1,
  flip_sin_to_cos: true,
  freq_shift: 0,
  mid_block_scale_factor: 1,
  mid_block_type: 'UNetMidBlock2DCrossAttn',
  resnet_out_scale_factor: 1,
  resnet_skip_time_act: false,
  time_embedding_act_fn: null,
  timestep_post_act: null,
  use_linear_projection: true,
};

const isCount = (value: unknown): boolean => typeof value === 'number';
const isList = (value: unknown, length: number): boolean => Array.isArray(value) && value.length === length;

/** Reads unet/config.json. @throws UserError naming a field that is absent, or asks for another architecture */
export function parseUNetConfig(json: Record<string, unknown>): UNetConfig {
  const complain = (key: string, want: string) =>
    new UserError(
      `unet/config.json: "${key}" is ${JSON.stringify(json[key])}, not ${want}; is this an SDXL UNet?`,
    );
  for (const [key, want] of Object.entries(fixed)) {
    if (key in json && json[key] !== want) throw complain(key, JSON.stringify(want));
  }
  const config = { sample_size: 128, norm_num_groups: 32, norm_eps: 1e-5, layers_per_block: 2, ...json };
  const { block_out_channels: widths, ...rest } = config as Partial<UNetConfig>;
  if (!Array.isArray(widths) || !widths.every(isCount))
    throw complain('block_out_channels', 'a list of widths');
  for (const key of ['down_block_types', 'up_block_types'] as const) {
    if (!isList(rest[key], widths.length)) throw complain(key, `a list of ${widths.length} block types`);
  }
  for (const key of ['attention_head_dim', 'transformer_layers_per_block'] as const) {
    if (!isCount(rest[key]) && !isList(rest[key], widths.length)) {
      throw complain(key, `a number or a list of ${widths.length}`);
    }
  }
  for (const key of counts) if (!isCount(rest[key])) throw complain(key, 'a number');
  return config as unknown as UNetConfig;
}

const counts = [
  'in_channels',
  'out_channels',
  'cross_attention_dim',
  'addition_time_embed_dim',
  'projection_class_embeddings_input_dim',
] as const;

export interface Conditioning {
  /** encoder_hidden_states [n, tokens, cross_attention_dim] in the model's type. */
  context: Tensor;
  /** The pooled prompt [n, projection_dim] in the model's type. */
  textEmbeds: Tensor;
  /** float32 [n, 6]: original height, width, crop top, left, target height, width; refiner [n, 5]: aesthetic score last. */
  timeIds: Tensor;
  cache?: ContextCache;
}

type Transformer = Module<[x: Tensor, conditioning: Conditioning], Tensor>;
/** What becomes of a transformer block: itself, or itself with gradient checkpointing. */
type Wrap = typeof checkpointed;

const attentionChildren = (c: number, contextWidth: number) => ({
  to_q: linear(c, c, { bias: false }),
  to_k: linear(contextWidth, c, { bias: false }),
  to_v: linear(contextWidth, c, { bias: false }),
  to_out: [linear(c, c)],
});

/** residual + attention of x [n, l, c] over itself. */
const selfAttention = (c: number, heads: number) =>
  module(attentionChildren(c, c), (m, x: Tensor, residual: Tensor) => {
    const [q, k, v] = x.device.together(() => [m.to_q(x), m.to_k(x), m.to_v(x)]);
    return m.to_out[0](attentionOp(q, k, v, { heads }), { residual });
  });

/** residual + attention of x [n, l, c] over the prompt. */
const crossAttention = (c: number, contextWidth: number, heads: number) =>
  module(
    attentionChildren(c, contextWidth),
    (m, x: Tensor, { context, cache }: Conditioning, residual: Tensor) => {
      const [k, v] = once(cache, m, () => x.device.together(() => [m.to_k(context), m.to_v(context)]));
      return m.to_out[0](attentionOp(m.to_q(x), k, v, { heads }), { residual });
    },
  );

/** residual + W2 GEGLU(W1 x) (Shazeer 2020). The keys are net.0.proj and net.2; net.1 was dropout. */
const feedForward = (c: number) => {
  const geglu = module({ proj: linear(c, 8 * c) }, (m, x: Tensor) => m.proj(x, { activation: 'geglu' }));
  return module({ net: [geglu, undefined, linear(4 * c, c)] as const }, (m, x: Tensor, residual: Tensor) =>
    m.net[2](m.net[0](x), { residual }),
  );
};

export const transformerBlock = (c: number, contextWidth: number, heads: number) =>
  module(
    {
      norm1: layerNorm(c),
      attn1: selfAttention(c, heads),
      norm2: layerNorm(c),
      attn2: crossAttention(c, contextWidth, heads),
      norm3: layerNorm(c),
      ff: feedForward(c),
    },
    (m, x: Tensor, conditioning: Conditioning) => {
      let h = m.attn1(m.norm1(x), x);
      h = m.attn2(m.norm2(h), conditioning, h);
      return m.ff(m.norm3(h), h);
    },
  );

interface Level {
  width: number;
  heads: number;
  /** Transformer blocks after each resnet; 0 for none. */
  depth: number;
}

/** Transformer2DModel: channels last makes an image a token sequence without a transpose. */
export const transformer = (
  { width: c, heads, depth }: Level,
  contextWidth: number,
  groups: number,
  wrap: Wrap = (block) => block,
): Transformer =>
  module(
    {
      norm: groupNorm(groups, c, { eps: 1e-6 }),
      proj_in: linear(c, c),
      transformer_blocks: times(depth, () => wrap(transformerBlock(c, contextWidth, heads))),
      proj_out: linear(c, c),
    },
    (m, x: Tensor, conditioning: Conditioning) => {
      const [n, height, width] = x.shape;
      let h = m.proj_in(m.norm(x).reshape(n, height * width, c));
      for (const block of m.transformer_blocks) h = block(h, conditioning);
      return m.proj_out(h, { residual: x.reshape(n, height * width, c) }).reshape(n, height, width, c);
    },
  );

const times = <T>(count: number, make: (i: number) => T): T[] =>
  Array.from({ length: count }, (_, i) => make(i));

/** Two linears with SiLU between, for the timestep and for the added conditions. */
export const embeddingMlp = (inputs: number, width: number) =>
  module(
    { linear_1: linear(inputs, width), linear_2: linear(width, width) },
    (m, x: Tensor, residual?: Tensor) => m.linear_2(m.linear_1(x, { activation: 'silu' }), { residual }),
  );

/** A level on the way down; returns everything the way up will want, the last entry being its output. */
const downBlock = (
  resnets: Resnet[],
  attentions: (Transformer | undefined)[],
  downsamplers: ReturnType<typeof downsample>[],
) =>
  module(
    { resnets, attentions, downsamplers },
    (m, x: Tensor, time: Time, conditioning: Conditioning): Tensor[] => {
      let h = x;
      const features: Tensor[] = [];
      m.resnets.forEach((resnet, i) => {
        h = resnet(h, { time });
        h = m.attentions[i]?.(h, conditioning) ?? h;
        features.push(h);
      });
      for (const down of m.downsamplers) features.push(down(h));
      return features;
    },
  );

/** A level on the way up: each resnet takes one feature off `skips`; upsampling aims at the size of the next. */
const upBlock = (
  resnets: Resnet[],
  attentions: (Transformer | undefined)[],
  upsamplers: ReturnType<typeof upsample>[],
) =>
  module(
    { resnets, attentions, upsamplers },
    (m, x: Tensor, skips: Tensor[], time: Time, conditioning: Conditioning): Tensor => {
      let h = x;
      m.resnets.forEach((resnet, i) => {
        h = resnet(h, { time, skip: skips.pop() });
        h = m.attentions[i]?.(h, conditioning) ?? h;
      });
      for (const up of m.upsamplers) {
        const [, height, width] = (skips.at(-1) as Tensor).shape;
        h = up(h, height, width, conditioning.cache);
      }
      return h;
    },
  );

const midBlock = (resnets: [Resnet, Resnet], attentions: [Transformer]) =>
  module({ resnets, attentions }, (m, x: Tensor, time: Time, conditioning: Conditioning) =>
    m.resnets[1](m.attentions[0](m.resnets[0](x, { time }), conditioning), { time }),
  );

const perLevel = (value: number | readonly number[], level: number): number =>
  typeof value === 'number' ? value : value[level];

/** Widths, heads and depths from the first level down, before block types decide where transformers are. */
const levelsOf = (config: UNetConfig): Level[] =>
  config.block_out_channels.map((width, i) => ({
    width,
    heads: perLevel(config.attention_head_dim, i),
    depth: perLevel(config.transformer_layers_per_block, i),
  }));

/** The levels as modules. Channel counts are pushed and popped here exactly as forward does with features. */
function blocks(config: UNetConfig, ctemb: number, wrap: Wrap) {
  const levels = levelsOf(config);
  const norm: NormConfig = { groups: config.norm_num_groups, eps: config.norm_eps };
  const attention = (level: Level, type: string) =>
    type.startsWith('CrossAttn')
      ? transformer(level, config.cross_attention_dim, norm.groups, wrap)
      : undefined;
  let c = levels[0].width;
  const skips = [c];
  const to = (width: number, more = 0): Resnet => {
    const made = resnet(c + more, width, norm, ctemb);
    c = width;
    return made;
  };
  const down_blocks = levels.map((level, i) => {
    const resnets = times(config.layers_per_block, () => to(level.width));
    const attentions = resnets.map(() => attention(level, config.down_block_types[i]));
    const downsamplers = i < levels.length - 1 ? [downsample(c, [1, 1, 1, 1])] : [];
    skips.push(...Array<number>(resnets.length + downsamplers.length).fill(c));
    return downBlock(resnets, attentions, downsamplers);
  });
  const deepest = levels[levels.length - 1];
  const mid_block = midBlock(
    [to(c), to(c)],
    [transformer(deepest, config.cross_attention_dim, norm.groups, wrap)],
  );
  const up_blocks = levels.toReversed().map((level, i) => {
    const resnets = times(config.layers_per_block + 1, () => to(level.width, skips.pop()));
    const attentions = resnets.map(() => attention(level, config.up_block_types[i]));
    return upBlock(resnets, attentions, i < levels.length - 1 ? [upsample(c)] : []);
  });
  return { down_blocks, mid_block, up_blocks };
}

/** All times that an image is denoised at, float32 [steps, n], and the number of the one to take now, int32 [1]. */
export interface Schedule {
  times: Tensor;
  step: Tensor;
}

/** SiLU of the embedded time and added conditions; of a schedule, of all its times at once. */
function embedTime(
  embedding: ReturnType<typeof embeddingMlp>,
  times: Tensor | Schedule,
  added: Tensor,
  { width, dtype, cache }: { width: number; dtype: DType; cache?: ContextCache },
): Time {
  const embed = (t: Tensor, residual: Tensor): Tensor =>
    silu(embedding(cast(timestepEmbedding(t, width), dtype), residual));
  if (times instanceof Tensor) return { temb: embed(times, added) };
  const { times: all, step } = times;
  const [steps, n] = all.shape;
  const [temb] = once(cache, embedding, () => [
    embed(all.reshape(steps * n), broadcast(added, 0, steps).reshape(steps * n, -1)),
  ]);
  return { temb, step, cache };
}

/**
 * Predicts what the model was trained to predict (noise, for SDXL) from `sample` [n, h, w, in_channels] in the model's
 * type and `times` float32 [n] or a schedule; returns [n, h, w, out_channels]. Any h and w. With gradient checkpointing,
 * transformer blocks run again in backward instead of keeping their activations.
 */
export function unet(config: UNetConfig, { gradientCheckpointing = false } = {}) {
  const width = config.block_out_channels[0];
  const ctemb = 4 * width;
  return module(
    {
      conv_in: conv2d(config.in_channels, width, 3, { padding: 1 }),
      time_embedding: embeddingMlp(width, ctemb),
      add_embedding: embeddingMlp(config.projection_class_embeddings_input_dim, ctemb),
      ...blocks(config, ctemb, gradientCheckpointing ? checkpointed : (block) => block),
      conv_norm_out: groupNorm(config.norm_num_groups, width, { eps: config.norm_eps, silu: true }),
      conv_out: conv2d(width, config.out_channels, 3, { padding: 1 }),
    },
    (m, sample: Tensor, times: Tensor | Schedule, conditioning: Conditioning): Tensor => {
      const { cache } = conditioning;
      const [added] = once(cache, m.add_embedding, () => [
        m.add_embedding(addedConditions(conditioning, config.addition_time_embed_dim)),
      ]);
      const time = embedTime(m.time_embedding, times, added, { width, dtype: sample.dtype, cache });

      let h = m.conv_in(sample);
      const skips = [h];
      for (const block of m.down_blocks) {
        skips.push(...block(h, time, conditioning));
        h = skips[skips.length - 1];
      }
      h = m.mid_block(h, time, conditioning);
      for (const block of m.up_blocks) h = block(h, skips, time, conditioning);
      return m.conv_out(m.conv_norm_out(h));
    },
  );
}

export type UNet = ReturnType<typeof unet>;

/** [n, projection_dim + ids * dim]: the pooled prompt, then each id's sinusoids. */
function addedConditions({ textEmbeds, timeIds }: Conditioning, dim: number): Tensor {
  const [n, ids] = timeIds.shape;
  const embedded = timestepEmbedding(timeIds, dim).reshape(n, ids * dim);
  return concat([textEmbeds, cast(embedded, textEmbeds.dtype)], 1);
}
