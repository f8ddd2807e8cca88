// Launches that are remembered: a call that was made before queues the same launches without a plan, and is planned anew when
// the memory between its launches has moved or tiles are chosen otherwise. And that equal steps find equal memory.
import { test } from 'tap';
import type { Kernel } from '../../engine/cuda/api.ts';
import { PlanMemo } from '../../engine/cuda/plan_memo.ts';
import { lookupsOf, overrides } from '../../engine/cuda/plan_sm90.ts';
import { anyHopper, standInApi } from '../../engine/cuda/stand_in.ts';
import { cudaDevice } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { attention } from '../../engine/ops/attention.ts';
import { conv2d } from '../../engine/ops/conv2d.ts';
import { linear } from '../../engine/ops/linear.ts';
import { groupNorm, layerNorm } from '../../engine/ops/norm.ts';
import { scope } from '../../engine/scope.ts';
import { empty } from '../../engine/tensor.ts';
import { BOUND, processorTime } from '../support/processor_time.ts';

/** A device that notes what it launches, and how many tensor maps its plans make. */
function watchedHopper() {
  const launched: string[] = [];
  const made = { maps: 0 };
  const api = standInApi(anyHopper);
  const names = new Map<Kernel, string>();
  const device = cudaDevice({
    ...api,
    cuModuleGetFunction(module, name) {
      const kernel = api.cuModuleGetFunction(module, name);
      names.set(kernel, name);
      return kernel;
    },
    cuTensorMapEncodeTiled(map) {
      made.maps++;
      return api.cuTensorMapEncodeTiled(map);
    },
    cuLaunchKernel(kernel, grid, block, shared, stream, parameters, offsets, cluster) {
      launched.push(
        [names.get(kernel), grid, block, shared, cluster, Buffer.from(parameters).toString('hex')].join(' '),
      );
      api.cuLaunchKernel(kernel, grid, block, shared, stream, parameters, offsets, cluster);
    },
  });
  const half = (...shape: number[]) => empty(shape, { device, dtype: 'bfloat16' });
  return { device, half, launched, made };
}

test('a call that was made before is launched as it was, without a plan', (t) => {
  const { half, launched, made } = watchedHopper();
  const [x, weight] = [half(2048, 1280), half(1280, 1280)];
  const run = () => {
    launched.length = 0;
    scope(() => void linear(x, weight));
    return [...launched];
  };
  const first = run();
  t.equal(first.length, 1);
  t.equal(made.maps, 3);
  t.same(run(), first);
  t.equal(made.maps, 3, 'no tensor map is made again');
  t.equal(lookupsOf(run).length, 1, 'what a plan looks up can still be asked for');
  overrides.set('nt 2048 1280 20 1', { tile: '80', splits: 1 });
  t.match(run()[0], /^gemm_sm90_nt_80_bfloat16 /, 'another choice of tile holds at once');
  overrides.clear();
  t.same(run(), first);
  t.end();
});

test('sums between two launches: planned anew where their memory is another', (t) => {
  const { device, half, launched, made } = watchedHopper();
  overrides.set('nt 128 640 40 1', { tile: '80', splits: 4 });
  const [rows, wide] = [half(128, 2560), half(640, 2560)];
  const split = () => {
    launched.length = 0;
    scope(() => void linear(rows, wide));
    return [...launched];
  };
  const first = split();
  t.equal(first.length, 2, 'split sums and their join');
  t.same(split(), first);
  const { maps } = made;
  const storages = device.memory.storages;
  // Someone holds the block that lay between them.
  const output = device.memory.take(128 * 640 * 2);
  const taken = device.memory.take(4 * 128 * 640 * 4);
  device.memory.give(output);
  const moved = split();
  t.not(moved[0], first[0], 'the sums go elsewhere');
  t.ok(made.maps > maps);
  t.equal(device.memory.storages, storages + 1, 'and nothing is held on to');
  t.same(split(), moved);
  device.memory.give(taken);
  const planned = made.maps;
  t.same(split(), first);
  t.equal(made.maps, planned, 'where it lay before it is found again');
  overrides.clear();
  t.end();
});

test('no memory for what lies between remembered launches: what was taken goes back', (t) => {
  const { driver, memory } = cudaDevice(standInApi({ ...anyHopper, bytes: 2 ** 20 }));
  const { address } = memory.take(1024);
  // Float32's group norm leaves partial sums of 32 KiB, and then those of each image.
  const pointers = Array<bigint>(9).fill(address);
  const backward = () => driver.launch('group_norm_backward_float32', [...pointers, 1, 16384, 32, 4, 0]);
  backward();
  memory.trim();
  const first = memory.take(2 ** 15);
  for (let bytes = 2 ** 19; bytes >= 256; bytes /= 2)
    while ((driver.room?.().free as number) >= bytes) memory.take(bytes);
  memory.give(first);
  const { storages } = memory;
  t.throws(backward, { name: 'MemoryError', message: /^out of memory: 0\.0 MiB wanted while these hold it/ });
  t.equal(memory.storages, storages, 'the first of two is not held on to');
  t.end();
});

test('calls are forgotten all at once when they are too many', (t) => {
  const memo = new PlanMemo();
  const nothing = { launches: [], workspaces: [] };
  for (let i = 0; i < 20_000; i++) memo.keep('op', [[i]], nothing);
  t.same(memo.find('op', [[0]]), [nothing]);
  memo.keep('one more', [[0]], nothing);
  t.same(memo.find('op', [[0]]), []);
  t.same(memo.find('one more', [[0]]), [nothing]);
  for (let i = 0; i < 9; i++) memo.keep('one more', [[0]], nothing);
  t.equal(memo.find('one more', [[0]]).length, 4, 'a call is remembered in a few places');
  t.end();
});

test('a call is known by each of its arguments', (t) => {
  const memo = new PlanMemo();
  const calls: [symbol: string, calls: (bigint | number)[][]][] = [
    ['op', [[1n, 2]]],
    ['op', [[1n, 2.5]]],
    ['op', [[1n, 2.25]]],
    ['op', [[1, 2]]],
    ['op', [[1n], [2]]],
    ['op', [[1n, 2, 0]]],
    ['op', [[2n ** 32n + 1n, 2]]],
    ['op', [[2n ** 33n + 1n, 2]]],
    ['op', [[1n, -2]]],
    ['other', [[1n, 2]]],
  ];
  const made = calls.map((_, i) => ({ launches: [], workspaces: [{ bytes: i, address: 0n }] }));
  calls.forEach(([symbol, args], i) => {
    t.same(memo.find(symbol, args), [], `${i} is new`);
    memo.keep(symbol, args, made[i]);
  });
  calls.forEach(([symbol, args], i) => {
    t.same(memo.find(symbol, structuredClone(args)), [made[i]], `${i} is found`);
  });
  t.end();
});

test('equal steps find equal memory, whatever order they give it back in', (t) => {
  const { memory } = watchedHopper().device;
  const step = (order: readonly number[]) => {
    const blocks = [1000, 1000, 5000, 1000].map((bytes) => memory.take(bytes));
    for (const i of order) memory.give(blocks[i]);
    return blocks.map(({ address }) => address);
  };
  const first = step([0, 1, 2, 3]);
  t.same(step([3, 1, 0, 2]), first);
  t.same(step([2, 3, 1, 0]), first);
  t.end();
});

test('an op of a Hopper GPU from JavaScript, of which the call itself is left out', (t) => {
  const device = cudaDevice(standInApi(anyHopper));
  const half = (...shape: number[]) => empty(shape, { device, dtype: 'bfloat16' });
  const [x, weight, one, image, filter] = [
    half(2, 1024, 1280),
    half(1280, 1280),
    half(1280),
    half(2, 32, 32, 1280),
    half(1280, 3, 3, 1280),
  ];
  const ops = {
    linear: () => linear(x, weight, one),
    conv2d: () => conv2d(image, filter, one, { padding: [1, 1, 1, 1] }),
    attention: () => attention(x, x, x, { heads: 20 }),
    'layer norm': () => layerNorm(x, one, one, { eps: 1e-5 }),
    'group norm': () => groupNorm(image, one, one, { groups: 32, eps: 1e-5 }),
  };
  for (const [what, run] of Object.entries(ops)) {
    const microseconds = processorTime(500, () => noGrad(() => scope(() => void run())));
    t.ok(microseconds < BOUND, `${what}: ${microseconds.toFixed(2)} microseconds`);
    t.comment(`${what}: ${microseconds.toFixed(2)} microseconds`);
  }
  t.end();
});
