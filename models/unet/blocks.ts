// The pieces that the UNet and the VAE share: the residual block and the two changes of resolution, named and shaped as
// in diffusers. Activations are [n, h, w, c]; sums ride in the epilogue of the convolution before them.
import { doubledTaps } from '../../engine/doubled.ts';
import { isRecording } from '../../engine/grad.ts';
import { conv2d, groupNorm, type Linear, linear } from '../../engine/layers.ts';
import { type Module, module } from '../../engine/module.ts';
import type { Padding } from '../../engine/ops/conv2d.ts';
import { concat, embedding, upsampleNearest } from '../../engine/ops/move.ts';
import { scope } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { type ContextCache, once } from './context_cache.ts';

export interface NormConfig {
  groups: number;
  eps: number;
}

/** When an image is denoised, as the resnets see it. */
export interface Time {
  /** The time's embedding [n, ctemb], with its SiLU, as every block would apply the same one; of a schedule [steps * n, ctemb]. */
  temb: Tensor;
  /** Of a schedule: the number of the step, int32 [1]. */
  step?: Tensor;
  cache?: ContextCache;
}

/** A layer of the time, for n images. Of a schedule it runs once, on all steps, and each step looks its rows up. */
function atTime(layer: Linear, { temb, step, cache }: Time, n: number): Tensor {
  if (!step) return layer(temb);
  const [rows] = once(cache, layer, () => [layer(temb)]);
  return embedding(step, rows.reshape(temb.shape[0] / n, -1)).reshape(n, -1);
}

export type Resnet = Module<[x: Tensor, options?: { time?: Time; skip?: Tensor }], Tensor>;

/**
 * ResnetBlock2D: two norms with SiLU, two 3x3 convolutions, and a 1x1 on the way past where the width changes. `ctemb` is
 * the width of the UNet's time embedding. The VAE's blocks have none. `cin` counts the channels of a skip connection too.
 */
export const resnet = (cin: number, cout: number, { groups, eps }: NormConfig, ctemb?: number): Resnet =>
  module(
    {
      norm1: groupNorm(groups, cin, { eps, silu: true }),
      conv1: conv2d(cin, cout, 3, { padding: 1 }),
      time_emb_proj: ctemb === undefined ? undefined : linear(ctemb, cout),
      norm2: groupNorm(groups, cout, { eps, silu: true }),
      conv2: conv2d(cout, cout, 3, { padding: 1 }),
      conv_shortcut: cin === cout ? undefined : conv2d(cin, cout, 1),
    },
    (m, x: Tensor, { time, skip }: { time?: Time; skip?: Tensor } = {}) => {
      const shift = m.time_emb_proj && time && atTime(m.time_emb_proj, time, x.shape[0]);
      // What one layer alone reads is freed with it, and the way past comes late: in the VAE each is up to 512 MiB.
      const h = scope(() => m.norm2(scope(() => m.conv1(m.norm1(x, { skip }), { shift }))));
      const past = m.conv_shortcut?.(x, { skip }) ?? (skip ? concat([x, skip], 3) : x);
      return m.conv2(h, { residual: past });
    },
  );

/** Halves the resolution with a 3x3 convolution. The UNet pads every side by one, the VAE only right and bottom. */
export const downsample = (c: number, padding: Padding): Module<[x: Tensor], Tensor> =>
  module({ conv: conv2d(c, c, 3, { stride: 2, padding }) }, (m, x: Tensor) => m.conv(x));

/**
 * Nearest neighbour to [n, height, width, c], then a 3x3 convolution. Where the weight can be kept over an image in the form
 * that this takes, and no gradient of it is wanted, an exact double is convolved without being made.
 */
export const upsample = (
  c: number,
): Module<[x: Tensor, height: number, width: number, cache?: ContextCache], Tensor> =>
  module(
    { conv: conv2d(c, c, 3, { padding: 1 }) },
    (m, x: Tensor, height: number, width: number, cache?: ContextCache) => {
      const [, h, w] = x.shape;
      if (!cache || isRecording() || height !== 2 * h || width !== 2 * w)
        return m.conv(upsampleNearest(x, height, width));
      return m.conv(x, { doubled: cache.once(m, () => doubledTaps(m.conv.children.weight.tensor)) });
    },
  );
