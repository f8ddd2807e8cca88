// T2I-Adapter for SDXL (Mou et al. 2023; T2IAdapter of diffusers, of the type full_adapter_xl): a small network that makes four
// features of a picture to follow, each added where a level of the UNet's way down, or its middle block, ends. No step changes them,
// so they are made once an image, and of several adapters summed (MultiAdapter). The tree spells diffusers' keys.
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { Device } from '../../engine/device.ts';
import { conv2d } from '../../engine/layers.ts';
import { holding } from '../../engine/memory.ts';
import { module } from '../../engine/module.ts';
import { add } from '../../engine/ops/binary.ts';
import { concat, permute, slice } from '../../engine/ops/move.ts';
import { broadcast, sum } from '../../engine/ops/reduce.ts';
import { cast, relu, scale } from '../../engine/ops/unary.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { preprocessAdapter } from '../../io/image.ts';
import { readJsonObject } from '../../io/json.ts';
import type { Picture } from '../../io/pixels.ts';
import { type Json, type ModelSource, openComponentFile } from '../checkpoint/checkpoint.ts';
import { isCount, isLayerCount, isListOf, mostLayers } from '../checkpoint/config_values.ts';
import { sourceOf, type WeightSource } from '../checkpoint/weights.ts';
import { openWeightsFile } from '../checkpoint/weights_file.ts';
import type { Size } from '../text/conditioning.ts';
import { times } from '../unet/unet_encoder.ts';
import type { Fitting } from './controlnet_kinds.ts';

/** The fields of diffusers' config.json that SDXL's T2I-Adapters may differ in. */
export interface T2IAdapterConfig {
  /** 3 for a picture in colour, 1 for grey levels. */
  in_channels: 1 | 3;
  /** The widths of the four features. */
  channels: readonly number[];
  num_res_blocks: number;
  /** The side of the squares of pixels that are seen as one. */
  downscale_factor: number;
}

/** Reads an adapter's config.json, or what stands for it; errors call it `where`. @throws UserError for SD 1.5's, and for one that is none */
export function parseT2IAdapterConfig(json: Json, where: string): T2IAdapterConfig {
  const { adapter_type: type = 'full_adapter' } = json;
  if (type !== 'full_adapter_xl')
    throw new UserError(
      `${where}: "adapter_type" is ${JSON.stringify(type)}, as those of SD 1.5 are: give a T2I-Adapter for SDXL, which is a full_adapter_xl`,
    );
  const config = { ...{ in_channels: 3, num_res_blocks: 2, downscale_factor: 8 }, ...json };
  const { channels = [320, 640, 1280, 1280] } = json;
  const rules: [key: string, holds: boolean, want: string][] = [
    ['in_channels', [1, 3].includes(config.in_channels), '3 (a picture in colour) or 1 (grey)'],
    ['channels', isListOf(isCount, channels, 4), 'a list of four widths'],
    ['num_res_blocks', isLayerCount(config.num_res_blocks), `a whole number from 1 to ${mostLayers}`],
    ['downscale_factor', isCount(config.downscale_factor), 'a whole number of at least 1'],
  ];
  for (const [key, holds, want] of rules)
    if (!holds)
      throw new UserError(
        `${where}: "${key}" is ${JSON.stringify(json[key])}, not ${want}; is this a T2I-Adapter for SDXL?`,
      );
  return { ...config, channels } as T2IAdapterConfig;
}

/** Whether a file has a T2I-Adapter under diffusers' keys, of whatever type. */
export const isT2IAdapter = (names: readonly string[]): boolean =>
  names.some((name) => /^adapter\.body\.0\.(resnets\.0\.block1|in_conv)\.weight$/.test(name));

/** SDXL's: the first latent of a level lower. */
const SQUARE = 16;

/** Opens an adapter's file, with its config.json beside it or without. @throws UserError for another file */
export function openT2IAdapterFile(path: string): ModelSource {
  const beside = join(dirname(path), 'config.json');
  const own = existsSync(beside) ? readJsonObject(beside) : {};
  if (own._class_name === 'T2IAdapter') return openComponentFile(path);
  const weights = sourceOf(path, [openWeightsFile(path)]);
  try {
    return openComponentFile(path, toldByWeights(weights));
  } finally {
    weights.close();
  }
}

/** @throws UserError for shapes that are no T2I-Adapter's for SDXL */
function toldByWeights({ where, names, info }: WeightSource): Json {
  const shapes = times(4, (i) => info(`adapter.body.${i}.resnets.0.block1.weight`)?.shape ?? []);
  const [, seen = 0] = info('adapter.conv_in.weight')?.shape ?? [];
  const in_channels = seen / SQUARE ** 2;
  if (![1, 3].includes(in_channels))
    throw new UserError(
      isT2IAdapter(names)
        ? `${where} is a T2I-Adapter that sees other squares than of ${SQUARE}x${SQUARE} pixels, as those of SD 1.5 do: give one for SDXL`
        : `${where} is no T2I-Adapter under diffusers' keys, as it has no adapter.body.0.resnets.0.block1.weight`,
    );
  const isOfFirst = (name: string) => /^adapter\.body\.0\.resnets\.\d+\.block1\.weight$/.test(name);
  return {
    ...{ _class_name: 'T2IAdapter', adapter_type: 'full_adapter_xl', downscale_factor: SQUARE },
    ...{
      in_channels,
      channels: shapes.map(([width]) => width),
      num_res_blocks: names.filter(isOfFirst).length,
    },
  };
}

const resnet = (c: number) =>
  module({ block1: conv2d(c, c, 3, { padding: 1 }), block2: conv2d(c, c, 1) }, (m, x: Tensor) =>
    m.block2(relu(m.block1(x)), { residual: x }),
  );

const block = (cin: number, cout: number, count: number, down: boolean) =>
  module(
    { in_conv: cin === cout ? undefined : conv2d(cin, cout, 1), resnets: times(count, () => resnet(cout)) },
    (m, x: Tensor) => {
      const h = down ? halved(x) : x;
      return m.resnets.reduce((h, each) => each(h), m.in_conv?.(h) ?? h);
    },
  );

/** The means of squares of 2x2, which are fewer at an odd end (AvgPool2d with ceil_mode). */
function halved(x: Tensor): Tensor {
  const twiceTheLast = (x: Tensor, axis: number): Tensor =>
    x.shape[axis] % 2 ? concat([x, slice(x, axis, x.shape[axis] - 1, 1)], axis) : x;
  const even = twiceTheLast(twiceTheLast(x, 1), 2);
  const [n, h, w, c] = even.shape;
  const rows = sum(even.reshape((n * h) / 2, 2, w * c), 1);
  return scale(sum(rows.reshape((n * h * w) / 4, 2, c), 1), 1 / 4).reshape(n, h / 2, w / 2, c);
}

/** Pictures [n, c, h, w] as [n, h / f, w / f, c f^2]: torch's pixel_unshuffle, channels last. */
function unshuffled(x: Tensor, f: number): Tensor {
  const [n, c, height, width] = x.shape;
  const [h, w] = [height / f, width / f];
  const squares = permute(x.reshape(n * c * h, f, w, f), [0, 2, 1, 3]);
  return permute(squares.reshape(n, c, h * w, f * f), [0, 2, 1, 3]).reshape(n, h, w, c * f * f);
}

/** Pictures [n, in_channels, h, w] in [0, 1] → their features, [n, h / f, w / f, c] twice and two of half the sides, rounded up. */
export function t2iAdapter({ in_channels, channels, num_res_blocks, downscale_factor }: T2IAdapterConfig) {
  const body = channels.map((width, i) =>
    block(i === 1 || i === 2 ? channels[i - 1] : width, width, num_res_blocks, i === 2),
  );
  const adapter = module(
    { conv_in: conv2d(in_channels * downscale_factor ** 2, channels[0], 3, { padding: 1 }), body },
    (m, pictures: Tensor): Tensor[] => {
      let h = m.conv_in(unshuffled(pictures, downscale_factor));
      return m.body.map((block) => {
        h = block(h);
        return h;
      });
    },
  );
  return module({ adapter }, (m, pictures: Tensor) => m.adapter(pictures));
}

export interface T2IAdapter {
  config: T2IAdapterConfig;
  module: ReturnType<typeof t2iAdapter>;
}

/** What an opened adapter is. @throws UserError as parseT2IAdapterConfig */
export const t2iAdapterConfig = (source: ModelSource): T2IAdapterConfig =>
  parseT2IAdapterConfig(source.config('adapter'), source.path);

/** Loads T2I-Adapters onto a device. @throws UserError where one does not fit its config, or the UNet and the VAE's `ratio` */
export const loadT2IAdapters = (
  sources: readonly ModelSource[],
  fitting: Fitting,
  device: Device,
  dtype: FloatDType,
): T2IAdapter[] =>
  sources.map((source) => {
    const config = t2iAdapterConfig(source);
    const [given, taken] = [featuresGiven(config), featuresTaken(fitting)].map(inWords);
    if (given !== taken)
      throw new UserError(
        `the T2I-Adapter of ${source.path} gives features ${given} of a picture's sides and the UNet takes ${taken}: take one that was made for this model`,
      );
    const module = t2iAdapter(config);
    holding('adapter', () => source.load('adapter', module, device, dtype));
    return { config, module };
  });

/** The width of a feature, and the side of the square of pixels that it has one of. */
type Feature = [width: number, square: number];

const inWords = (features: readonly Feature[]): string =>
  features.map(([width, square]) => `${width} wide at 1/${square}`).join(', ');

const featuresGiven = ({ channels, downscale_factor: f }: T2IAdapterConfig): Feature[] =>
  channels.map((width, i) => [width, i < 2 ? f : 2 * f]);

/** Behind a level's downsampler where it does not attend to the prompt, else before it, and behind the middle block. */
function featuresTaken({ unet, ratio }: Fitting): Feature[] {
  const { block_out_channels: widths, down_block_types: types } = unet;
  const last = widths.length - 1;
  const levels = [
    ...types.map((type, i) => (type.startsWith('CrossAttn') ? i : Math.min(i + 1, last))),
    last,
  ];
  return levels.map((level, i) => [widths[i] ?? widths[last], ratio * 2 ** level]);
}

/** The config.json of a new one, as the published ones for SDXL have it. @throws UserError where a model takes other features */
export function t2iAdapterJson(fitting: Fitting): Json {
  const taken = featuresTaken(fitting);
  const sizes = { channels: taken.map(([width]) => width), downscale_factor: taken[0][1] };
  const json = {
    ...{ _class_name: 'T2IAdapter', adapter_type: 'full_adapter_xl', in_channels: 3, num_res_blocks: 2 },
    ...sizes,
  };
  if (taken.length === 4 && inWords(featuresGiven(json as T2IAdapterConfig)) === inWords(taken)) return json;
  throw new UserError(
    `the UNet takes features ${inWords(taken)} of a picture's sides, which no T2I-Adapter for SDXL gives: train one for another model, or a ControlNet`,
  );
}

/** The part of a request that T2I-Adapters heed. */
export interface T2IAdapterRequest {
  /** A picture for each T2I-Adapter, of any size; it is resized to what is drawn. */
  adapter_image?: readonly Picture[];
  /** How many times the features of each are added: one number for all, or one, or nothing, for each; 1 where absent. */
  adapter_conditioning_scale?: number | readonly (number | undefined)[];
  /** The part of the steps, 0 to 1, after which they no longer are; 1 where absent. */
  adapter_conditioning_factor?: number;
}

/** A T2I-Adapter and what it follows. */
export interface Followed {
  adapter: T2IAdapter;
  picture: Picture;
  scale: number;
  size: Size;
}

/** What a request asks of each. @throws UserError where there is not one of each thing for each, or sides do not divide */
export function followedOf(
  adapters: readonly T2IAdapter[],
  { adapter_image: pictures = [], adapter_conditioning_scale: scales = 1 }: T2IAdapterRequest,
  size: Size,
): Followed[] {
  if (pictures.length !== adapters.length)
    throw new UserError(
      `adapter_image has ${pictures.length} pictures for ${adapters.length} T2I-Adapters: give one to each`,
    );
  if (adapters.length > 0 && typeof scales !== 'number' && scales.length !== adapters.length)
    throw new UserError(
      `adapter_conditioning_scale has ${scales.length} numbers for ${adapters.length} T2I-Adapters: give one, or one to each`,
    );
  return adapters.map((adapter, i) => {
    checkSquares(adapter.config, size);
    const factor = typeof scales === 'number' ? scales : scales[i];
    return { adapter, picture: pictures[i], scale: factor ?? 1, size };
  });
}

/** @throws UserError where a picture is not whole squares */
export function checkSquares({ downscale_factor: f }: T2IAdapterConfig, [height, width]: Size): void {
  if (height % f || width % f)
    throw new UserError(
      `a T2I-Adapter (--adapter) sees squares of ${f}x${f} pixels, into which ${width}x${height} does not divide: give a width and a height that are multiples of ${f}`,
    );
}

/** The sum of what adapters make of their pictures, for `rows` rows; undefined of none. */
export function featuresOf(
  followed: readonly Followed[],
  rows: number,
  device: Device,
  dtype: FloatDType,
): Tensor[] | undefined {
  if (followed.length === 0) return undefined;
  const given = followed.map(
    ({ adapter: { config, module }, picture, scale: factor, size: [height, width] }) => {
      const { data, shape } = preprocessAdapter(picture, config.in_channels, width, height);
      const features = module(cast(tensor(data, shape, { device }), dtype));
      return factor === 1 ? features : features.map((x) => scale(x, factor));
    },
  );
  const sums = given.reduce((all, more) => all.map((x, i) => add(x, more[i])));
  return sums.map((x) => broadcast(x, 0, rows).reshape(rows, ...x.shape.slice(1)));
}
