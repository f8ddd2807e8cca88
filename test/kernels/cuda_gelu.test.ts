// GELU as the matrix products' epilogue has it in the half types (gemm.cuh): its tail is as true as rounding lets it be, though the
// normal distribution there is a fit. The energy of errors that cuda.test.ts bounds would not show it, as a tail has next to none.
import { test } from 'tap';
import { cudaDevice } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { linear } from '../../engine/ops/linear.ts';
import { gelu } from '../../engine/ops/math.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

const SIDE = 64;
const identity = Float32Array.from({ length: SIDE * SIDE }, (_, i) => Number(i % (SIDE + 1) === 0));
/** From where float64's 1 + erf has lost a third of its digits, evenly up. */
const numbers = Float32Array.from({ length: SIDE * SIDE }, (_, i) => -5.5 + (9.5 * i) / SIDE ** 2);
/** Half a unit of the last place of numbers of this type, and the least of them with all places. */
const types = { bfloat16: [2 ** -8, 2 ** -126], float16: [2 ** -11, 2 ** -14] } as const;

for (const dtype of ['bfloat16', 'float16'] as const)
  test(`GELU behind a product is rounded once, in ${dtype}`, (t) => {
    const device = cudaDevice(openVirtualGpu({ arenaBytes: 2 ** 24 }));
    const [x, y] = scope(() => {
      const [x, weight] = [numbers, identity].map((v) => tensor(v, [SIDE, SIDE], { device, dtype }));
      const y = noGrad(() => linear(x, weight, undefined, { activation: 'gelu' }));
      return [x.floats(), y.floats()];
    });
    const [half, least] = types[dtype];
    const errors = Array.from(x, gelu.f).map((want, i) =>
      Math.abs(want) < least ? 0 : Math.abs(y[i] / want - 1),
    );
    const worst = errors.indexOf(Math.max(...errors));
    t.ok(errors[worst] < 1.01 * half, `${y[worst]} at ${x[worst]}: ${errors[worst] / half} half units`);
    t.end();
  });
