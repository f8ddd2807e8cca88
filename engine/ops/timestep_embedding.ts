// Sinusoids of the step that a network is told of, made on the device: in a recorded pass the step is a tensor, which the host
// does not read.
import { apply, defineOp } from '../op.ts';
import { ShapeError, type Tensor } from '../tensor.ts';
import { awkwardSizes } from './samples.ts';

const timestepOp = defineOp<{
  dim: number;
  dtype: 'float32' | 'bfloat16' | 'float16';
  flipSinToCos: boolean;
  shift: number;
}>({
  name: 'timestep_embedding',
  outputs({ t }, { dim, dtype }) {
    if (t.dtype !== 'float32') throw new ShapeError(`timestep_embedding: t is ${t.dtype}, not float32`);
    return { y: { shape: [...t.shape, dim], dtype } };
  },
  saves: [],
  storage: 'y',
  forward: (t, { dim, flipSinToCos, shift }, launch) =>
    launch('timestep_embedding_forward', [t.y, t.t, t.t.size, dim, Number(flipSinToCos), shift, 10000]),
  reference: {
    forward({ y, t }, { dim, flipSinToCos, shift }) {
      const half = Math.floor(dim / 2);
      for (let i = 0; i < t.data.length; i++) {
        if (dim % 2) y.data[(i + 1) * dim - 1] = 0;
        for (let j = 0; j < half; j++) {
          const angle = t.data[i] * Math.exp((-Math.log(10000) * j) / (half - shift));
          y.data[i * dim + j + (flipSinToCos ? half : 0)] = Math.sin(angle);
          y.data[i * dim + j + (flipSinToCos ? 0 : half)] = Math.cos(angle);
        }
      }
    },
  },
  samples: [
    { inputs: { t: [3] }, attrs: { dim: 16, dtype: 'float32', flipSinToCos: true, shift: 0 } },
    { inputs: { t: [2, 6] }, attrs: { dim: 20, dtype: 'float32', flipSinToCos: false, shift: 1 } },
    { inputs: { t: [5] }, attrs: { dim: 15, dtype: 'float32', flipSinToCos: true, shift: 0 } },
    ...awkwardSizes.map(([n, half], i) => ({
      inputs: { t: [n] },
      attrs: {
        dim: 2 * half,
        dtype: 'float32' as const,
        flipSinToCos: i % 2 > 0,
        shift: half > 1 ? i % 2 : 0,
      },
    })),
  ],
});

/** Sinusoids of t (float32, any shape) → [...t, dim]; cosines first when flipSinToCos (DDPM; Vaswani et al. 2017). */
export function timestepEmbedding(
  t: Tensor,
  dim: number,
  options: { dtype?: 'float32' | 'bfloat16' | 'float16'; flipSinToCos?: boolean; shift?: number } = {},
): Tensor {
  const { dtype = 'float32', flipSinToCos = true, shift = 0 } = options;
  return apply(timestepOp, { t }, { dim, dtype, flipSinToCos, shift });
}
