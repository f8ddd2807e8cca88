// Training a ControlNet (Zhang et al. 2023): it and the frozen UNet see the same noised latents, captions and times, it also each
// picture's conditioning image, and the loss is that of the UNet under it. Nothing of the UNet is trained, so gradients run through
// its way up alone, to where the ControlNet's features are added.
import { holding } from '../engine/memory.ts';
import type { Tensors } from '../engine/op.ts';
import { sizeOf } from '../engine/tensor.ts';
import { UserError } from '../io/errors.ts';
import { preprocessControl, toGrey } from '../io/image.ts';
import type { Picture } from '../io/pixels.ts';
import type { ModelSource } from '../models/checkpoint.ts';
import type { Size } from '../models/conditioning.ts';
import {
  additionalResiduals,
  type ControlNet,
  controlnet,
  parseControlNetConfig,
} from '../models/controlnet.ts';
import { controlNetJson, startFromUNet } from '../models/controlnet_start.ts';
import { joined } from '../models/latents.ts';
import { loadControlNet, ofOneKind } from '../models/multicontrolnet.ts';
import type { Pipeline } from '../models/pipeline.ts';
import type { Asked } from '../models/request.ts';
import type { View } from './cache.ts';
import type { Network } from './objective.ts';
import { readConditioning } from './pictures.ts';
import type { Preview } from './preview_prompts.ts';
import type { Run } from './run.ts';
import type { PassInputs } from './task.ts';
import { type Added, besideUNet, numbersOf } from './twin.ts';

/** What passes give the UNet beside what it is always given. */
export interface Control {
  inputs(views: readonly View[], epoch: number, signal?: AbortSignal): Promise<PassInputs>;
  /** Inputs of the shapes that `n` pictures of a size have, without their numbers. */
  blank(n: number, size: Size): PassInputs;
  /** The network that such inputs make of a model. */
  network(model: Pipeline, inputs: Tensors): Network;
  /** Whether a view is shown without its caption in an epoch, whatever dataset.caption_dropout_rate says. */
  isUnprompted?(view: View, epoch: number): boolean;
  /** What a preview is given for it, over one of previews.validation_image where there are any. */
  preview(preview: Preview, image?: Picture): Partial<Asked>;
}

export const uncontrolled: Control = {
  inputs: async () => ({}),
  blank: () => ({}),
  network: ({ unet }) => unet,
  preview: () => ({}),
};

/** Conditioning images as an input of passes, for the network that is trained beside the UNet; in colour, or as grey levels. */
export function shown(
  run: Run,
  { network, preview }: Pick<Control, 'network' | 'preview'>,
  channels: 1 | 3 = 3,
): Control {
  const inputs = (n: number, [height, width]: Size, values: Float32Array): PassInputs => ({
    conditioning_pixel_values: { shape: [n, height, width, channels], values, dtype: run.dtype },
  });
  return {
    async inputs(views, _, signal) {
      const images = await Promise.all(views.map((view) => readConditioning(view, run, signal)));
      const seen = channels === 1 ? images.map(inGrey) : images;
      return inputs(views.length, views[0].geometry.target, joined(seen));
    },
    blank: (n, size) => inputs(n, size, new Float32Array(n * sizeOf(size) * channels)),
    network,
    preview,
  };
}

/** Pixels in [0, 1] that were bytes, as Pillow takes these to grey. */
function inGrey(values: Float32Array): Float32Array {
  const data = Uint8Array.from(values, (x) => Math.round(255 * x));
  return Float32Array.from(
    toGrey({ width: data.length / 3, height: 1, channels: 3, data }).data,
    (x) => x / 255,
  );
}

/** Conditioning images, for the pipeline's ControlNet. */
export const controlled = (run: Run): Control =>
  shown(run, {
    network:
      ({ unet, controlnet: [net] }, { conditioning_pixel_values: image }) =>
      (sample, times, conditioning) => {
        const residuals = ofOneKind(net)({ sample, times, conditioning }, image);
        return unet(sample, times, conditioning, additionalResiduals(residuals));
      },
    preview: ({ width, height }, image) => ({
      control_image: image && [preprocessControl(image, width, height)],
    }),
  });

/**
 * The pipeline with the ControlNet that a run trains: the one at `given`, or a new one made from the UNet.
 * @throws UserError where that one does not fit the model
 */
export function withControlNet(
  run: Run,
  pipeline: Pipeline,
  source: ModelSource,
  given?: ModelSource,
): { other: Pipeline; added: Added } {
  if (pipeline.aesthetic)
    throw new UserError(
      `${source.path} is a refiner, which takes no ControlNet; train one for the base model, with another "model"`,
    );
  const { gradient_checkpointing: gradientCheckpointing } = run.train;
  const { unet, unetConfig, ratio, device, dtype } = pipeline;
  const json = given
    ? given.config('controlnet')
    : controlNetJson(source.config('unet'), { ratio, ...run.controlnet });
  const config = parseControlNetConfig(json, `the config.json of ${given?.path ?? 'the new ControlNet'}`);
  const made = (): ControlNet => controlnet(config, { gradientCheckpointing });
  const net = given
    ? loadControlNet(given, { unet: unetConfig, ratio }, device, dtype, { gradientCheckpointing })
    : made();
  if (!given) holding('controlnet', () => startFromUNet(net, unet, numbersOf(run.seed)));
  const put = (own: ControlNet) => ({ controlnet: [own] });
  return besideUNet(pipeline, { name: 'controlnet', config: json, net, made, put });
}
