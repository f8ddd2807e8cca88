// Training a ControlNet (Zhang et al. 2023): it and the frozen UNet see the same noised latents, captions and times, it also each
// picture's conditioning image, and the loss is that of the UNet under it. Nothing of the UNet is trained, so gradients run through
// its way up alone, to where the ControlNet's features are added.
import { holding } from '../../engine/memory.ts';
import { preprocessControl } from '../../io/image.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import {
  additionalResiduals,
  type ControlNet,
  controlnet,
  parseControlNetConfig,
} from '../../models/control/controlnet.ts';
import { isLLLite, loadControlNet, ofOneKind } from '../../models/control/controlnet_kinds.ts';
import { controlNetJson, startFromUNet } from '../../models/control/controlnet_start.ts';
import { isLLLiteSource, steeringBy } from '../../models/control/lllite.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { numbersOf } from '../data/draws.ts';
import { type Added, besideUNet } from '../parts/added.ts';
import type { Run } from '../run/run.ts';
import { following } from './conditioning_image.ts';
import { type Control, refuseRefiner } from './control.ts';
import { withLLLite } from './lllite.ts';

/** Conditioning images, for the pipeline's ControlNet. */
export const controlled = (run: Run): Control =>
  following(run, {
    network:
      (pipeline, { conditioning_pixel_values: image }) =>
      (sample, times, conditioning) => {
        const { unet, controlnet } = pipeline;
        const [net] = controlnet;
        if (isLLLite(net)) {
          const steering = steeringBy(net, net(image), pipeline);
          return unet(sample, times, { ...conditioning, steering });
        }
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
  refuseRefiner(pipeline, source, 'ControlNet');
  if (given ? isLLLiteSource(given) : run.controlnet.network_dim > 0) return withLLLite(run, pipeline, given);
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
