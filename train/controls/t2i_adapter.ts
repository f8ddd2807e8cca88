// Training a T2I-Adapter (Mou et al. 2023), as a ControlNet is (controlnet.ts): beside the frozen UNet, shown each picture's conditioning
// image. The UNet's way down goes on from where features are added, so gradients run through all of it but the first level.
import { holding } from '../../engine/memory.ts';
import { namedParameters } from '../../engine/module.ts';
import { unscoped } from '../../engine/scope.ts';
import { begun } from '../../models/adapters/layer_init.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import {
  loadT2IAdapters,
  parseT2IAdapterConfig,
  type T2IAdapter,
  t2iAdapter,
  t2iAdapterJson,
} from '../../models/control/t2i_adapter.ts';
import type { Pipeline } from '../../models/pipeline.ts';
import { channelsFirst } from '../../models/vae/latents.ts';
import { numbersOf } from '../data/draws.ts';
import { type Added, besideUNet } from '../parts/added.ts';
import type { Run } from '../run/run.ts';
import { following } from './conditioning_image.ts';
import { type Control, refuseRefiner } from './control.ts';

/** Conditioning images, for the pipeline's T2I-Adapter. */
export const adapted = (run: Run, { adapter: [{ config }] }: Pipeline): Control =>
  following(
    run,
    {
      network:
        ({ unet, adapter: [{ module }] }, { conditioning_pixel_values: image }) =>
        (sample, times, conditioning) =>
          unet(sample, times, conditioning, {
            down_intrablock_additional_residuals: module(channelsFirst(image)),
          }),
      preview: (_, image) => ({ adapter_image: image && [image] }),
    },
    config.in_channels,
  );

/**
 * The pipeline with the T2I-Adapter that a run trains: the one at `given`, or a new one of the published ones' shape.
 * @throws UserError where the model takes none of it
 */
export function withT2IAdapter(
  run: Run,
  pipeline: Pipeline,
  source: ModelSource,
  given?: ModelSource,
): { other: Pipeline; added: Added } {
  refuseRefiner(pipeline, source, 'T2I-Adapter');
  const { unetConfig: unet, ratio, device, dtype } = pipeline;
  const config = given ? given.config('adapter') : t2iAdapterJson({ unet, ratio });
  const parsed = parseT2IAdapterConfig(config, given?.path ?? 'the new T2I-Adapter');
  const made = (): T2IAdapter['module'] => t2iAdapter(parsed);
  const place = { device, dtype };
  const net = given ? loadT2IAdapters([given], { unet, ratio }, device, dtype)[0].module : made();
  if (!given)
    holding('adapter', () => {
      const own = namedParameters(net);
      for (const [key, parameter] of own)
        parameter.tensor = unscoped(() => begun(key, own, numbersOf(run.seed), place));
    });
  const put = (own: T2IAdapter['module']) => ({ adapter: [{ config: parsed, module: own }] });
  return besideUNet(pipeline, { name: 'adapter', config, net, made, put });
}
