// The pieces that the UNet and the VAE share: the residual block and the two changes of resolution, named and shaped as
// in diffusers. Activations are [n, h, w, c]; sums ride in the epilogue of the convolution before them.
import { conv2d, groupNorm, linear } from '../engine/layers.ts';
import { type Module, module } from '../engine/module.ts';
import type { Padding } from '../engine/ops/conv2d.ts';
import { upsampleNearest } from '../engine/ops/move.ts';
import type { Tensor } from '../engine/tensor.ts';

export interface NormConfig {
  groups: number;
  eps: number;
}

export type Resnet = Module<[x: Tensor, temb?: Tensor], Tensor>;

/**
 * ResnetBlock2D: two norms with SiLU, two 3x3 convolutions, and a 1x1 on the way past where the width changes. `ctemb` is
 * the width of the UNet's time embedding, `temb` [n, ctemb] has its SiLU already, as every block would apply the same one.
 * The VAE's blocks have neither.
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
    (m, x: Tensor, temb?: Tensor) => {
      const h = m.conv1(m.norm1(x), { shift: temb && m.time_emb_proj?.(temb) });
      return m.conv2(m.norm2(h), { residual: m.conv_shortcut?.(x) ?? x });
    },
  );

/** Halves the resolution with a 3x3 convolution. The UNet pads every side by one, the VAE only right and bottom. */
export const downsample = (c: number, padding: Padding): Module<[x: Tensor], Tensor> =>
  module({ conv: conv2d(c, c, 3, { stride: 2, padding }) }, (m, x: Tensor) => m.conv(x));

/** Nearest neighbour to [n, height, width, c], then a 3x3 convolution. */
export const upsample = (c: number): Module<[x: Tensor, height: number, width: number], Tensor> =>
  module({ conv: conv2d(c, c, 3, { padding: 1 }) }, (m, x: Tensor, height: number, width: number) =>
    m.conv(upsampleNearest(x, height, width)),
  );
