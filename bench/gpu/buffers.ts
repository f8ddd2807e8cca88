// Random tensors for benchmarks on a GPU, quickly: a short pool of normal numbers goes to the device once per type and spread
// and is copied there over and over. The data matter: a GPU draws less power, and so runs faster, on zeros.
import type { CudaDriver } from '../../engine/cuda/device.ts';
import type { Spec } from '../../engine/op.ts';
import { unscoped } from '../../engine/scope.ts';
import { empty, type Tensor, tensor } from '../../engine/tensor.ts';
import { bytesPerElement, type DType } from '../../io/dtype.ts';
import { uniforms } from '../pool_weights.ts';
import type { BenchGpu } from './gpu.ts';

const POOL = 1 << 20;

export interface Buffers {
  /** Normal numbers of this standard deviation; `sign` false takes their magnitudes. Integers are zero. */
  random(spec: Spec, deviation?: number, sign?: boolean): Tensor;
  empty(spec: Spec): Tensor;
}

/** Box and Muller's normals from the benchmark's own uniform numbers. */
function normals(): Float32Array {
  const [u, v] = [uniforms(POOL, 3), uniforms(POOL, 4)];
  return u.map((x, i) => Math.sqrt(-2 * Math.log((x + 1) / 2 || 1e-7)) * Math.cos(Math.PI * v[i]));
}

export function openBuffers({ api, device }: BenchGpu): Buffers {
  const { stream } = device.driver as CudaDriver;
  const base = normals();
  const pools = new Map<string, Tensor>();
  const poolOf = (dtype: DType, deviation: number, sign: boolean): Tensor => {
    const key = `${dtype} ${deviation} ${sign}`;
    const made =
      pools.get(key) ??
      unscoped(() =>
        tensor(
          base.map((x) => (sign ? x : Math.abs(x)) * deviation),
          [POOL],
          { device, dtype },
        ),
      );
    pools.set(key, made);
    return made;
  };
  let turn = 0;
  return {
    empty: ({ shape, dtype }) => unscoped(() => empty(shape, { device, dtype })),
    random({ shape, dtype }, deviation = 1, sign = true) {
      const made = unscoped(() => empty(shape, { device, dtype }));
      if (dtype === 'int32') return made.clear();
      const pool = poolOf(dtype, deviation, sign);
      // Each tensor begins elsewhere in the pool, so that no two are equal.
      const size = bytesPerElement[dtype];
      let from = ((turn = (turn + 104_729) % (POOL / 2)) >> 2) * 4;
      for (let at = 0; at < made.size; from = 0) {
        const count = Math.min(POOL - from, made.size - at);
        const [target, source] = [made, pool].map((t) => t.block.address);
        api.cuMemcpyDtoDAsync(target + BigInt(at * size), source + BigInt(from * size), count * size, stream);
        at += count;
      }
      return made;
    },
  };
}
