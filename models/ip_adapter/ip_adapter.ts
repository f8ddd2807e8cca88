// IP-Adapter (Ye et al. 2023): a picture, or several, beside the prompt. CLIP's vision encoder reads it, a projection makes tokens of
// that, and each attention over the prompt attends to these apart, by keys and values of its own: out = attn(q, k, v) + scale attn(q,
// k_ip, v_ip). Here are the files and the modules; image_prompt.ts makes keys and values of pictures.
import type { Device } from '../../engine/device.ts';
import { linear } from '../../engine/layers.ts';
import { holding } from '../../engine/memory.ts';
import { module } from '../../engine/module.ts';
import type { Tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { type ModelSource, openComponent } from '../checkpoint/checkpoint.ts';
import { loadAndClose, sourceOf, type WeightSource } from '../checkpoint/weights.ts';
import { refusePickle } from '../checkpoint/weights_file.ts';
import { crossAttentions, type UNet, type UNetConfig } from '../unet/unet.ts';
import { parseVisionConfig, type VisionConfig, type VisionEncoder, visionEncoder } from './clip_vision.ts';
import { HEAD, imageProjection, type ProjectionConfig } from './image_projection.ts';

export interface IPAdapterConfig extends ProjectionConfig {
  /** Widths of the UNet's attentions over the prompt, in the order in which diffusers registers them. */
  widths: readonly number[];
}

/** An adapter's file and the vision encoder that it was trained with. */
export interface IPAdapterSource {
  path: string;
  imageEncoder: ModelSource;
}

/** @param imageEncoder the folder of a CLIPVisionModelWithProjection */
export const openIPAdapter = (path: string, imageEncoder: string, variant?: string): IPAdapterSource => ({
  path,
  imageEncoder: openComponent(imageEncoder, { variant }),
});

/** Whether these are the names of an IP-Adapter's tensors, of whatever kind. */
export const isIPAdapter = (names: readonly string[]): boolean =>
  names.some((name) => /^ip_adapter\.\d+\.to_k_ip\.weight$/.test(name));

/** What a file's shapes say it is. @throws UserError for one that is no IP-Adapter, lacks a tensor, or is of another kind */
export function parseIPAdapter({ where, names, info }: WeightSource): IPAdapterConfig {
  if (!isIPAdapter(names))
    throw new UserError(`${where} is no IP-Adapter, as it has no tensors ip_adapter.*.to_k_ip.weight`);
  if (names.some((name) => /^image_proj\.(proj\.\d|perceiver_resampler)/.test(name)))
    throw new UserError(
      `${where} is an IP-Adapter of faces (FaceID or full-face), which sdxl does not run; give a plain or a plus one`,
    );
  const shapeOf = (name: string): readonly number[] => {
    const found = info(name);
    if (!found) throw new UserError(`${where} has no tensor ${name}; download it again`);
    return found.shape;
  };
  const count = names.filter((name) => name.endsWith('.to_k_ip.weight')).length;
  const widths = Array.from(
    { length: count },
    (_, i) => shapeOf(`ip_adapter.${2 * i + 1}.to_k_ip.weight`)[0],
  );
  const projection = projectionIn((name) => shapeOf(`image_proj.${name}`), names);
  const { resampler, ...sizes } = projection;
  const counts = [...Object.values({ ...sizes, ...resampler }), ...widths];
  const heads = (resampler?.inner ?? 0) / HEAD;
  if (!Number.isInteger(heads) || !counts.every((count) => Number.isInteger(count) && count > 0))
    throw new UserError(`${where}: the shapes of its tensors make no IP-Adapter; download it again`);
  return { ...projection, widths };
}

function projectionIn(
  shapeOf: (name: string) => readonly number[],
  names: readonly string[],
): ProjectionConfig {
  if (!names.includes('image_proj.latents')) {
    const [cross_attention_dim] = shapeOf('norm.weight');
    const [outputs, inputs] = shapeOf('proj.weight');
    return { tokens: outputs / cross_attention_dim, cross_attention_dim, inputs };
  }
  const [, tokens, width] = shapeOf('latents');
  return {
    tokens,
    cross_attention_dim: shapeOf('proj_out.weight')[0],
    inputs: shapeOf('proj_in.weight')[1],
    resampler: {
      width,
      depth: names.filter((name) => /^image_proj\.layers\.\d+\.0\.to_q\.weight$/.test(name)).length,
      inner: shapeOf('layers.0.0.to_q.weight')[0],
      feedForward: shapeOf('layers.0.1.1.weight')[0],
    },
  };
}

/** Reads a file's header. @throws UserError as parseIPAdapter, and for a pickle */
export function readIPAdapter(path: string): IPAdapterConfig {
  refusePickle(path);
  const file = openSafetensors(path);
  try {
    return parseIPAdapter(sourceOf(path, [file]));
  } finally {
    file.close();
  }
}

/** Of what the vision encoder says of a picture, keys and values for each of the UNet's attentions over the prompt. */
export function ipAdapter(config: IPAdapterConfig) {
  const c = config.cross_attention_dim;
  const pair = (width: number) =>
    module(
      { to_k_ip: linear(c, width, { bias: false }), to_v_ip: linear(c, width, { bias: false }) },
      (m, tokens: Tensor): [k: Tensor, v: Tensor] => [m.to_k_ip(tokens), m.to_v_ip(tokens)],
    );
  const pairs = config.widths.map(pair);
  // The even numbers are of the attentions of an image over itself.
  const numbered = pairs.flatMap((each) => [undefined, each]);
  return module({ image_proj: imageProjection(config), ip_adapter: numbered }, (m, states: Tensor) => {
    const tokens = m.image_proj(states);
    return pairs.map((each) => each(tokens));
  });
}

export interface IPAdapter {
  config: IPAdapterConfig;
  module: ReturnType<typeof ipAdapter>;
  /** Adapters may share it. */
  encoder: VisionEncoder;
}

/** How wide what an adapter reads of an encoder is: the states of its tokens, or their embedding. */
export const widthRead = (
  { resampler }: Pick<ProjectionConfig, 'resampler'>,
  encoder: VisionConfig,
): number => (resampler ? encoder.hidden_size : encoder.projection_dim);

/** Loads IP-Adapters onto a device, each vision encoder once. @throws UserError where one does not fit its encoder or the UNet */
export function loadIPAdapters(
  sources: readonly IPAdapterSource[],
  model: { unet: UNet; unetConfig: UNetConfig },
  device: Device,
  dtype: FloatDType,
): IPAdapter[] {
  const encoders = new Map<string, VisionEncoder>();
  return sources.map((source) => {
    const { path, imageEncoder } = source;
    const config = fittingIPAdapter(source, model);
    const encoder =
      encoders.get(imageEncoder.path) ??
      visionEncoder(parseVisionConfig(imageEncoder.config('image_encoder')));
    if (!encoders.has(imageEncoder.path))
      holding('image_encoder', () => imageEncoder.load('image_encoder', encoder, device, dtype));
    encoders.set(imageEncoder.path, encoder);
    return { config, module: loadIPAdapter(path, config, device, dtype), encoder };
  });
}

/** A file's weights onto a device. */
export function loadIPAdapter(
  path: string,
  config: IPAdapterConfig,
  device: Device,
  dtype: FloatDType,
): IPAdapter['module'] {
  const adapter = ipAdapter(config);
  const weights = sourceOf(path, [openSafetensors(path)]);
  holding('ip_adapter', () => loadAndClose(adapter, weights, device, dtype));
  return adapter;
}

/** What an IP-Adapter is. @throws UserError where it does not fit its encoder or the UNet */
export function fittingIPAdapter(
  { path, imageEncoder }: IPAdapterSource,
  { unet, unetConfig }: { unet: UNet; unetConfig: UNetConfig },
): IPAdapterConfig {
  const config = readIPAdapter(path);
  checkFit(path, config, unet, unetConfig);
  const given = widthRead(config, parseVisionConfig(imageEncoder.config('image_encoder')));
  if (given !== config.inputs)
    throw new UserError(
      `${path} reads ${config.inputs} numbers of an image encoder and ${imageEncoder.path} gives ${given}: take the one that it was made with`,
    );
  return config;
}

/** Of the attentions over the prompt, in diffusers' order. */
export const attentionWidths = (unet: UNet): number[] =>
  crossAttentions(unet).map(({ children }) => children.to_k.children.weight.shape[0]);

function checkFit(path: string, config: IPAdapterConfig, unet: UNet, unetConfig: UNetConfig): void {
  const widths = attentionWidths(unet);
  const { cross_attention_dim: own } = config;
  const mend = 'take one that was made for this model';
  if (own !== unetConfig.cross_attention_dim)
    throw new UserError(
      `${path} makes tokens of width ${own} and the UNet attends to ${unetConfig.cross_attention_dim}: ${mend}`,
    );
  if (widths.length !== config.widths.length)
    throw new UserError(
      `${path} has keys and values for ${config.widths.length} layers and the UNet ${widths.length} that attend to the prompt: ${mend}`,
    );
  const at = widths.findIndex((width, i) => width !== config.widths[i]);
  if (at >= 0)
    throw new UserError(
      `${path} has ip_adapter.${2 * at + 1} of width ${config.widths[at]} for a layer of the UNet of ${widths[at]}: ${mend}`,
    );
}
