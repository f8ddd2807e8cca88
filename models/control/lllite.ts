// ControlNet-LLLite (kohya-ss 2023; networks/control_net_lllite.py of sd-scripts): no copy of the UNet, but two small layers beside each
// projection that its attentions read an image by: x + up(relu(mid([seen, relu(down(x))]))), where `seen` is what two or three strided
// convolutions make of the control picture at that level. No step changes `seen`, so it is made once an image. Files have kohya's keys,
// by the original's names of blocks; the config of one is what its shapes tell. Of several each adds to the same x, as in
// sd-webui-controlnet.
import { type Conv2d, conv2d, type Linear, linear } from '../../engine/layers.ts';
import { type Module, module } from '../../engine/module.ts';
import { concat } from '../../engine/ops/move.ts';
import { relu, scale } from '../../engine/ops/unary.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import { type Json, type ModelSource, openComponentFile } from '../checkpoint/checkpoint.ts';
import { isCount } from '../checkpoint/config_values.ts';
import { sourceOf, type WeightSource } from '../checkpoint/weights.ts';
import { openWeightsFile } from '../checkpoint/weights_file.ts';
import type { Size } from '../text/conditioning.ts';
import type { Steer, Steering } from '../unet/transformer.ts';
import { attentionProjections, type UNet, type UNetConfig, unet } from '../unet/unet.ts';
import { unetKeyInSgm } from '../unet/unet_keys.ts';

/** One of its modules. */
export interface LLLiteLayer {
  /** Width of what the projection reads. */
  in_dim: number;
  /** Width of what is seen of the picture, and of the layers between. */
  cond_emb_dim: number;
  mlp_dim: number;
  /** How far the picture is made smaller: to 1/8, 1/16 or 1/32 of its sides. */
  depth: 1 | 2 | 3;
}

/** By kohya's names, such as lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q. */
export type LLLiteConfig = Readonly<Record<string, LLLiteLayer>>;

/** Its file's name in the folder of a training. */
export const llliteFile = 'lllite.safetensors';

/** The class by which a source tells of one; diffusers has none. */
export const LLLITE = 'ControlNetLLLite';

export const isLLLiteSource = (source: ModelSource): boolean =>
  source.config('controlnet')._class_name === LLLITE;

export const isLLLiteFile = (names: readonly string[]): boolean =>
  names.some((name) => name.startsWith('lllite_unet_'));

/** Of the convolutions over the picture, by depth. */
const strides = { 1: [4, 2], 2: [4, 4], 3: [4, 4, 2] } as const;

/** The side of the squares of pixels that are seen as one. */
const squareOf = ({ depth }: Pick<LLLiteLayer, 'depth'>): number =>
  strides[depth].reduce((side, next) => side * next, 1);

/** What a file's shapes say it is. @throws UserError for what is beside attention's projections, or shapes of no LLLite */
export function parseLLLite({ where, names, info }: WeightSource): LLLiteConfig {
  const shapeOf = (key: string): readonly number[] => info(key)?.shape ?? [];
  const modules = [...new Set(names.map((name) => name.slice(0, name.indexOf('.'))))];
  const layers = modules.map((name) => {
    if (!/^lllite_unet_.+_(attn1_to_[qkv]|attn2_to_q)$/.test(name))
      throw new UserError(
        `${where} has ${name}, and a ControlNet-LLLite has modules for attn1_to_q, attn1_to_k, attn1_to_v and attn2_to_q of the UNet's blocks: give one that was trained with kohya's own choice of layers`,
      );
    const [mlp_dim, in_dim] = shapeOf(`${name}.down.0.weight`);
    const isDeep = names.includes(`${name}.conditioning1.4.weight`);
    const [cond_emb_dim, , side] = shapeOf(`${name}.conditioning1.${isDeep ? 4 : 2}.weight`);
    const depth: LLLiteLayer['depth'] = isDeep ? 3 : side === 4 ? 2 : 1;
    const layer = { in_dim, cond_emb_dim, mlp_dim, depth };
    if (!Object.values(layer).every(isCount))
      throw new UserError(
        `${where}: the shapes of ${name} make no module of a ControlNet-LLLite; download it again`,
      );
    return [name, layer] as const;
  });
  return Object.fromEntries(layers);
}

/** Opens a file of one, which needs no config.json. @throws UserError as parseLLLite */
export function openLLLite(path: string): ModelSource {
  const weights = sourceOf(path, [openWeightsFile(path)]);
  try {
    return openComponentFile(path, { _class_name: LLLITE, layers: parseLLLite(weights) } as Json);
  } finally {
    weights.close();
  }
}

export const llliteConfig = (source: ModelSource): LLLiteConfig =>
  source.config('controlnet').layers as LLLiteConfig;

/** A picture [n, h, w, 3] from -1 to 1 → [n, tokens, cond_emb_dim]. */
function conditioning({ cond_emb_dim: c, depth }: LLLiteLayer) {
  const sides = strides[depth];
  const half = Math.floor(c / 2);
  const convs = sides.map((side, i) => {
    const made = conv2d(i > 0 ? half : 3, i < sides.length - 1 ? half : c, side, { stride: side });
    return [2 * i, made] as const; // with ReLUs between them
  });
  return module(Object.fromEntries(convs), (m: Readonly<Record<string, Conv2d>>, picture: Tensor) => {
    const y = Object.values(m).reduce((h, conv, i) => conv(i > 0 ? relu(h) : h), picture);
    return y.reshape(y.shape[0], -1, c);
  });
}

const layer = (config: LLLiteLayer) => {
  const { in_dim, mlp_dim, cond_emb_dim } = config;
  return module(
    {
      conditioning1: conditioning(config),
      down: [linear(in_dim, mlp_dim)],
      mid: [linear(mlp_dim + cond_emb_dim, mlp_dim)],
      up: [linear(mlp_dim, in_dim)],
    },
    (m, x: Tensor, seen: Tensor) => m.up[0](relu(m.mid[0](concat([seen, relu(m.down[0](x))], 2)))),
  );
};

type Layers = Readonly<Record<string, ReturnType<typeof layer>>>;
export type LLLite = Module<[picture: Tensor], Map<string, Tensor>, Layers> & {
  readonly config: LLLiteConfig;
};

/** What each module sees, [n, tokens, cond_emb_dim], of a picture [n, h, w, 3] in [0, 1]. */
export function lllite(config: LLLiteConfig): LLLite {
  const layers = Object.entries(config).map(([name, each]) => [name, layer(each)]);
  const net = module(Object.fromEntries(layers) as Layers, (m, picture: Tensor) => {
    const ranged = scale(picture, 2, -1);
    return new Map(Object.entries(m).map(([name, { children }]) => [name, children.conditioning1(ranged)]));
  });
  return Object.assign(net, { config });
}

/** A UNet's projections by kohya's names. */
const projectionsIn = (net: UNet, config: UNetConfig) =>
  new Map(
    attentionProjections(net).map(({ path, ...each }) => [
      `lllite_unet_${unetKeyInSgm(path, config).replaceAll('.', '_')}`,
      each,
    ]),
  );

/** A new one's modules as kohya's script has them: on the way down and in the middle. @throws UserError for another VAE's `ratio` */
export function newLLLiteConfig(
  { unet, unetConfig, ratio }: { unet: UNet; unetConfig: UNetConfig; ratio: number },
  { network_dim: mlp_dim, cond_emb_dim }: { network_dim: number; cond_emb_dim: number },
): LLLiteConfig {
  const layers = [...projectionsIn(unet, unetConfig)].filter(([name]) => !name.includes('_output_blocks_'));
  return Object.fromEntries(
    layers.map(([name, { to, halvings }]) => {
      const square = ratio * 2 ** halvings;
      const depth = ([1, 2, 3] as const).find((depth) => squareOf({ depth }) === square);
      if (!depth)
        throw new UserError(
          `the UNet attends to squares of ${square} pixels, and a ControlNet-LLLite sees squares of 8, 16 or 32: train a ControlNet without "controlnet.network_dim"`,
        );
      return [name, { in_dim: to.children.weight.shape[1], cond_emb_dim, mlp_dim, depth }];
    }),
  );
}

/** @throws UserError where a module is for a projection that the UNet has not, or has otherwise, with a VAE of `ratio` */
export function checkLLLite(
  config: LLLiteConfig,
  { unet: unetConfig, ratio }: { unet: UNetConfig; ratio: number },
  where: string,
): void {
  const projections = projectionsIn(unet(unetConfig), unetConfig); // thousands of modules, for their names alone
  for (const [name, own] of Object.entries(config)) {
    const found = projections.get(name);
    const [, width] = found?.to.children.weight.shape ?? [];
    const square = found && ratio * 2 ** found.halvings;
    if (width !== own.in_dim || square !== squareOf(own))
      throw new UserError(
        `the ControlNet-LLLite of ${where} has ${name} for ${own.in_dim} features of squares of ${squareOf(own)} pixels, and the UNet ${found ? `${width} of ${square}` : 'no such layer'}: take one that was made for this model`,
      );
  }
}

/** @throws UserError where a picture is not whole squares */
export function checkLLLiteSize(config: LLLiteConfig, [height, width]: Size): void {
  const square = Math.max(...Object.values(config).map(squareOf));
  if (height % square || width % square)
    throw new UserError(
      `a ControlNet-LLLite sees squares of ${square}x${square} pixels, into which ${width}x${height} does not divide: give a width and a height that are multiples of ${square}`,
    );
}

/** What one does to a UNet that is controlled by what its modules have seen. */
export function steeringBy(
  net: LLLite,
  seen: ReadonlyMap<string, Tensor>,
  { unet, unetConfig }: { unet: UNet; unetConfig: UNetConfig },
  scale = 1,
): Steering {
  const projections = projectionsIn(unet, unetConfig);
  return new Map(
    [...seen].flatMap(([name, seen]) => {
      const to = projections.get(name)?.to;
      return to ? [[to, [{ layer: net.children[name], seen, scale }]] as const] : [];
    }),
  );
}

/** What several do to one UNet; undefined of none. */
export function joined(all: readonly Steering[]): Steering | undefined {
  if (all.length < 2) return all[0];
  const sum = new Map<Linear, readonly Steer[]>();
  for (const each of all) for (const [to, steers] of each) sum.set(to, [...(sum.get(to) ?? []), ...steers]);
  return sum;
}
