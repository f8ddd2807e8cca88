// The normals of PyTorch's CPU generator from its words, bit for bit: Box-Muller over blocks of 16, whose places j and j + 8 hold one
// pair, in float32 as cephes_float.ts has it. The words are the host's, as the Mersenne Twister makes them one after the other.
import { boxMuller16 } from '../cephes_float.ts';
import { apply, defineOp } from '../op.ts';
import { ShapeError, type Tensor } from '../tensor.ts';

const BLOCK = 16;

const torchNormalOp = defineOp<Record<string, never>>({
  name: 'torch_normal',
  outputs({ words }) {
    if (words.dtype !== 'int32' || words.size % BLOCK)
      throw new ShapeError(
        `torch_normal: words are ${words.dtype} [${words.shape}], not int32 by the ${BLOCK}`,
      );
    return { y: { shape: words.shape, dtype: 'float32' } };
  },
  saves: [],
  storage: 'y',
  forward: (t, _, launch) => launch('torch_normal_forward', [t.y, t.words, t.y.size]),
  reference: {
    forward({ y, words }) {
      const block = new Float32Array(BLOCK);
      for (let i = 0; i < y.data.length; i += BLOCK) {
        for (let j = 0; j < BLOCK; j++) block[j] = words.data[i + j];
        boxMuller16(block, 0);
        y.data.set(block, i);
      }
    },
  },
  samples: [1, 2, 3, 4, 5, 7, 8, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 77, 127, 128, 129, 257].map(
    (blocks) => ({
      inputs: { words: [BLOCK * blocks] },
      attrs: {},
      ints: { words: 2 ** 24 },
    }),
  ),
});

/** float32 normals of int32 words of 24 bits, by the 16. */
export const torchNormal = (words: Tensor): Tensor => apply(torchNormalOp, { words }, {});
