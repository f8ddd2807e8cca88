// The half of SDXL's UNet that a ControlNet has a copy of: the embeddings of the time and of the added conditions, the levels on
// the way down, and the middle block. A table of levels says each one's width and transformer depth. What does not depend on the
// latents (the embedded sizes and times) is computed once an image when the conditioning carries a ContextCache. Distilled UNets (SSD-1B,
// Segmind-Vega; Gupta et al. 2024) have depths of their own for each transformer of a level, and a lesser middle block or none.
import { conv2d, linear } from '../../engine/layers.ts';
import { module } from '../../engine/module.ts';
import { add } from '../../engine/ops/binary.ts';
import { concat } from '../../engine/ops/move.ts';
import { broadcast } from '../../engine/ops/reduce.ts';
import { timestepEmbedding } from '../../engine/ops/timestep_embedding.ts';
import { cast, scale, silu } from '../../engine/ops/unary.ts';
import { Tensor } from '../../engine/tensor.ts';
import type { DType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { isCount, isLayerCount, isListOf, isPositive, mostLayers } from '../checkpoint/config_values.ts';
import { downsample, type NormConfig, type Resnet, resnet, type Time } from './blocks.ts';
import { type ContextCache, once } from './context_cache.ts';
import { type Conditioning, type Level, type Transformer, transformer, type Wrap } from './transformer.ts';

/** Blocks of each transformer of a level: one number for all, or one for each. */
export type Depths = number | readonly number[];

/** The fields of diffusers' config.json that say what this half is. */
export interface EncoderConfig {
  in_channels: number;
  block_out_channels: readonly number[];
  layers_per_block: number;
  down_block_types: readonly string[];
  /** UNetMidBlock2D has one resnet and no transformer, null is no middle block; UNetMidBlock2DCrossAttn where absent. */
  mid_block_type?: string | null;
  /** Per level or one for all. Despite its name in diffusers, the NUMBER of heads. */
  attention_head_dim: number | readonly number[];
  /** Per level or one for all, and of a level one for each of its transformers or one for all. */
  transformer_layers_per_block: number | readonly Depths[];
  cross_attention_dim: number;
  addition_time_embed_dim: number;
  projection_class_embeddings_input_dim: number;
  norm_num_groups: number;
  norm_eps: number;
  /** Of UNets that are told the guidance they stand for (latent consistency models): the width of its embedding. */
  time_cond_proj_dim?: number | null;
}

/** What config.json may say in one way only, because SDXL's models all say so; what else changes a weight's shape shows there. */
const fixed: Record<string, unknown> = {
  act_fn: 'silu',
  addition_embed_type: 'text_time',
  class_embed_type: null,
  downsample_padding: 1,
  flip_sin_to_cos: true,
  freq_shift: 0,
  mid_block_scale_factor: 1,
  use_linear_projection: true,
};

/** A level without transformers may say so by a depth of 0. */
const isDepth = (value: unknown): boolean => value === 0 || isLayerCount(value);
const isType = (value: unknown): boolean => typeof value === 'string';

/** What a model's config.json has beside the fields of this half, and how errors tell of it. */
export interface ConfigRules {
  /** Such as unet/config.json. */
  file: string;
  /** Such as `an SDXL UNet`. */
  what: string;
  fixed: Readonly<Record<string, unknown>>;
  /** Fields that may be absent, or one of a few words. */
  oneOf?: Readonly<Record<string, readonly (string | null)[]>>;
  /** Fields that list widths, or a block type for each level, and fields that are numbers. */
  widths?: readonly string[];
  blockTypes?: readonly string[];
  counts?: readonly string[];
  /** Fields that are numbers of layers. */
  layers?: readonly string[];
  defaults: Readonly<Record<string, unknown>>;
}

/** Reads a config.json. @throws UserError naming a field that is absent, or asks for another architecture */
export function parseConfig<C extends EncoderConfig>(json: Record<string, unknown>, rules: ConfigRules): C {
  const complain = (key: string, want: string) =>
    new UserError(
      `${rules.file}: "${key}" is ${JSON.stringify(json[key])}, not ${want}; is this ${rules.what}?`,
    );
  for (const [key, want] of Object.entries({ ...fixed, ...rules.fixed })) {
    if (key in json && json[key] !== want) throw complain(key, JSON.stringify(want));
  }
  for (const [key, words] of Object.entries(rules.oneOf ?? {}))
    if (key in json && !words.includes(json[key] as string | null))
      throw complain(key, words.map(String).join(' or '));
  const config: Record<string, unknown> = { ...defaults, ...rules.defaults, ...json };
  for (const key of ['block_out_channels', ...(rules.widths ?? [])])
    if (!isListOf(isCount, config[key])) throw complain(key, 'a list of widths');
  const { length: levels } = config.block_out_channels as number[];
  for (const key of ['down_block_types', ...(rules.blockTypes ?? [])])
    if (!isListOf(isType, config[key], levels)) throw complain(key, `a list of ${levels} block types`);
  const heads = config.attention_head_dim;
  if (!isCount(heads) && !isListOf(isCount, heads, levels))
    throw complain('attention_head_dim', `a whole number of at least 1 or a list of ${levels}`);
  for (const key of [...counts, ...(rules.counts ?? [])])
    if (!isCount(config[key])) throw complain(key, 'a whole number of at least 1');
  const depths = 'transformer_layers_per_block';
  for (const key of ['layers_per_block', ...(rules.layers ?? [])])
    if (!isLayerCount(config[key])) throw complain(key, `a whole number from 1 to ${mostLayers}`);
  const layers = config.layers_per_block as number;
  if (!isDepth(config[depths]) && !areDepths(config[depths], levels, layers))
    throw complain(
      depths,
      `a whole number from 0 to ${mostLayers}, a list of ${levels}, or one with lists of ${layers} in it`,
    );
  if (!isPositive(config.norm_eps)) throw complain('norm_eps', 'a number above 0');
  return config as unknown as C;
}

/** A list of depths for each level, or of lists of one for each of its so many layers. */
export const areDepths = (value: unknown, levels: number, layers: number): boolean =>
  isListOf((level) => isDepth(level) || isListOf(isDepth, level, layers), value, levels);

const defaults = { norm_num_groups: 32, norm_eps: 1e-5, layers_per_block: 2 };
const counts = [
  'in_channels',
  'norm_num_groups',
  'cross_attention_dim',
  'addition_time_embed_dim',
  'projection_class_embeddings_input_dim',
];

export const times = <T>(count: number, make: (i: number) => T): T[] =>
  Array.from({ length: count }, (_, i) => make(i));

const each = <T>(value: number | readonly T[], i: number): number | T =>
  typeof value === 'number' ? value : value[i];

/** A level's transformers are of one width and so many heads, but each of a depth of its own. */
export interface LevelOf extends Omit<Level, 'depth'> {
  depths: Depths;
}

/** From the first level down, before block types decide where transformers are. */
export const levelsOf = (config: EncoderConfig): LevelOf[] =>
  config.block_out_channels.map((width, i) => ({
    width,
    heads: each(config.attention_head_dim, i),
    depths: each(config.transformer_layers_per_block, i),
  }));

const transformerOf = (
  { cross_attention_dim, norm_num_groups }: EncoderConfig,
  { width, heads, depths }: LevelOf,
  i: number,
  wrap?: Wrap,
): Transformer =>
  transformer({ width, heads, depth: each(depths, i) }, cross_attention_dim, norm_num_groups, wrap);

/** The transformers that follow resnets in a level whose blocks are of this type: as many, or none. */
export const attentionsOf = (
  config: EncoderConfig,
  { level, type, count, wrap }: { level: LevelOf; type: string; count: number; wrap?: Wrap },
): (Transformer | undefined)[] =>
  times(count, (i) => (type.startsWith('CrossAttn') ? transformerOf(config, level, i, wrap) : undefined));

/** The widths of all features that are pushed on the way down, from the first convolution's on. */
export const featureWidths = ({ block_out_channels, layers_per_block }: EncoderConfig): number[] => [
  block_out_channels[0],
  ...block_out_channels.flatMap((width, i) =>
    Array<number>(layers_per_block + (i < block_out_channels.length - 1 ? 1 : 0)).fill(width),
  ),
];

/** How wide a pooled prompt is that stands before the embedded sizes, six, or five with an aesthetic score (the refiner). */
export const pooledTaken = (
  { projection_class_embeddings_input_dim: all, addition_time_embed_dim: each }: EncoderConfig,
  aesthetic: boolean,
): number => all - (aesthetic ? 5 : 6) * each;

export const normOf = (config: EncoderConfig): NormConfig => ({
  groups: config.norm_num_groups,
  eps: config.norm_eps,
});

/** The width of the time embedding. */
export const timeWidth = ({ block_out_channels: [width] }: EncoderConfig): number => 4 * width;

/** Two linears with SiLU between, for the timestep and for the added conditions. Of the timestep a third may add what it is told to x. */
export const embeddingMlp = (inputs: number, width: number, told?: number | null) =>
  module(
    {
      linear_1: linear(inputs, width),
      linear_2: linear(width, width),
      cond_proj: told ? linear(told, inputs, { bias: false }) : undefined,
    },
    (m, x: Tensor, residual?: Tensor, cond?: Tensor) => {
      const h = cond && m.cond_proj ? m.cond_proj(cond, { residual: x }) : x;
      return m.linear_2(m.linear_1(h, { activation: 'silu' }), { residual });
    },
  );

/**
 * A level on the way down; returns what the way up will want, at most `count` of it, the last of all being its output. `more` (a
 * T2I-Adapter's) is added to what its transformers give before the downsampler, but where it has none to its output: as diffusers has it.
 */
const downBlock = (
  resnets: Resnet[],
  attentions: (Transformer | undefined)[],
  downsamplers: ReturnType<typeof downsample>[],
) =>
  module(
    { resnets, attentions, downsamplers },
    (m, x: Tensor, time: Time, conditioning: Conditioning, count: number, more?: Tensor): Tensor[] => {
      let h = x;
      const features: Tensor[] = [];
      const place = m.resnets.length + (m.attentions[0] ? 0 : m.downsamplers.length) - 1;
      const note = (made: Tensor): void => {
        h = more && features.length === place ? add(made, more) : made;
        features.push(h);
      };
      m.resnets.slice(0, count).forEach((resnet, i) => {
        const made = resnet(h, { time });
        note(m.attentions[i]?.(made, conditioning) ?? made);
      });
      if (features.length < count) for (const down of m.downsamplers) note(down(h));
      return features;
    },
  );

/** A resnet, and after each transformer another. */
const midBlock = (resnets: Resnet[], attentions: Transformer[]) =>
  module({ resnets, attentions }, (m, x: Tensor, time: Time, conditioning: Conditioning) => {
    let h = m.resnets[0](x, { time });
    m.attentions.forEach((attention, i) => {
      h = m.resnets[i + 1](attention(h, conditioning), { time });
    });
    return h;
  });

/** The modules of this half, under the UNet's names. */
export function encoder(config: EncoderConfig, wrap?: Wrap) {
  const levels = levelsOf(config);
  const [width] = config.block_out_channels;
  const [norm, ctemb] = [normOf(config), timeWidth(config)];
  const count = config.layers_per_block;
  const deepest = levels[levels.length - 1];
  let c = width;
  const to = (width: number): Resnet => {
    const made = resnet(c, width, norm, ctemb);
    c = width;
    return made;
  };
  const middleOf = () => {
    if (config.mid_block_type === null) return undefined;
    if (config.mid_block_type === 'UNetMidBlock2D') return midBlock([to(c)], []);
    // Of several depths the first, as in diffusers.
    return midBlock([to(c), to(c)], [transformerOf(config, deepest, 0, wrap)]);
  };
  return {
    conv_in: conv2d(config.in_channels, width, 3, { padding: 1 }),
    time_embedding: embeddingMlp(width, ctemb, config.time_cond_proj_dim),
    add_embedding: embeddingMlp(config.projection_class_embeddings_input_dim, ctemb),
    down_blocks: levels.map((level, i) =>
      downBlock(
        times(count, () => to(level.width)),
        attentionsOf(config, { level, type: config.down_block_types[i], count, wrap }),
        i < levels.length - 1 ? [downsample(c, [1, 1, 1, 1])] : [],
      ),
    ),
    mid_block: middleOf(),
  };
}

/** All times that an image is denoised at, float32 [steps, n], and the number of the one to take now, int32 [1]. */
export interface Schedule {
  times: Tensor;
  step: Tensor;
}

/** What a network is asked: a sample [n, h, w, in_channels] in the model's type, float32 times [n] or a schedule, and the rest. */
export interface Question {
  sample: Tensor;
  times: Tensor | Schedule;
  conditioning: Conditioning;
  /** Added to the first convolution's output, [n, h, w, c]. */
  hint?: Tensor;
  /** What becomes of that output. */
  fuse?(h: Tensor): Tensor;
  /** Added to the embedded conditions, [n, 4 c]. */
  more?(): Tensor;
  /** Added within the levels, one for each, and to the middle block's output. */
  intrablock?: readonly Tensor[];
  /** How many features are wanted, the first ones; all where absent. */
  count?: number;
}

/**
 * The features, the first convolution's first; of all of them the middle block's output (without one the last feature), when asked for;
 * and the time for the way up.
 */
export function encode(
  m: ReturnType<typeof encoder>,
  config: EncoderConfig,
  {
    sample,
    times,
    conditioning,
    hint,
    fuse,
    more,
    intrablock = [],
    count = Number.POSITIVE_INFINITY,
  }: Question,
): { features: Tensor[]; middle(): Tensor; time: Time } {
  const { cache } = conditioning;
  const [added] = once(cache, m.add_embedding, () => [
    m.add_embedding(addedConditions(conditioning, config.addition_time_embed_dim), more?.()),
  ]);
  const [width] = config.block_out_channels;
  const guidance = guidanceEmbedding(conditioning, config, sample.dtype);
  const time = embedTime(m.time_embedding, times, added, { width, dtype: sample.dtype, guidance, cache });
  const first = m.conv_in(sample, { residual: hint });
  let h = fuse?.(first) ?? first;
  const features = [h];
  for (const [i, block] of m.down_blocks.entries()) {
    if (features.length >= count) break;
    features.push(...block(h, time, conditioning, count - features.length, intrablock[i]));
    h = features[features.length - 1];
  }
  const middle = (): Tensor => {
    if (!m.mid_block) return h;
    const [made, within] = [m.mid_block(h, time, conditioning), intrablock.at(m.down_blocks.length)];
    return within ? add(made, within) : made;
  };
  return { features, middle, time };
}

/** SiLU of the embedded time and added conditions; of a schedule, of all its times at once. */
function embedTime(
  embedding: ReturnType<typeof embeddingMlp>,
  times: Tensor | Schedule,
  added: Tensor,
  {
    width,
    dtype,
    guidance,
    cache,
  }: { width: number; dtype: DType; guidance: Tensor | undefined; cache?: ContextCache },
): Time {
  const embed = (t: Tensor, residual: Tensor, cond?: Tensor): Tensor =>
    silu(embedding(cast(timestepEmbedding(t, width), dtype), residual, cond));
  if (times instanceof Tensor) return { temb: embed(times, added, guidance) };
  const { times: all, step } = times;
  const [steps, n] = all.shape;
  const each = (x: Tensor) => broadcast(x, 0, steps).reshape(steps * n, -1);
  const [temb] = once(cache, embedding, () => [
    embed(all.reshape(steps * n), each(added), guidance && each(guidance)),
  ]);
  return { temb, step, cache };
}

/** Sinusoids of 1000 w, sines first, as of diffusers' get_guidance_scale_embedding; none where nothing is told, or nobody hears it. */
const guidanceEmbedding = (
  { guidance }: Conditioning,
  { time_cond_proj_dim: dim }: EncoderConfig,
  dtype: DType,
): Tensor | undefined =>
  guidance && dim
    ? cast(timestepEmbedding(scale(guidance, 1000), dim, { flipSinToCos: false, shift: 1 }), dtype)
    : undefined;

/** [n, projection_dim + ids * dim]: the pooled prompt, then each id's sinusoids. */
function addedConditions({ textEmbeds, timeIds }: Conditioning, dim: number): Tensor {
  const [n, ids] = timeIds.shape;
  const embedded = timestepEmbedding(timeIds, dim).reshape(n, ids * dim);
  return concat([textEmbeds, cast(embedded, textEmbeds.dtype)], 1);
}
