// The virtual GPU runs what nvcc compiles: results against plain loops, under every schedule and without a report; and it
// answers the driver API as a driver does.
import { test } from 'tap';
import { CudaError } from '../../engine/cuda/errors.ts';
import { fromBf16, toBf16, toF16 } from '../virtual-gpu/numbers.ts';
import { bytesOf, floatsFrom, newBench, schedules, testPtx } from '../virtual-gpu/run_kernel.ts';

const basic = testPtx('basic');
const hgemm = testPtx('hgemm');

/** a[m, k] b[k, n] in float64. */
function product(a: ArrayLike<number>, b: ArrayLike<number>, m: number, n: number, k: number): Float64Array {
  const c = new Float64Array(m * n);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) for (let q = 0; q < k; q++) c[i * n + j] += a[i * k + q] * b[q * n + j];
  }
  return c;
}

const largestError = (got: ArrayLike<number>, want: ArrayLike<number>): number => {
  let worst = 0;
  for (let i = 0; i < want.length; i++) {
    const error = Math.abs(got[i] - want[i]);
    // Written so that a NaN counts as the worst.
    if (!(error <= worst)) worst = error;
  }
  return worst;
};

for (const schedule of schedules) {
  test(`kernels give right results, ${schedule.async} copies, ${schedule.order} order`, (t) => {
    for (const n of [1, 33, 1000]) {
      const bench = newBench({ schedule });
      const [a, b] = [floatsFrom(n, 1), floatsFrom(n, 2)];
      const c = bench.room(n * 4);
      bench.launch(basic, 'vadd', 3, 64, [bench.give(a), bench.give(b), c, n]);
      t.same(
        bench.floats(c, n),
        a.map((x, i) => x + b[i]),
        `vadd of ${n}`,
      );
    }
    for (const [m, n, k] of [
      [16, 16, 16],
      [37, 21, 19],
    ]) {
      const bench = newBench({ schedule });
      const [a, b] = [floatsFrom(m * k, 3), floatsFrom(k * n, 4)];
      const c = bench.room(m * n * 4);
      const grid = [Math.ceil(n / 16), Math.ceil(m / 16), 1] as const;
      bench.launch(basic, 'sgemm', grid, 256, [bench.give(a), bench.give(b), c, m, n, k]);
      t.ok(largestError(bench.floats(c, m * n), product(a, b, m, n, k)) < 1e-5, `sgemm ${m} ${n} ${k}`);
    }
    for (const [m, n, k] of [
      [64, 64, 64],
      [72, 88, 40],
    ]) {
      const bench = newBench({ schedule });
      const [a, b] = [floatsFrom(m * k, 5), floatsFrom(k * n, 6)].map((x) => Uint16Array.from(x, toBf16));
      const c = bench.room(m * n * 4);
      const grid = [Math.ceil(n / 64), Math.ceil(m / 64), 1] as const;
      bench.launch(hgemm, 'hgemm', grid, 128, [bench.give(a), bench.give(b), c, m, n, k]);
      const want = product(Float32Array.from(a, fromBf16), Float32Array.from(b, fromBf16), m, n, k);
      t.ok(largestError(bench.floats(c, m * n), want) < 1e-4, `hgemm ${m} ${n} ${k}`);
    }
    const bench = newBench({ schedule });
    const n = 300;
    const x = floatsFrom(2 * n, 7);
    const y = bench.room(8 * n);
    bench.launch(basic, 'softmax', 2, 128, [bench.give(x), y, n]);
    const soft = [0, 1].flatMap((row) => {
      const e = [...x.slice(row * n, row * n + n)].map(Math.exp);
      const sum = e.reduce((p, q) => p + q);
      return e.map((v) => v / sum);
    });
    t.ok(largestError(bench.floats(y, 2 * n), soft) < 1e-8, 'softmax');
    t.end();
  });

  test(`blocks, warps and lanes work together, ${schedule.order} order`, (t) => {
    const bench = newBench({ schedule });
    const x = floatsFrom(64, 8);
    const y = bench.room(256);
    bench.launch(basic, 'warp_exchange', 1, 32, [bench.give(x), y]);
    t.same(bench.floats(y, 32), x.slice(0, 32).reverse(), '__syncwarp orders a warp');
    bench.launch(basic, 'named_barrier', 1, 128, [bench.give(x), y]);
    t.same(bench.floats(y, 64), x.slice().reverse(), 'a barrier of two warps out of four');

    const halves = Uint16Array.from(floatsFrom(77, 9), toF16);
    const h = bench.give(halves);
    bench.launch(basic, 'half_in_place', 3, 32, [h, 77]);
    const doubled = new Uint16Array(77);
    bench.gpu.cuMemcpyDtoHAsync(bytesOf(doubled), h, 0n);
    bench.gpu.cuStreamSynchronize(0n);
    t.same(
      doubled,
      Uint16Array.from(floatsFrom(77, 9), (v) => toF16(2 * v)),
      'half words in place',
    );

    const keys = Int32Array.from({ length: 200 }, (_, i) => (i * i) % 5);
    const counts = bench.give(new Int32Array(5));
    bench.launch(basic, 'count_atomic', 4, 64, [bench.give(keys), counts, 200]);
    const want = [0, 1, 2, 3, 4].map((k) => keys.filter((v) => v === k).length);
    t.same([...bench.ints(counts, 5)], want, 'atomic counts');

    const big = floatsFrom(1000, 10);
    const total = bench.room(4);
    const flag = bench.give(new Int32Array(1));
    bench.launch(basic, 'grid_sum', 5, 64, [bench.give(big), bench.room(20), flag, total, 1000]);
    const sum = big.reduce((p, q) => p + q);
    t.ok(Math.abs(bench.floats(total, 1)[0] - sum) < 1e-4, 'the last block adds up the others');
    t.end();
  });
}

test('divergent lanes, local memory and a jump table', (t) => {
  const n = 90;
  const x = Int32Array.from({ length: n }, (_, i) => ((i * 37) % 51) + 1);
  const want = x.map((v, i) => {
    const table = Array.from({ length: 8 }, (_, k) => x[(i + k) % n] * k);
    let sum = 0;
    for (let k = 0; k < Math.min(v, 40); k++) sum += table[(k + v) & 7];
    const reversed =
      Number.parseInt((v >>> 0).toString(2).padStart(32, '0').split('').reverse().join(''), 2) | 0;
    const cases = [
      sum + Math.clz32(v),
      sum ^ (v << 3),
      (sum - reversed) | 0,
      sum * 17,
      Number((BigInt(sum) << 20n) >> 32n),
      Math.trunc(sum / v),
      sum % 13,
    ];
    return cases[v % 7];
  });
  const bench = newBench();
  const y = bench.room(n * 4);
  bench.launch(basic, 'diverge', 3, 32, [bench.give(x), y, n]);
  t.same(bench.ints(y, n), want);
  const [{ blocks, missed }] = bench.gpu.coverage().filter((c) => c.kernel === 'diverge');
  t.ok(missed.size / blocks < 0.1, `${missed.size} of ${blocks} blocks missed`);
  t.end();
});

test('the driver API answers as a driver does', (t) => {
  const bench = newBench({ memoryBytes: 4096 });
  const { gpu } = bench;
  const fails = (run: () => unknown, result: string, name: string) => {
    try {
      run();
      t.fail(`${name}: nothing was thrown`);
    } catch (error) {
      t.ok(error instanceof CudaError && error.result === result, `${name}: ${error}`);
    }
  };
  fails(() => gpu.cuMemAllocAsync(5000, 0n), 'CUDA_ERROR_OUT_OF_MEMORY', 'more than there is');
  const module = gpu.cuModuleLoadData(basic);
  fails(() => gpu.cuModuleGetFunction(module, 'nothing'), 'CUDA_ERROR_NOT_FOUND', 'unknown kernel');
  fails(
    () => gpu.cuModuleLoadData(basic.replace('sm_80', 'sm_90a')),
    'CUDA_ERROR_NO_BINARY_FOR_GPU',
    'newer GPU',
  );
  fails(
    () => newBench({ driverVersion: 12020 }).gpu.cuModuleLoadData(basic),
    'CUDA_ERROR_UNSUPPORTED_PTX_VERSION',
    'newer PTX than the driver reads',
  );
  const a = bench.give(floatsFrom(8, 1));
  fails(
    () => bench.launch(basic, 'sgemm', 1, 512, [a, a, a, 1, 1, 1]),
    'CUDA_ERROR_INVALID_VALUE',
    'too many threads',
  );
  fails(() => bench.launch(basic, 'vadd', 0, 32, [a, a, a, 8]), 'CUDA_ERROR_INVALID_VALUE', 'an empty grid');
  fails(
    () => bench.launch(basic, 'vadd', 1, 32, [a, a, a, 8], 2 ** 18),
    'CUDA_ERROR_INVALID_VALUE',
    'shared memory',
  );
  t.throws(
    () => bench.launch(basic, 'vadd', 1, 32, [a, a, a]),
    /takes \(pppi\), got \(pppn?\)/,
    'too few arguments',
  );
  t.throws(
    () => bench.launch(basic, 'vadd', 1, 32, [a, a, 8, a]),
    /takes \(pppi\), got \(ppnp\)/,
    'wrong kinds',
  );
  gpu.cuMemFreeAsync(a, 0n);
  t.throws(() => gpu.cuMemFreeAsync(a, 0n), /invalid free/, 'freed twice');
  t.equal(gpu.liveAllocations(), 0);
  t.same(gpu.cuMemGetInfo(), { free: 4096, total: 4096 });
  t.end();
});

test('a captured graph runs when it is launched, each time', (t) => {
  const bench = newBench();
  const { gpu } = bench;
  const stream = gpu.cuStreamCreate(0);
  const x = bench.give(Uint16Array.of(toF16(1), toF16(2)));
  const kernel = gpu.cuModuleGetFunction(gpu.cuModuleLoadData(basic), 'half_in_place');
  const parameters = new Uint8Array(12);
  new DataView(parameters.buffer).setBigUint64(0, x, true);
  parameters[8] = 2;
  gpu.cuStreamBeginCapture(stream);
  gpu.cuLaunchKernel(kernel, [1, 1, 1], [32, 1, 1], 0, stream, parameters, [0, 8]);
  gpu.cuLaunchKernel(kernel, [1, 1, 1], [32, 1, 1], 0, stream, parameters, [0, 8]);
  const exec = gpu.cuGraphInstantiate(gpu.cuStreamEndCapture(stream));
  t.equal(gpu.stats.launches, 0, 'capturing runs nothing');
  gpu.cuGraphLaunch(exec, stream);
  gpu.cuGraphLaunch(exec, stream);
  gpu.cuStreamSynchronize(stream);
  const got = new Uint16Array(2);
  gpu.cuMemcpyDtoHAsync(bytesOf(got), x, stream);
  gpu.cuStreamSynchronize(stream);
  t.same(got, Uint16Array.of(toF16(16), toF16(32)));
  t.end();
});
