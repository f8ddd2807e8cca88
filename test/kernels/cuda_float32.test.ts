// Float32's products on Hopper are sums of products of bfloat16 (engine/cuda/plan_float32_sm90.ts). Here: what that does to numbers
// that bfloat16 has none for. How near the sums come is cuda.test.ts's matter.
import { test } from 'tap';
import { band } from '../../engine/cuda/plan_conv2d_float32.ts';
import { cudaDevice } from '../../engine/device.ts';
import { conv2d, type Padding } from '../../engine/ops/conv2d.ts';
import { linear } from '../../engine/ops/linear.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';
import { watched } from '../virtual-gpu/watched.ts';
import { forceTile } from './kernel_proof.ts';

const newGpu = () => watched(openVirtualGpu({ capability: [9, 0], multiprocessors: 1, arenaBytes: 2 ** 26 }));
const numbers = (length: number, seed: number): Float32Array =>
  Float32Array.from({ length }, (_, i) => Math.sin(i * 0.7 + seed));

const LARGEST = 3.4028234663852886e38;
const [M, N, K] = [64, 256, 256];

test('what is not finite stays so, and what is finite does not overflow', (t) => {
  const { api, launched } = newGpu();
  const device = cudaDevice(api);
  const [x, weight] = [numbers(M * K, 1), numbers(N * K, 2)];
  const planted = [Number.NaN, Number.POSITIVE_INFINITY, LARGEST, -LARGEST, 3.39e38, 1e-41, -1e-30];
  planted.forEach((value, row) => {
    for (let i = 0; i < K; i++) if (row > 4) x[row * K + i] *= value;
    x[row * K + 5] = value;
  });
  // The largest numbers meet small ones, and then their sums are finite. The smallest that bfloat16 has is 2^-133.
  for (let n = 0; n < N; n++) weight[n * K + 5] = 2 ** -10 * (1 + n / N);
  const y = scope(() => linear(tensor(x, [M, K], { device }), tensor(weight, [N, K], { device })).floats());
  t.ok([...launched].some((kernel) => kernel.startsWith('gemm_sm90_split')));
  const wrong: string[] = [];
  for (let m = 0; m < M; m++)
    for (let n = 0; n < N; n++) {
      let [want, size] = [0, 0];
      for (let k = 0; k < K; k++) {
        const product = x[m * K + k] * weight[n * K + k];
        want += product;
        size += Math.abs(product);
      }
      const got = y[m * N + n];
      // bfloat16 has nothing between 0 and 2^-133, and rounds to it.
      const near = Math.abs(got - want) <= 2 ** -15 * size + K * 2 ** -134;
      if (Number.isFinite(want) ? !near : Number.isFinite(got))
        wrong.push(`y[${m}, ${n}] is ${got}, not ${want}`);
    }
  t.same(wrong, []);
  t.end();
});

test('an image by bands of its rows is the same to the bit', (t) => {
  interface Case {
    x: [n: number, h: number, w: number, c: number];
    beside?: number;
    side: number;
    stride: number;
    padding: Padding;
    /** Of x's rows, whose halves are a band. */
    rows: number;
  }
  const cases: Case[] = [
    { x: [2, 14, 9, 40], side: 3, stride: 1, padding: [1, 1, 1, 1], rows: 4 },
    { x: [1, 26, 18, 40], side: 3, stride: 2, padding: [0, 0, 1, 1], rows: 9 },
    { x: [2, 16, 9, 40], beside: 72, side: 2, stride: 1, padding: [0, 1, 1, 0], rows: 6 },
  ];
  const o = 136;
  const whole = band.bytes;
  forceTile({ sample: { inputs: {}, attrs: {} }, multiprocessors: 1, hopper: { tile: '128_pingpong' } });
  for (const { x: shape, beside = 0, side, stride, padding, rows } of cases) {
    const [n, h, w, c] = shape;
    const run = (bytes: number) => {
      band.bytes = bytes;
      const { api, launched } = newGpu();
      let products = 0;
      const counting: typeof api = {
        ...api,
        cuLaunchKernel(...args) {
          products++;
          api.cuLaunchKernel(...args);
        },
      };
      const device = cudaDevice(counting);
      const of = (shape: readonly number[], seed: number) =>
        tensor(
          numbers(
            shape.reduce((a, b) => a * b),
            seed,
          ),
          shape,
          { device },
        );
      const [oh, ow] = [h, w].map(
        (size, i) => Math.floor((size + padding[i] + padding[i + 2] - side) / stride) + 1,
      );
      const y = scope(() =>
        conv2d(of(shape, 1), of([o, side, side, c + beside], 2), of([o], 3), {
          ...{ stride, padding, shift: of([n, o], 4), residual: of([n, oh, ow, o], 5) },
          skip: beside ? of([n, h, w, beside], 6) : undefined,
        }).floats(),
      );
      t.ok([...launched].some((kernel) => kernel.startsWith('conv2d_sm90_split')));
      return { y, products };
    };
    const [once, banded] = [run(whole), run(4 * rows * w * (c + beside))];
    t.ok(banded.products >= once.products + 2 * n, `${banded.products} launches, not ${once.products}`);
    t.same(Buffer.from(banded.y.buffer), Buffer.from(once.y.buffer));
  }
  band.bytes = whole;
  t.end();
});
