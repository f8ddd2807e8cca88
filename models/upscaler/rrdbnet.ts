// RRDBNet, the network of ESRGAN (Wang et al. 2018) and Real-ESRGAN (2021), which enlarges pictures: a trunk of dense blocks, whose
// residuals count a fifth, then a doubling with a convolution for each factor of two. The tree spells BasicSR's keys. Networks that
// enlarge less see 2x2 or 4x4 pixels as one (pixel unshuffle), and so run on fewer. Pictures are [n, h, w, c] in [0, 1].
import { doubledTaps } from '../../engine/doubled.ts';
import { conv2d } from '../../engine/layers.ts';
import { module } from '../../engine/module.ts';
import { combine } from '../../engine/ops/combine.ts';
import { concat } from '../../engine/ops/move.ts';
import { leakyRelu } from '../../engine/ops/unary.ts';
import { scope, through } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { times } from '../unet/unet_encoder.ts';

/** Arguments of BasicSR's RRDBNet, but for the scale, which is 2^doublings / unshuffle. */
export interface RRDBNetConfig {
  num_feat: number;
  num_block: number;
  num_grow_ch: number;
  /** How many times the trunk's features are doubled. */
  doublings: number;
  /** The side of the squares of pixels that come as one: 1, 2 or 4. */
  unshuffle: number;
}

const conv = (cin: number, cout: number) => conv2d(cin, cout, 3, { padding: 1 });

/** x + f(x) / 5: all residuals here. */
const withFifth = (x: Tensor, residual: Tensor): Tensor => combine([1, x], [0.2, residual]);

/** ResidualDenseBlock: each convolution sees x and what all before it made. */
const denseBlock = (c: number, grow: number) =>
  module(
    {
      conv1: conv(c, grow),
      conv2: conv(c + grow, grow),
      conv3: conv(c + 2 * grow, grow),
      conv4: conv(c + 3 * grow, grow),
      conv5: conv(c + 4 * grow, c),
    },
    ({ conv1, conv2, conv3, conv4, conv5 }, x: Tensor) => {
      const beside = [conv1, conv2, conv3, conv4].map(
        (layer) => (before: Tensor) => scope(() => concat([before, leakyRelu(layer(before))], 3)),
      );
      return withFifth(x, through(x, [...beside, conv5]));
    },
  );

/** RRDB: three dense blocks, past which x goes on. */
const rrdb = (c: number, grow: number) =>
  module(
    { rdb1: denseBlock(c, grow), rdb2: denseBlock(c, grow), rdb3: denseBlock(c, grow) },
    (m, x: Tensor) => withFifth(x, through(x, [m.rdb1, m.rdb2, m.rdb3])),
  );

/** x [n, h, w, 3 unshuffle^2] → [n, 2^doublings h, 2^doublings w, 3], not clamped. */
export function rrdbnet({ num_feat: c, num_block, num_grow_ch, doublings, unshuffle }: RRDBNetConfig) {
  const ups = Object.fromEntries(times(doublings, (i) => [`conv_up${i + 1}`, conv(c, c)]));
  return module(
    {
      conv_first: conv(3 * unshuffle ** 2, c),
      body: times(num_block, () => rrdb(c, num_grow_ch)),
      conv_body: conv(c, c),
      ...ups,
      conv_hr: conv(c, c),
      conv_last: conv(c, 3),
    },
    (m, x: Tensor): Tensor => {
      const trunk = scope(() => {
        const first = m.conv_first(x);
        return m.conv_body(through(first, m.body), { residual: first });
      });
      const enlarged = Object.values(ups).map(
        (up) => (h: Tensor) =>
          scope(() => leakyRelu(up(h, { doubled: doubledTaps(up.children.weight.tensor) }))),
      );
      return through(trunk, [...enlarged, m.conv_hr, leakyRelu, m.conv_last]);
    },
  );
}
