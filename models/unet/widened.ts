// A model whose UNet sees more than latents, begun from one that does not: the first convolution has further channels, whose weights are
// zero, so that it says at first what it said before (Brooks et al. 2023, section 3.2; runwayml's inpainting model began so too).
import { namedParameters, unload } from '../../engine/module.ts';
import { concat } from '../../engine/ops/move.ts';
import { keep, scope, unscoped } from '../../engine/scope.ts';
import { zeros } from '../../engine/tensor.ts';
import type { ModelSource } from '../checkpoint/checkpoint.ts';
import { parseUNetConfig, unet } from './unet.ts';

/** `source` with a UNet of `channels`, more than its own has. Its weights can be loaded, and not read one by one. */
export function widened(source: ModelSource, channels: number): ModelSource {
  const config = (component: string) => ({
    ...source.config(component),
    ...(component === 'unet' && { in_channels: channels }),
  });
  return {
    ...source,
    config,
    weights(component) {
      if (component === 'unet') throw new Error('a widened UNet is made as it is loaded');
      return source.weights(component);
    },
    load(component, module, device, dtype) {
      if (component !== 'unet') return source.load(component, module, device, dtype);
      const narrow = unet(parseUNetConfig(source.config('unet')));
      source.load('unet', narrow, device, dtype);
      const own = namedParameters(narrow);
      for (const [name, parameter] of namedParameters(module)) {
        const tensor = own.get(name)?.tensor;
        if (!tensor) throw new Error(`a UNet has no ${name}`);
        const [o, kh, kw, i] = tensor.shape;
        parameter.tensor =
          name === 'conv_in.weight'
            ? scope(() => keep(concat([tensor, zeros([o, kh, kw, channels - i], { device, dtype })], 3)))
            : unscoped(() => tensor.handle(tensor.shape));
      }
      unload(narrow);
    },
  };
}
