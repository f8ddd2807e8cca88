// The tiny autoencoder (TAESD, Ollin Boer Bohan, github.com/madebyollin/taesd), as diffusers' AutoencoderTiny: 3x3 convolutions
// with ReLU, no norms and no attention. Its latents are the UNet's own, not a VAE's: scaling_factor is 1, and the encoder gives
// one latent, where a VAE's gives a posterior to draw from. Pictures are [n, h, w, 3] in [-1, 1], though in [0, 1] inside.
import { conv2dDoubled, doubledTaps } from '../../engine/doubled.ts';
import { conv2d } from '../../engine/layers.ts';
import { type AnyModule, type Module, module, parameter } from '../../engine/module.ts';
import { relu, scale, tanh } from '../../engine/ops/unary.ts';
import { scope, through } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import { isCount, isLayerCount, isListOf, isPositive, mostLayers } from '../checkpoint/config_values.ts';
import { paintTiles, tilesOf } from './tiles.ts';

export interface AutoencoderTinyConfig {
  in_channels: number;
  out_channels: number;
  latent_channels: number;
  encoder_block_out_channels: readonly number[];
  decoder_block_out_channels: readonly number[];
  num_encoder_blocks: readonly number[];
  num_decoder_blocks: readonly number[];
  scaling_factor: number;
  /** Where it stands in for a VAE whose config has them (`vaeFor`). */
  latents_mean?: readonly number[] | null;
  latents_std?: readonly number[] | null;
  /** The decoder's, by which pipelines tell how many pixels a latent has. */
  block_out_channels: readonly number[];
  force_upcast: false;
}

/** What diffusers takes for fields that config.json leaves out: TAESD's own sizes. */
const defaults = {
  in_channels: 3,
  out_channels: 3,
  latent_channels: 4,
  encoder_block_out_channels: [64, 64, 64, 64],
  decoder_block_out_channels: [64, 64, 64, 64],
  num_encoder_blocks: [1, 3, 3, 3],
  num_decoder_blocks: [3, 3, 3, 1],
  scaling_factor: 1,
};

/** What config.json may say in one way only, as TAESD has it. */
const fixed: Record<string, unknown> = {
  act_fn: 'relu',
  upsample_fn: 'nearest',
  upsampling_scaling_factor: 2,
  shift_factor: 0,
};

/** config.json of the published taesdxl, for files that come without one. */
export const taesdxlJson = (): Record<string, unknown> => ({ _class_name: 'AutoencoderTiny', ...defaults });

/** Reads an AutoencoderTiny's config.json. @throws UserError naming a field that asks for what is not built */
export function parseAutoencoderTinyConfig(json: Record<string, unknown>): AutoencoderTinyConfig {
  for (const [key, want] of Object.entries(fixed))
    if (key in json && json[key] !== want)
      throw new UserError(
        `the AutoencoderTiny's config.json: "${key}" is ${JSON.stringify(json[key])}, not ${JSON.stringify(want)}; use another, such as madebyollin/taesdxl`,
      );
  const config = { ...defaults, ...json } as typeof defaults;
  for (const key of Object.keys(defaults) as (keyof typeof defaults)[]) {
    const [want, holds] =
      key === 'scaling_factor'
        ? ['a number above 0', isPositive(config[key])]
        : key.startsWith('num_')
          ? [`a list of whole numbers from 1 to ${mostLayers}`, isListOf(isLayerCount, config[key])]
          : Array.isArray(defaults[key])
            ? ['a list of whole numbers of at least 1', isListOf(isCount, config[key])]
            : ['a whole number of at least 1', isCount(config[key])];
    if (!holds)
      throw new UserError(
        `the AutoencoderTiny's config.json: "${key}" is ${JSON.stringify(config[key])}, not ${want}; use another, such as madebyollin/taesdxl`,
      );
  }
  const { encoder_block_out_channels: down, decoder_block_out_channels: up } = config;
  const widths = [...down, ...up];
  const counts = [config.num_encoder_blocks.length, config.num_decoder_blocks.length, down.length, up.length];
  // Each level's first convolution has one width on both sides, so the widths cannot change.
  if (widths.some((c) => c !== widths[0]) || counts.some((n) => n !== counts[0]))
    throw new UserError(
      `the AutoencoderTiny's config.json: its levels have ${counts.join(', ')} entries and the widths ${widths.join(', ')}; take one whose levels are alike, such as madebyollin/taesdxl`,
    );
  return { ...config, block_out_channels: up, force_upcast: false };
}

type Layer = Module<[x: Tensor], Tensor>;

const conv = (cin: number, cout: number) => conv2d(cin, cout, 3, { padding: 1 });

/** A layer of its own in diffusers' list, where it counts without having weights. */
const activation = (): Layer => module({}, (_, x: Tensor) => relu(x));

/** AutoencoderTinyBlock: three convolutions with ReLU between them, past which x goes on, and ReLU of the sum. */
const block = (c: number): Layer =>
  module({ conv: [conv(c, c), undefined, conv(c, c), undefined, conv(c, c)] as const }, (m, x: Tensor) => {
    const [first, , second, , third] = m.conv;
    const activated = (layer: Layer) => (y: Tensor) => scope(() => relu(layer(y)));
    const hidden = through(x, [activated(first), activated(second)]);
    return relu(third(hidden, { residual: x }));
  });

/** The doubled image's convolution, without a bias; the doubling before it, a layer without weights, is never made. */
const upsampled = (c: number): Layer =>
  module({ weight: parameter([c, c, 3, 3], 'conv') }, (m, x: Tensor) =>
    conv2dDoubled(x, doubledTaps(m.weight.tensor)),
  );

const blocks = (count: number, c: number): Layer[] => Array.from({ length: count }, () => block(c));

/** Without the places in diffusers' list that have no weights. */
const present = (layers: readonly (Layer | undefined)[]): Layer[] =>
  layers.filter((layer) => layer !== undefined);

const encoder = ({
  in_channels,
  latent_channels,
  num_encoder_blocks: counts,
  encoder_block_out_channels: [c],
}: AutoencoderTinyConfig) =>
  module(
    {
      layers: [
        ...counts.flatMap((count, i): Layer[] => [
          i === 0 ? conv(in_channels, c) : conv2d(c, c, 3, { stride: 2, padding: 1, bias: false }),
          ...blocks(count, c),
        ]),
        conv(c, latent_channels),
      ],
    },
    // [-1, 1] → [0, 1].
    (m, x: Tensor) => through(scale(x, 0.5, 0.5), present(m.layers)),
  );

const decoder = ({
  latent_channels,
  out_channels,
  num_decoder_blocks: counts,
  decoder_block_out_channels: [c],
}: AutoencoderTinyConfig) =>
  module(
    {
      layers: [
        conv(latent_channels, c),
        activation(),
        ...counts.flatMap((count, i) => [
          ...blocks(count, c),
          ...(i < counts.length - 1 ? [undefined, upsampled(c)] : [conv(c, out_channels)]),
        ]),
      ],
    },
    // A soft clamp of the latents to ±3 before, [0, 1] → [-1, 1] after.
    (m, z: Tensor) => scale(through(scale(tanh(scale(z, 1 / 3)), 3), present(m.layers)), 2, -1),
  );

export interface AutoencoderTiny {
  readonly config: AutoencoderTinyConfig;
  /** The parameter tree, for loading. */
  readonly module: AnyModule;
  readonly posterior: false;
  /** x [n, h, w, 3] in [-1, 1] → latents [n, h/8, w/8, 4]. */
  encode(x: Tensor, options?: { tiling?: boolean }): { latents: Tensor };
  /** z [n, h, w, 4], divided by scaling_factor already → [n, 8h, 8w, 3], not clamped. */
  decode(z: Tensor, options?: { tiling?: boolean }): Tensor;
}

/** diffusers' tile_sample_min_size, in pixels, and tile_overlap_factor. */
const TILE = 512;
const OVERLAP = 0.125;

export function autoencoderTiny(config: AutoencoderTinyConfig): AutoencoderTiny {
  const tree = module({ encoder: encoder(config), decoder: decoder(config) }, () => undefined);
  const m = tree.children;
  const ratio = 2 ** (config.block_out_channels.length - 1);
  return {
    config,
    module: tree,
    posterior: false,
    encode: (x, { tiling = false } = {}) => ({
      latents: tiling ? tiled(x, TILE, TILE / ratio, m.encoder) : m.encoder(x),
    }),
    decode: (z, { tiling = false } = {}) => (tiling ? tiled(z, TILE / ratio, TILE, m.decoder) : m.decoder(z)),
  };
}

/** Runs `body` over tiles of `tileIn` pixels, which come out as `tileOut`; as in diffusers where x is one tile, too. */
const tiled = (x: Tensor, tileIn: number, tileOut: number, body: (tile: Tensor) => Tensor): Tensor =>
  scope(() => {
    const rows = tilesOf(x, tileIn, tileIn * (1 - OVERLAP), body);
    const { data, shape } = paintTiles(rows, tileOut * (1 - OVERLAP), tileOut * OVERLAP);
    return tensor(data, shape, { device: x.device, dtype: x.dtype });
  });
