// Training an IP-Adapter (Ye et al. 2023): the UNet is shown, beside a caption, the picture that it has to denoise, as a frozen vision
// encoder sees it whole. What that says is asked beforehand (cache.ts), so that passes read it as they do captions' embeddings; of some
// pictures it is left away, for zeros. Gradients reach the projection and the new keys and values alone.
import type { Device } from '../../engine/device.ts';
import { holding } from '../../engine/memory.ts';
import { unload } from '../../engine/module.ts';
import { sizeOf } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import {
  parseVisionConfig,
  type VisionConfig,
  type VisionEncoder,
  visionEncoder,
} from '../../models/ip_adapter/clip_vision.ts';
import {
  fittingIPAdapter,
  type IPAdapter,
  ipAdapter,
  loadIPAdapter,
  readIPAdapter,
} from '../../models/ip_adapter/ip_adapter.ts';
import { newIPAdapterConfig, startIPAdapter } from '../../models/ip_adapter/ip_adapter_start.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { crossAttentions } from '../../models/unet/unet.ts';
import { joined } from '../../models/vae/latents.ts';
import { draws, numbersOf } from '../data/draws.ts';
import type { Sample } from '../data/survey.ts';
import type { PassInputs } from '../objective/pass_inputs.ts';
import { type Added, besideUNet } from '../parts/added.ts';
import type { Said } from '../pictures/cache.ts';
import type { Run } from '../run/run.ts';
import { type Control, refuseRefiner } from './control.ts';

/** What a run's IP-Adapter is made from: a vision encoder, and the file of one to go on with. */
export interface IPAdapterBegin {
  imageEncoder: ModelSource;
  path?: string;
}

/** What it will read, as its kind says. */
export const saidFor = ({ ip_adapter }: Run, { path }: IPAdapterBegin): Said =>
  (path ? readIPAdapter(path).resampler : ip_adapter.image_projection === 'Resampler')
    ? 'penultimate'
    : 'image_embeds';

export const visionConfig = ({ imageEncoder }: IPAdapterBegin): VisionConfig =>
  parseVisionConfig(imageEncoder.config('image_encoder'));

export function openImageEncoder(begin: IPAdapterBegin, device: Device, dtype: FloatDType): VisionEncoder {
  const encoder = visionEncoder(visionConfig(begin));
  holding('image_encoder', () => begin.imageEncoder.load('image_encoder', encoder, device, dtype));
  return encoder;
}

/** Pictures as the pipeline's IP-Adapter reads them. `read` has what the encoder says of one; undefined is one that is left away. */
export function prompted(
  run: Run,
  { ipAdapter: [{ config, encoder }] }: Pipeline,
  read: (sample: Sample | undefined) => Float32Array,
): Control {
  const { image_size, patch_size } = encoder.config;
  const shape = config.resampler
    ? [Math.floor(image_size / patch_size) ** 2 + 1, config.inputs]
    : [config.inputs];
  const inputs = (n: number, values: Float32Array): PassInputs => ({
    image_embeds: { shape: [n, ...shape], values, dtype: run.dtype },
  });
  const { zeros_image_embeddings_prob: share } = run.ip_adapter;
  return {
    async inputs(views, epoch) {
      const isLeft = ({ key }: Sample) => draws(run.seed, epoch, key, 'image_dropout').uniform() < share;
      const said = views.map(({ sample }) => read(isLeft(sample) ? undefined : sample));
      return inputs(views.length, joined(said));
    },
    blank: (n) => inputs(n, new Float32Array(n * sizeOf(shape))),
    network:
      ({ unet, ipAdapter: [{ module }] }, { image_embeds }) =>
      (sample, times, conditioning) => {
        const pairs = module(image_embeds);
        const images = new Map(crossAttentions(unet).map(({ children }, i) => [children, pairs[i]]));
        return unet(sample, times, { ...conditioning, images: [images] });
      },
    preview: (_, image) => ({ ip_adapter_image: image && [image] }),
  };
}

/**
 * The pipeline with the IP-Adapter that a run trains, a new one or the one that it goes on with. The encoder is loaded where there are
 * previews, which draw by pictures. @throws UserError where that one does not fit the model
 */
export function withIPAdapter(
  run: Run,
  pipeline: Pipeline,
  source: ModelSource,
  begin: IPAdapterBegin,
): { other: Pipeline; added: Added } {
  refuseRefiner(pipeline, source, 'IP-Adapter');
  const { device, dtype, unet } = pipeline;
  const { imageEncoder, path } = begin;
  const isSeen = run.previews.prompts.length > 0;
  const encoder = isSeen ? openImageEncoder(begin, device, dtype) : visionEncoder(visionConfig(begin));
  const config = path
    ? fittingIPAdapter({ path, imageEncoder }, pipeline)
    : newIPAdapterConfig(pipeline, encoder.config, run.ip_adapter.image_projection === 'Resampler');
  const made = (): IPAdapter['module'] => ipAdapter(config);
  const net = path ? loadIPAdapter(path, config, device, dtype) : made();
  if (!path) holding('ip_adapter', () => startIPAdapter(net, unet, numbersOf(run.seed)));
  const put = (module: IPAdapter['module']) => ({ ipAdapter: [{ config, module, encoder }] });
  const { other, added } = besideUNet(pipeline, {
    ...{ name: 'ip_adapter', file: ipAdapterFile, net, made, put },
  });
  return {
    added,
    other: {
      ...other,
      release() {
        unload(encoder);
        other.release();
      },
    },
  };
}

/** Its weights' file, as `sdxl sample --ip-adapter` knows it in a folder. */
export const ipAdapterFile = 'ip_adapter.safetensors';
