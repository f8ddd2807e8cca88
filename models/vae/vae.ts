// The autoencoder (Rombach et al. 2022) between pictures and latents: encoder, decoder, and both in overlapping tiles
// for sizes that would not fit. Pictures are [n, h, w, 3] in [-1, 1]; latents are the VAE's own, not yet scaled.
import { conv2d, groupNorm, linear } from '../../engine/layers.ts';
import { type AnyModule, module } from '../../engine/module.ts';
import { attention } from '../../engine/ops/attention.ts';
import { slice } from '../../engine/ops/move.ts';
import { scope, through } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import { isCount, isLayerCount, isListOf, isPositive, mostLayers } from '../checkpoint/config_values.ts';
import { downsample, type NormConfig, type Resnet, resnet, upsample } from '../unet/blocks.ts';
import { ContextCache } from '../unet/context_cache.ts';
import { blendTiles, tilesOf } from './tiles.ts';

export interface VaeConfig {
  in_channels: number;
  out_channels: number;
  latent_channels: number;
  block_out_channels: readonly number[];
  layers_per_block: number;
  norm_num_groups: number;
  sample_size: number;
  scaling_factor: number;
  /** Of each channel, where latents are scaled channel by channel, too: Playground v2.5's. Both or none. */
  latents_mean?: readonly number[] | null;
  latents_std?: readonly number[] | null;
  use_quant_conv: boolean;
  use_post_quant_conv: boolean;
  /** Activations leave the range of float16, but not bfloat16's; false of a VAE that is mended, as fp16-fix. */
  force_upcast: boolean;
}

/** What SDXL's latents are multiplied by to have about the variance of noise. */
export const sdxlScalingFactor = 0.13025;

/** What diffusers takes for fields that config.json leaves out. */
const defaults = {
  in_channels: 3,
  out_channels: 3,
  latent_channels: 4,
  layers_per_block: 1,
  norm_num_groups: 32,
  sample_size: 32,
  scaling_factor: 0.18215,
  use_quant_conv: true,
  use_post_quant_conv: true,
  force_upcast: true,
};

/** What config.json may say in one way only, as SDXL's VAEs do. */
const fixed: Record<string, unknown> = { act_fn: 'silu' };

/** Reads vae/config.json. @throws UserError naming a field that is absent, or asks for what is not built */
export function parseVaeConfig(json: Record<string, unknown>): VaeConfig {
  if (!Array.isArray(json.block_out_channels)) {
    throw new UserError('vae/config.json: "block_out_channels" is missing; is this an AutoencoderKL?');
  }
  for (const [key, want] of Object.entries(fixed))
    if (key in json && json[key] !== want)
      throw new UserError(
        `vae/config.json: "${key}" is ${JSON.stringify(json[key])}, not ${JSON.stringify(want)}; use another VAE`,
      );
  const { sample_size: side = defaults.sample_size } = json;
  // Of a pair diffusers takes the first for its tiles.
  const sized = { ...defaults, ...json, sample_size: Array.isArray(side) ? side[0] : side };
  const config: Record<string, unknown> = sized;
  const wanted = (key: string, want: string) =>
    new UserError(
      `vae/config.json: "${key}" is ${JSON.stringify(config[key])}, not ${want}; is this an SDXL VAE's?`,
    );
  for (const key of counts) if (!isCount(config[key])) throw wanted(key, 'a whole number of at least 1');
  if (!isLayerCount(config.layers_per_block))
    throw wanted('layers_per_block', `a whole number from 1 to ${mostLayers}`);
  if (!isListOf(isCount, config.block_out_channels)) throw wanted('block_out_channels', 'a list of widths');
  if (!isPositive(config.scaling_factor)) throw wanted('scaling_factor', 'a number above 0');
  const { latents_mean: mean, latents_std: std, latent_channels } = config;
  if (mean || std) {
    const channels = latent_channels as number;
    if (!isListOf(Number.isFinite, mean, channels))
      throw wanted('latents_mean', 'a list of a number for each latent channel, as latents_std is');
    if (!isListOf(isPositive, std, channels))
      throw wanted('latents_std', 'a list of a number above 0 for each latent channel, as latents_mean is');
  }
  return sized as unknown as VaeConfig;
}

const counts = ['in_channels', 'out_channels', 'latent_channels', 'norm_num_groups', 'sample_size'];

const normOf = (config: VaeConfig): NormConfig => ({ groups: config.norm_num_groups, eps: 1e-6 });

/** One head over all pixels, with biases, unlike the UNet's. */
export const pixelAttention = (c: number, { groups, eps }: NormConfig) =>
  module(
    {
      group_norm: groupNorm(groups, c, { eps }),
      to_q: linear(c, c),
      to_k: linear(c, c),
      to_v: linear(c, c),
      to_out: [linear(c, c)],
    },
    (m, x: Tensor) => {
      const [n, h, w] = x.shape;
      const tokens = m.group_norm(x).reshape(n, h * w, c);
      const mixed = attention(m.to_q(tokens), m.to_k(tokens), m.to_v(tokens), { heads: 1 });
      return m.to_out[0](mixed, { residual: x.reshape(n, h * w, c) }).reshape(n, h, w, c);
    },
  );

const middle = (c: number, norm: NormConfig) =>
  module(
    { resnets: [resnet(c, c, norm), resnet(c, c, norm)], attentions: [pixelAttention(c, norm)] },
    (m, x: Tensor) => through(x, [m.resnets[0], m.attentions[0], m.resnets[1]]),
  );

const resnets = (count: number, inputs: number, outputs: number, norm: NormConfig): Resnet[] =>
  Array.from({ length: count }, (_, i) => resnet(i === 0 ? inputs : outputs, outputs, norm));

/** A level's layers, for the coder's own row: so what the level is given is freed as soon as its first layer has read it. */
const downLevel = (layers: number, inputs: number, outputs: number, norm: NormConfig, last: boolean) =>
  module(
    {
      resnets: resnets(layers, inputs, outputs, norm),
      // Zeros only right and below, as the original model was trained.
      downsamplers: last ? undefined : [downsample(outputs, [0, 0, 1, 1])],
    },
    (m) => [...m.resnets, ...(m.downsamplers ?? [])],
  );

const upLevel = (layers: number, inputs: number, outputs: number, norm: NormConfig, last: boolean) =>
  module(
    {
      resnets: resnets(layers, inputs, outputs, norm),
      upsamplers: last ? undefined : [upsample(outputs)],
    },
    (m, cache: ContextCache) => {
      const doubled = m.upsamplers?.map((up) => (y: Tensor) => {
        const [, h, w] = y.shape;
        return up(y, 2 * h, 2 * w, cache);
      });
      return [...m.resnets, ...(doubled ?? [])];
    },
  );

const encoder = (config: VaeConfig) => {
  const { block_out_channels: channels, latent_channels: latent, layers_per_block: layers } = config;
  const norm = normOf(config);
  const last = channels[channels.length - 1];
  return module(
    {
      conv_in: conv2d(config.in_channels, channels[0], 3, { padding: 1 }),
      down_blocks: channels.map((c, i) =>
        downLevel(layers, channels[Math.max(0, i - 1)], c, norm, i === channels.length - 1),
      ),
      mid_block: middle(last, norm),
      conv_norm_out: groupNorm(norm.groups, last, { eps: norm.eps, silu: true }),
      conv_out: conv2d(last, 2 * latent, 3, { padding: 1 }),
    },
    (m, x: Tensor) => {
      const down = m.down_blocks.flatMap((level) => level());
      return through(x, [m.conv_in, ...down, m.mid_block, m.conv_norm_out, m.conv_out]);
    },
  );
};

const decoder = (config: VaeConfig) => {
  const channels = [...config.block_out_channels].reverse();
  const norm = normOf(config);
  const layers = config.layers_per_block + 1;
  const last = channels[channels.length - 1];
  return module(
    {
      conv_in: conv2d(config.latent_channels, channels[0], 3, { padding: 1 }),
      mid_block: middle(channels[0], norm),
      up_blocks: channels.map((c, i) =>
        upLevel(layers, channels[Math.max(0, i - 1)], c, norm, i === channels.length - 1),
      ),
      conv_norm_out: groupNorm(norm.groups, last, { eps: norm.eps, silu: true }),
      conv_out: conv2d(last, config.out_channels, 3, { padding: 1 }),
    },
    (m, z: Tensor, cache: ContextCache) => {
      const up = m.up_blocks.flatMap((level) => level(cache));
      return through(z, [m.conv_in, m.mid_block, ...up, m.conv_norm_out, m.conv_out]);
    },
  );
};

export interface Moments {
  mean: Tensor;
  /** Log-variance as the model gives it; clamp to [-30, 20] before use. */
  logvar: Tensor;
}

export interface Vae {
  readonly config: VaeConfig;
  /** The parameter tree, for loading. */
  readonly module: AnyModule;
  readonly posterior: true;
  /** x [n, h, w, 3] in [-1, 1] → mean and log-variance, [n, h/8, w/8, 4] each. */
  encode(x: Tensor, options?: { tiling?: boolean }): Moments;
  /** z [n, h, w, 4], divided by scaling_factor already → [n, 8h, 8w, 3], not clamped. */
  decode(z: Tensor, options?: { tiling?: boolean }): Tensor;
}

/** Share of a tile that overlaps its neighbour, as diffusers' tile_overlap_factor. */
const OVERLAP = 0.25;

export function vae(config: VaeConfig): Vae {
  const { latent_channels: c } = config;
  const tree = module(
    {
      encoder: encoder(config),
      decoder: decoder(config),
      quant_conv: config.use_quant_conv ? conv2d(2 * c, 2 * c, 1) : undefined,
      post_quant_conv: config.use_post_quant_conv ? conv2d(c, c, 1) : undefined,
    },
    () => undefined,
  );
  const m = tree.children;
  const ratio = 2 ** (config.block_out_channels.length - 1);
  const latentTile = Math.floor(config.sample_size / ratio);
  const moments = (x: Tensor) => {
    const h = m.encoder(x);
    return m.quant_conv?.(h) ?? h;
  };
  return {
    config,
    module: tree,
    posterior: true,
    encode: (x, { tiling = false } = {}) =>
      scope(() => {
        const fits = Math.max(x.shape[1], x.shape[2]) <= config.sample_size;
        const h = tiling && !fits ? tiled(x, config.sample_size, latentTile, moments) : moments(x);
        return { mean: slice(h, 3, 0, c), logvar: slice(h, 3, c, c) };
      }),
    decode: (z, { tiling = false } = {}) =>
      scope(() => {
        const cache = new ContextCache();
        const picture = (part: Tensor) => m.decoder(m.post_quant_conv?.(part) ?? part, cache);
        const fits = Math.max(z.shape[1], z.shape[2]) <= latentTile;
        try {
          return tiling && !fits ? tiled(z, latentTile, config.sample_size, picture) : picture(z);
        } finally {
          cache.release();
        }
      }),
  };
}

/** Runs `body` over tiles of `tileIn` pixels and joins the results (tiles of `tileOut`) with a linear blend. */
function tiled(x: Tensor, tileIn: number, tileOut: number, body: (tile: Tensor) => Tensor): Tensor {
  const rows = tilesOf(x, tileIn, Math.floor(tileIn * (1 - OVERLAP)), body);
  const joined = blendTiles(rows, Math.floor(tileOut * OVERLAP), tileOut - Math.floor(tileOut * OVERLAP));
  return tensor(joined.data, joined.shape, { device: x.device, dtype: x.dtype });
}
