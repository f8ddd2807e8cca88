// An IP-Adapter as training begins it, like tencent-ailab's tutorial_train_sdxl.py and tutorial_train_plus.py: the projection as PyTorch's
// layers begin, keys and values for each attention over the prompt as copies of the prompt's own.
import { noGrad } from '../../engine/grad.ts';
import { namedParameters, type Parameter, placeOf } from '../../engine/module.ts';
import { scale } from '../../engine/ops/unary.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import type { Numbers } from '../adapters/adapters.ts';
import { begun } from '../adapters/layer_init.ts';
import { crossAttentions, type UNet, type UNetConfig } from '../unet/unet.ts';
import type { VisionConfig } from './clip_vision.ts';
import { HEAD } from './image_projection.ts';
import { attentionWidths, type IPAdapter, type IPAdapterConfig, widthRead } from './ip_adapter.ts';

/** The published ones' shape: four tokens of a picture's embedding, or with a Resampler, as wide as the encoder, sixteen of its states. */
export function newIPAdapterConfig(
  { unet, unetConfig }: { unet: UNet; unetConfig: UNetConfig },
  encoder: VisionConfig,
  withResampler: boolean,
): IPAdapterConfig {
  const { hidden_size: width } = encoder;
  const resampler = withResampler
    ? { width, depth: 4, inner: HEAD * Math.max(1, Math.round(width / HEAD)), feedForward: 4 * width }
    : undefined;
  return {
    tokens: resampler ? 16 : 4,
    cross_attention_dim: unetConfig.cross_attention_dim,
    inputs: widthRead({ resampler }, encoder),
    resampler,
    widths: attentionWidths(unet),
  };
}

/** Loads a new IP-Adapter beside its loaded UNet, on the same device and in the same type. */
export function startIPAdapter(net: IPAdapter['module'], unet: UNet, numbers: Numbers): void {
  const own = namedParameters(net);
  const place = placeOf(unet);
  const given = new Map<string, Parameter>(
    crossAttentions(unet).flatMap(({ children: { to_k, to_v } }, i) => [
      [`ip_adapter.${2 * i + 1}.to_k_ip.weight`, to_k.children.weight] as const,
      [`ip_adapter.${2 * i + 1}.to_v_ip.weight`, to_v.children.weight] as const,
    ]),
  );
  /** A Resampler's are normal, as long as 1 together. */
  const latents = (key: string, { size, shape, memoryShape }: Parameter): Tensor => {
    const length = Math.sqrt(shape[shape.length - 1]);
    return tensor(
      numbers(key, size, 'normal').map((x) => x / length),
      memoryShape,
      place,
    );
  };
  for (const [key, parameter] of own) {
    const from = given.get(key);
    parameter.tensor = unscoped(() => {
      if (from) return noGrad(() => scope(() => scale(from.tensor, 1)));
      if (key === 'image_proj.latents') return latents(key, parameter);
      return begun(key, own, numbers, place);
    });
  }
}
