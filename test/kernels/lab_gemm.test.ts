// The history of the matrix product in kernels/lab, on the virtual GPU: each step computes what the ops of linear layers do, at those
// of its samples that the steps take, and at sizes beyond a tile. The last step is the program's own kernel.
import { test } from 'tap';
import { type Dim3, TensorMapDataType, TensorMapSwizzle } from '../../engine/cuda/api.ts';
import { labFolder, readPtx } from '../../engine/cuda/kernels.ts';
import { registry } from '../../engine/op.ts';
import { type AnyRecord, relativeError, size, values } from '../support/op_cases.ts';
import { fromBf16, toBf16 } from '../virtual-gpu/numbers.ts';
import { type Bench, newBench, schedules } from '../virtual-gpu/run_kernel.ts';

const ptx = readPtx('gemm_steps_sm90', 'bfloat16', labFolder);

type Sizes = readonly [m: number, n: number, k: number];
const ofSamples = ['linear', 'linear_activated'].flatMap((op) =>
  (registry.get(op) as AnyRecord).samples.map(({ inputs }): Sizes => {
    const { x, weight } = inputs as Record<string, readonly number[]>;
    return [size(x.slice(0, -1)), weight[0], weight[1]];
  }),
);
const sizes: readonly Sizes[] = [
  ...ofSamples.filter(([, n, k]) => n % 8 === 0 && k % 8 === 0),
  [136, 168, 328],
];

/** Threads of a block, and rows and columns of y that it makes. */
const steps = {
  gemm_1_naive: { threads: 256, rows: 1, columns: 256 },
  gemm_2_tiles: { threads: 128, rows: 64, columns: 64 },
  gemm_3_wgmma: { threads: 256, rows: 128, columns: 128 },
  gemm_4_ring: { threads: 384, rows: 128, columns: 160 },
  gemm_5_pair: { threads: 384, rows: 128, columns: 160 },
} as const;

const map = (bench: Bench, address: bigint, rows: number, k: number, boxRows: number) =>
  bench.gpu.cuTensorMapEncodeTiled({
    ...{ dataType: TensorMapDataType.BFLOAT16, globalAddress: address, swizzle: TensorMapSwizzle.B128 },
    ...{ globalDim: [k, rows, 1], globalStrides: [2 * k, 2 * k * rows] },
    ...{ elementStrides: [1, 1, 1], boxDim: [64, boxRows, 1] },
  });

function run(bench: Bench, step: keyof typeof steps, [m, n, k]: Sizes, x: bigint, w: bigint): Float32Array {
  const { threads, rows, columns } = steps[step];
  const y = bench.room(m * n * 2);
  const [across, down] = [Math.ceil(n / columns), Math.ceil(m / rows)];
  const shared = 4 * (rows + columns) * 128 + 1024;
  const launch = (grid: Dim3, boxRows: number, cluster: number) => {
    const maps = [map(bench, x, m, k, rows), map(bench, w, n, k, boxRows)];
    bench.launch(ptx, step, grid, threads, [y, ...maps, m, n, k], shared, { cluster });
  };
  if (step === 'gemm_4_ring') launch([across, down, 1], columns, 1);
  else if (step === 'gemm_5_pair') launch([2 * Math.ceil(down / 2), across, 1], columns / 2, 2);
  else bench.launch(ptx, step, [across, down, 1], threads, [y, x, w, m, n, k]);
  return Float32Array.from(new Uint16Array(bench.ints(y, (m * n) / 2).buffer), fromBf16);
}

function product([m, n, k]: Sizes, x: Uint16Array, w: Uint16Array): Float32Array {
  const [a, b] = [x, w].map((bits) => Float64Array.from(bits, fromBf16));
  return Float32Array.from({ length: m * n }, (_, at) => {
    const [row, column] = [Math.floor(at / n), at % n];
    let sum = 0;
    for (let i = 0; i < k; i++) sum += a[row * k + i] * b[column * k + i];
    return sum;
  });
}

for (const schedule of schedules) {
  test(`the lab's matrix products, ${schedule.async} copies, ${schedule.order} order`, (t) => {
    const bench = newBench({ capability: [9, 0], schedule });
    t.ok(sizes.length > 3);
    for (const mnk of sizes) {
      const [m, n, k] = mnk;
      const [x, w] = [values(m * k, 1), values(n * k, 2)].map((all) => Uint16Array.from(all, toBf16));
      const want = product(mnk, x, w);
      const [xAt, wAt] = [bench.give(x), bench.give(w)];
      for (const step of Object.keys(steps) as (keyof typeof steps)[]) {
        const error = relativeError(run(bench, step, mnk, xAt, wAt), want);
        t.ok(error <= 3.1e-3, `${step} ${m} x ${n} x ${k}: ${error.toExponential(1)}`);
      }
    }
    t.end();
  });
}
