// Training a ControlNet (Zhang et al. 2023): it and the frozen UNet see the same noised latents, captions and times, it also each
// picture's conditioning image, and the loss is that of the UNet under it. Nothing of the UNet is trained, so gradients run through
// its way up alone, to where the ControlNet's features are added.
import { holding } from '../engine/memory.ts';
import { namedParameters, unload } from '../engine/module.ts';
import type { Tensors } from '../engine/op.ts';
import { sizeOf } from '../engine/tensor.ts';
import { UserError } from '../io/errors.ts';
import type { Json, ModelSource } from '../models/checkpoint.ts';
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
import type { View } from './cache.ts';
import type { Network } from './objective.ts';
import { readConditioning } from './pictures.ts';
import type { Run } from './run.ts';
import { component, type PassInputs } from './task.ts';
import { type Added, numbersOf } from './twin.ts';

/** What passes give the UNet beside what it is always given. */
export interface Control {
  inputs(views: readonly View[], signal?: AbortSignal): Promise<PassInputs>;
  /** Inputs of the shapes that `n` pictures of a size have, without their numbers. */
  blank(n: number, size: Size): PassInputs;
  /** The network that such inputs make of a model. */
  network(model: Pipeline, inputs: Tensors): Network;
}

export const uncontrolled: Control = {
  inputs: async () => ({}),
  blank: () => ({}),
  network: ({ unet }) => unet,
};

/** Conditioning images, for the pipeline's ControlNet. */
export const controlled = (run: Run): Control => {
  const inputs = (n: number, [height, width]: Size, values: Float32Array): PassInputs => ({
    controlnet_cond: { shape: [n, height, width, 3], values, dtype: run.dtype },
  });
  return {
    async inputs(views, signal) {
      const images = await Promise.all(views.map((view) => readConditioning(view, run, signal)));
      return inputs(views.length, views[0].geometry.target, joined(images));
    },
    blank: (n, size) => inputs(n, size, new Float32Array(n * sizeOf(size) * 3)),
    network:
      ({ unet, controlnet: [net] }, { controlnet_cond: image }) =>
      (sample, times, conditioning) => {
        const residuals = ofOneKind(net)({ sample, times, conditioning }, image);
        return unet(sample, times, conditioning, additionalResiduals(residuals));
      },
  };
};

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
  return {
    other: {
      ...pipeline,
      controlnet: [net],
      release() {
        unload(net);
        pipeline.release();
      },
    },
    added: {
      component: component('controlnet', json as Json, net),
      putOn(other) {
        const own = made();
        return { other: { ...other, controlnet: [own] }, parameters: namedParameters(own) };
      },
    },
  };
}
