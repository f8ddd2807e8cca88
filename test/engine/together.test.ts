// Launches that are gathered: those of one kernel go in one call of the driver while none needs another's result, and all go in
// the order in which they were made. And attention's projections, which are one launch on Hopper.
import { test } from 'tap';
import { CudaError } from '../../engine/cuda/errors.ts';
import { anyHopper, standInApi } from '../../engine/cuda/stand_in.ts';
import { cudaDevice } from '../../engine/device.ts';
import type { Driver } from '../../engine/driver.ts';
import { noGrad } from '../../engine/grad.ts';
import { linear } from '../../engine/ops/linear.ts';
import { silu } from '../../engine/ops/unary.ts';
import { scope } from '../../engine/scope.ts';
import { empty } from '../../engine/tensor.ts';
import { Together } from '../../engine/together.ts';

function noted(): { together: Together; calls: string[] } {
  const calls: string[] = [];
  const driver = {
    launch: (symbol, args) => void calls.push(`${symbol} ${args}`),
    launchAll: (symbol, all) => void calls.push(`${symbol} ${all.map(String).join(' and ')}`),
  } satisfies Partial<Driver>;
  return { together: new Together(driver as unknown as Driver), calls };
}

test('what is held goes when something needs it, or when all is there', (t) => {
  const { together, calls } = noted();
  const [x, a, b, c] = [1n, 2n, 3n, 4n];
  together.launch('f', [a, x]);
  t.same(calls.splice(0), ['f 2,1'], 'alone outside');
  const result = together.gather(() => {
    together.launch('f', [a, x]);
    together.launch('f', [b, x]);
    t.same(calls, [], 'held');
    together.launch('f', [c, a]);
    t.same(calls.splice(0), ['f 2,1 and 3,1'], 'before one that reads what they make');
    together.launch('f', [a, x]);
    t.same(calls.splice(0), ['f 4,2'], 'and before one that writes what another reads');
    together.launch('g', [b, x]);
    t.same(calls.splice(0), ['f 2,1'], 'and before another kernel');
    together.launchAll('h', [[a], [b]]);
    t.same(calls.splice(0), ['g 3,1', 'h 2 and 3']);
    together.launch('f', [a, x]);
    return 7;
  });
  t.equal(result, 7);
  t.same(calls.splice(0), ['f 2,1']);
  const failing = () => {
    together.launch('f', [a, x]);
    throw new Error('no more');
  };
  t.throws(() => together.gather(failing), /no more/);
  together.gather(() => together.launch('f', [b, x]));
  t.same(calls, ['f 3,1'], 'what an error left behind is not launched');
  t.end();
});

test('layers of one x are one launch on Hopper; others follow each other', (t) => {
  const api = standInApi(anyHopper);
  let count = 0;
  const device = cudaDevice({ ...api, cuLaunchKernel: () => void count++ });
  const half = (...shape: number[]) => empty(shape, { device, dtype: 'bfloat16' });
  const [x, wide, narrow, bias] = [half(128, 64), half(320, 64), half(80, 64), half(320)];
  const launches = (fn: () => unknown) => {
    count = 0;
    noGrad(() => scope(() => void device.together(fn)));
    return count;
  };
  const layers = (n: number) => () => Array.from({ length: n }, () => linear(x, wide));
  t.same(
    [1, 2, 3].map((n) => launches(layers(n))),
    [1, 1, 1],
  );
  t.equal(launches(layers(4)), 4, 'more than three');
  t.equal(
    launches(() => [linear(x, wide), linear(x, wide, bias)]),
    2,
    'a bias',
  );
  t.equal(
    launches(() => [linear(x, wide), linear(x, narrow)]),
    2,
    'another width',
  );
  t.equal(
    launches(() => [linear(x, wide), linear(half(128, 64), wide)]),
    2,
    'another x',
  );
  t.equal(
    launches(() => [linear(x, wide), silu(linear(x, wide))]),
    2,
    'a kernel that reads the last of them',
  );
  t.end();
});

test('what a launch reads that is held back stays out of memory that is freed', (t) => {
  const api = standInApi(anyHopper);
  const calls: (string | bigint)[] = [];
  let full = false;
  const device = cudaDevice({
    ...api,
    cuLaunchKernel: () => void calls.push('launch'),
    cuMemFreeAsync: (address, stream) => {
      calls.push(address);
      api.cuMemFreeAsync(address, stream);
    },
    cuMemAllocAsync: (...args) => {
      if (full && calls.length === 0) throw new CudaError('CUDA_ERROR_OUT_OF_MEMORY', 'cuMemAllocAsync');
      return api.cuMemAllocAsync(...args);
    },
  });
  noGrad(() =>
    scope(() => {
      const half = (...shape: number[]) => empty(shape, { device, dtype: 'bfloat16' });
      const [weight, wide, idle] = [half(320, 64), half(640, 64), half(512, 512)];
      const freed = idle.block.address;
      idle.release();
      device.together(() => {
        const x = half(128, 64);
        linear(x, weight);
        x.release();
        full = true;
        const y = half(256, 64); // for which room has to be made
        t.same(calls, [freed], 'what is idle goes, and x stays');
        linear(y, wide);
      });
      t.same(calls.slice(1), ['launch', 'launch']);
      device.memory.trim();
      t.equal(calls.length, 4, 'x goes once it is read');
    }),
  );
  t.end();
});

test('nor is it given to others, such as the sums of a product whose k is split', (t) => {
  const api = standInApi({ bytes: 2 ** 32, capability: [8, 6], multiprocessors: 82 });
  const pointers: bigint[][] = [];
  const device = cudaDevice({
    ...api,
    cuLaunchKernel(...[, , , , , packed, offsets]) {
      const view = new DataView(packed.buffer, packed.byteOffset);
      pointers.push(offsets.slice(0, 4).map((at) => view.getBigUint64(at, true)));
    },
  });
  noGrad(() =>
    scope(() => {
      const half = (...shape: number[]) => empty(shape, { device, dtype: 'bfloat16' });
      const x = half(256, 1024);
      const layer = () => scope(() => linear(x, half(64, 1024))); // whose weight is decoded for it
      device.together(() => [layer(), layer()]);
      device.together(() => {
        layer();
        t.throws(() => layer().reshape(1, 1), /takes another number/);
      });
    }),
  );
  const products = pointers.filter(([, partial]) => partial !== 0n);
  t.ok(products.length > 0, 'k is split');
  for (const [, partial, a, b] of products) t.notOk([a, b].includes(partial), 'sums lie elsewhere');
  t.equal(device.memory.storages, 0, 'and in the end all is given back');
  t.end();
});
