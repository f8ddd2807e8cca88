// SDXL's UNet (Podell et al. 2023, section 2.1), base and refiner from one description: features pushed on the way down
// (unet_encoder.ts) and taken on the way up, the last first, each with what a ControlNet adds to it. The way up may be cut in two, to
// keep what the deeper part gives (DeepCache). The tree spells diffusers' keys.
import { checkpointed } from '../../engine/checkpointing.ts';
import { conv2d, groupNorm } from '../../engine/layers.ts';
import { module } from '../../engine/module.ts';
import { add } from '../../engine/ops/binary.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import { isCount, isListOf, mostLayers } from '../checkpoint/config_values.ts';
import { type Resnet, resnet, type Time, upsample } from './blocks.ts';
import { applyFreeU } from './freeu.ts';
import type { Conditioning, Transformer, Wrap } from './transformer.ts';
import {
  areDepths,
  attentionsOf,
  type Depths,
  type EncoderConfig,
  encode,
  encoder,
  featureWidths,
  levelsOf,
  normOf,
  parseConfig,
  type Schedule,
  times,
  timeWidth,
} from './unet_encoder.ts';

/** The fields of diffusers' unet/config.json that SDXL's UNets differ in. */
export interface UNetConfig extends EncoderConfig {
  out_channels: number;
  /** The latent's side that the model was trained for, or its height and width. */
  sample_size: number | readonly number[];
  up_block_types: readonly string[];
  /** Of the way up, from its first level on; those of the way down in reverse where absent. */
  reverse_transformer_layers_per_block?: readonly Depths[] | null;
}

const refusal = (key: string, value: unknown, want: string) =>
  new UserError(`unet/config.json: "${key}" is ${JSON.stringify(value)}, not ${want}; is this an SDXL UNet?`);

/** Reads unet/config.json. @throws UserError naming a field that is absent, or asks for another architecture */
export function parseUNetConfig(json: Record<string, unknown>): UNetConfig {
  trainedSides(json);
  const { time_cond_proj_dim: told = null } = json;
  if (told !== null && !(isCount(told) && (told as number) % 2 === 0 && (told as number) > 2))
    throw refusal('time_cond_proj_dim', told, 'an even number above 2');
  const config = parseConfig<UNetConfig>(json, {
    file: 'unet/config.json',
    what: 'an SDXL UNet',
    fixed: {
      center_input_sample: false,
      resnet_out_scale_factor: 1,
      resnet_skip_time_act: false,
      time_embedding_act_fn: null,
      timestep_post_act: null,
    },
    oneOf: { mid_block_type: ['UNetMidBlock2DCrossAttn', 'UNetMidBlock2D', null] },
    blockTypes: ['up_block_types'],
    counts: ['out_channels'],
    defaults: { sample_size: 128, mid_block_type: 'UNetMidBlock2DCrossAttn' },
  });
  refuseDepths(config);
  return config;
}

/** @throws UserError where the depths of the way up are no such, or those of the way down do not say them and they are absent */
function refuseDepths({ transformer_layers_per_block: down, ...config }: UNetConfig): void {
  const key = 'reverse_transformer_layers_per_block';
  const [levels, layers] = [config.block_out_channels.length, config.layers_per_block + 1];
  const up = config[key] ?? null;
  if (up === null ? Array.isArray(down) && down.some(Array.isArray) : !areDepths(up, levels, layers))
    throw refusal(
      key,
      up,
      `a list of ${levels} whole numbers from 0 to ${mostLayers} or lists of ${layers}${up === null ? ', which lists in "transformer_layers_per_block" ask for' : ''}`,
    );
}

/** The latent's height and width that a model was trained for: sample_size may be one side or both. @throws UserError for another */
export function trainedSides({ sample_size }: Record<string, unknown>): [height: number, width: number] {
  const told = sample_size ?? 128;
  const sides = Array.isArray(told) ? told : [told, told];
  if (isListOf(isCount, sides, 2)) return sides as [number, number];
  throw refusal('sample_size', told, 'a whole number of at least 1 or a pair of them');
}

/** A part of the way up: through the layers that take the features below `from`, down to `to`. */
interface Ascent {
  features: readonly Tensor[];
  from: number;
  to: number;
  time: Time;
  conditioning: Conditioning;
}

/** A level on the way up: each resnet takes a feature, from the `last` on down; upsampling aims at the size of the next. */
const upBlock = (
  { level, last }: { level: number; last: number },
  resnets: Resnet[],
  attentions: (Transformer | undefined)[],
  upsamplers: ReturnType<typeof upsample>[],
) =>
  module(
    { resnets, attentions, upsamplers },
    (m, x: Tensor, { features, from, to, time, conditioning }: Ascent): Tensor => {
      const { freeu, cache } = conditioning;
      const has = (feature: number) => feature < from && feature >= to;
      const next = last - m.resnets.length;
      let h = x;
      m.resnets.forEach((resnet, i) => {
        if (!has(last - i)) return;
        const taken = { x: h, skip: features[last - i] };
        const whose = { block: m, layer: resnet, cache };
        const { x, skip } = freeu ? applyFreeU(freeu, level, taken, whose) : taken;
        h = resnet(x, { time, skip });
        h = m.attentions[i]?.(h, conditioning) ?? h;
      });
      if (!has(next + 1)) return h;
      for (const up of m.upsamplers) {
        const [, height, width] = features[next].shape;
        h = up(h, height, width, cache);
      }
      return h;
    },
  );

/** The levels on the way up. Widths are popped here exactly as forward pops features. */
function upBlocks(config: UNetConfig, wrap: Wrap) {
  const own = config.reverse_transformer_layers_per_block;
  const levels = levelsOf(config)
    .toReversed()
    .map((level, i) => (own ? { ...level, depths: own[i] } : level));
  const skips = featureWidths(config);
  const count = config.layers_per_block + 1;
  let c = levels[0].width;
  return levels.map((level, i) => {
    const resnets = times(count, () => {
      const made = resnet(c + (skips.pop() as number), level.width, normOf(config), timeWidth(config));
      c = level.width;
      return made;
    });
    const attentions = attentionsOf(config, { level, type: config.up_block_types[i], count, wrap });
    const last = skips.length + count - 1;
    return upBlock({ level: i, last }, resnets, attentions, i < levels.length - 1 ? [upsample(c)] : []);
  });
}

/** What is added to the UNet's features and its middle block's output, in diffusers' words. */
export interface AdditionalResiduals {
  /** A ControlNet's, for the way up: as many as the features that are made, the first convolution's first. */
  down_block_additional_residuals?: readonly Tensor[];
  /** Where all are. */
  mid_block_additional_residual?: Tensor;
  /** A T2I-Adapter's, for the way down too: one for each level, and the middle block's. */
  down_intrablock_additional_residuals?: readonly Tensor[];
}

/** Where DeepCache cuts the UNet (deepcache.ts), and what the layers below the cut give to those above it. */
export interface DeepFeature {
  /** The last feature above the cut. */
  branch: number;
  /** Stands for what the layers below would give; they do not run. */
  kept?: Tensor;
  /** Is given what they give. */
  keep?(h: Tensor): void;
}

/** How many features are made: all where undefined. */
export const featuresMade = (deep?: DeepFeature): number | undefined => deep?.kept && deep.branch + 1;

/**
 * Predicts what the model was trained to predict (noise, for SDXL) from `sample` [n, h, w, in_channels] in the model's
 * type and `times` float32 [n] or a schedule; returns [n, h, w, out_channels]. Any h and w. With gradient checkpointing,
 * transformer blocks run again in backward instead of keeping their activations.
 */
export function unet(config: UNetConfig, { gradientCheckpointing = false } = {}) {
  const [width] = config.block_out_channels;
  const all = featureWidths(config).length;
  const wrap: Wrap = gradientCheckpointing ? checkpointed : (block) => block;
  return module(
    {
      ...encoder(config, wrap),
      up_blocks: upBlocks(config, wrap),
      conv_norm_out: groupNorm(config.norm_num_groups, width, { eps: config.norm_eps, silu: true }),
      conv_out: conv2d(width, config.out_channels, 3, { padding: 1 }),
    },
    (
      m,
      sample: Tensor,
      times: Tensor | Schedule,
      conditioning: Conditioning,
      residuals?: AdditionalResiduals,
      deep?: DeepFeature,
    ): Tensor => {
      const cut = deep ? deep.branch + 1 : 0;
      const intrablock = residuals?.down_intrablock_additional_residuals;
      const question = { sample, times, conditioning, intrablock, count: featuresMade(deep) };
      const { features: own, middle, time } = encode(m, config, question);
      const plus = (x: Tensor, more?: Tensor): Tensor => (more ? add(x, more) : x);
      const features = own.map((x, i) => plus(x, residuals?.down_block_additional_residuals?.[i]));
      const up = (x: Tensor, from: number, to: number): Tensor => {
        if (from === to) return x;
        let h = from === all ? plus(x, residuals?.mid_block_additional_residual) : x;
        for (const block of m.up_blocks) h = block(h, { features, from, to, time, conditioning });
        return h;
      };
      const h = deep?.kept ?? up(middle(), all, cut);
      deep?.keep?.(h);
      return m.conv_out(m.conv_norm_out(up(h, cut, 0)));
    },
  );
}

export type UNet = ReturnType<typeof unet>;

/**
 * The transformer blocks with the path of their transformer and how often its image is halved, in the order in which diffusers registers
 * them: the middle block's last, where it has some.
 */
function transformerBlocks({ children: { down_blocks, up_blocks, mid_block } }: UNet) {
  const last = down_blocks.length - 1;
  const blocks = [
    ...down_blocks.map(({ children }, i) => [`down_blocks.${i}`, i, children.attentions] as const),
    ...up_blocks.map(({ children }, i) => [`up_blocks.${i}`, last - i, children.attentions] as const),
    ['mid_block', last, mid_block?.children.attentions ?? []] as const,
  ];
  return blocks.flatMap(([block, halvings, attentions]) =>
    attentions.flatMap((each: Transformer | undefined, i) =>
      (each?.children.transformer_blocks ?? []).map(({ children }, j) => ({
        ...{ transformer: `${block}.attentions.${i}`, j, halvings, children },
      })),
    ),
  );
}

/** The attentions over the prompt, each with the path of its transformer and how often the latents are halved there. */
export const crossAttentions = (unet: UNet) =>
  transformerBlocks(unet).map(({ transformer, halvings, children }) => ({
    ...{ transformer, halvings, children: children.attn2.children },
  }));

/** The projections by which attentions read an image, by their paths, each with how often the latents are halved there. */
export const attentionProjections = (unet: UNet) =>
  transformerBlocks(unet).flatMap(({ transformer, j, halvings, children: { attn1, attn2 } }) => {
    const { to_q, to_k, to_v } = attn1.children;
    const { to_q: ofPrompt } = attn2.children;
    const own = { 'attn1.to_q': to_q, 'attn1.to_k': to_k, 'attn1.to_v': to_v, 'attn2.to_q': ofPrompt };
    return Object.entries(own).map(([name, to]) => ({
      ...{ path: `${transformer}.transformer_blocks.${j}.${name}`, to, halvings },
    }));
  });

/** The attentions of an image over itself, with their paths. */
export const selfAttentions = (unet: UNet) =>
  transformerBlocks(unet).map(({ transformer, j, children }) => ({
    ...{ path: `${transformer}.transformer_blocks.${j}.attn1`, children: children.attn1.children },
  }));
