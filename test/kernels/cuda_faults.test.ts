// What the driver can refuse, on the virtual GPU behind a driver that fails when told: every error is named and says the
// mend, nothing leaks, nothing hangs, and after what is not fatal the same device goes on.
import { test } from 'tap';
import { type GpuApi, stickyResults } from '../../engine/cuda/api.ts';
import { CudaError, type CudaResult, cudaResults } from '../../engine/cuda/errors.ts';
import { KernelTable } from '../../engine/cuda/kernel_table.ts';
import { openStaging } from '../../engine/cuda/staging.ts';
import { cudaDevice, type Device } from '../../engine/device.ts';
import { backward, clearGrad, requireGrad } from '../../engine/grad.ts';
import { Parameter } from '../../engine/module.ts';
import { linear } from '../../engine/ops/linear.ts';
import { mse } from '../../engine/ops/loss.ts';
import { exp, silu } from '../../engine/ops/unary.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import { adamw } from '../../train/optimizers/adamw.ts';
import { clipGradients } from '../../train/optimizers/clip.ts';
import { optimize } from '../../train/optimizers/rule.ts';
import { values } from '../support/op_cases.ts';
import { failingGpu } from '../virtual-gpu/failing.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

/** Forward, backward, clipping and AdamW of a layer in bfloat16 with a float32 master; gives the weights after it. */
function smallStep(device: Device): Float32Array {
  const weight = new Parameter([24, 32]);
  weight.tensor = unscoped(() => tensor(values(24 * 32, 1), [24, 32], { device, dtype: 'bfloat16' }));
  requireGrad(weight.tensor);
  const parameters = new Map([['weight', weight]]);
  try {
    const settings = { betas: [0.9, 0.999] as const, eps: 1e-8, weight_decay: 0.01 };
    const optimizer = optimize(parameters, adamw(settings), {
      ...settings,
      stochastic_rounding: false,
      seed: 0,
    });
    try {
      scope(() => {
        const x = tensor(values(9 * 32, 2), [9, 32], { device, dtype: 'bfloat16' });
        const y = silu(linear(x, weight.tensor));
        backward(mse(y, tensor(values(9 * 24, 3), [9, 24], { device, dtype: 'bfloat16' })));
      });
      optimizer.step(0.1, clipGradients(parameters, 0.1).scale);
      return optimizer.weightOf('weight').floats();
    } finally {
      optimizer.release();
    }
  } finally {
    clearGrad(weight.tensor);
    weight.unload();
  }
}

function openFailing(memoryBytes = 2 ** 30) {
  const gpu = openVirtualGpu({ memoryBytes, arenaBytes: 2 ** 24 });
  const failing = failingGpu(gpu);
  return { gpu, failing, device: cudaDevice(failing.api) };
}

const same = (a: Float32Array, b: Float32Array): boolean =>
  Buffer.compare(Buffer.from(a.buffer), Buffer.from(b.buffer)) === 0;

/** What `fn` throws. */
function thrown(fn: () => unknown): Error | undefined {
  try {
    fn();
    return undefined;
  } catch (error) {
    return error as Error;
  }
}

test('a step after which one allocation was refused succeeds, as the cache was given back first', (t) => {
  const { device, gpu, failing } = openFailing();
  const want = smallStep(device);
  device.memory.trim();
  const start = gpu.liveAllocations();
  for (let at = 1; ; at++) {
    failing.fail('cuMemAllocAsync', 'CUDA_ERROR_OUT_OF_MEMORY', { at });
    const got = smallStep(device);
    if (!failing.failed) {
      t.ok(at > 10, `${at - 1} allocations were refused in turn`);
      break;
    }
    t.ok(same(got, want), `allocation ${at} refused once`);
    device.memory.trim();
    t.equal(gpu.liveAllocations(), start, 'allocations');
  }
  t.end();
});

test('where no more memory can be had, at each allocation in turn: told who holds it, all given back, and on it goes', (t) => {
  const { device, gpu, failing } = openFailing();
  const want = smallStep(device);
  device.memory.trim();
  const [start, live] = [gpu.liveAllocations(), device.memory.live];
  for (let at = 1; ; at++) {
    failing.fail('cuMemAllocAsync', 'CUDA_ERROR_OUT_OF_MEMORY', { at, always: true });
    const error = thrown(() => smallStep(device));
    if (!failing.failed) break;
    t.ok(error instanceof UserError, `allocation ${at}`);
    t.match(
      error?.message,
      /^out of memory: \d\.\d MiB wanted while these hold it: .*; 1\.00 GiB of the device's 1\.00 GiB are free; use a smaller size, fewer images or a half-precision --dtype$/,
    );
    t.same([device.memory.storages, device.memory.live], [0, live], `live tensors after ${at}`);
    failing.heal();
    t.ok(same(smallStep(device), want), `the same step then succeeds`);
    device.memory.trim();
    t.equal(gpu.liveAllocations(), start, 'allocations');
  }
  t.end();
});

test('where code finds no memory, the pool gives back what it caches, and then what recordings hold', (t) => {
  const MIB = 2 ** 20;
  for (const call of ['cuModuleLoadData', 'cuModuleGetFunction', 'cuLaunchKernel'] as const) {
    for (const most of [2 * MIB, 0]) {
      const gpu = openVirtualGpu();
      const device: Device = cudaDevice({
        ...gpu,
        [call](...args: unknown[]) {
          if (device.memory.held > most) throw new CudaError('CUDA_ERROR_OUT_OF_MEMORY', call);
          return (gpu[call] as (...args: unknown[]) => unknown)(...args);
        },
      });
      const { memory, driver } = device;
      memory.give(memory.take(MIB));
      let recorded = true;
      const drop = () => {
        recorded = false;
      };
      memory.openReserve().record(new Map([[2 * MIB, 1]]), drop, () => undefined);
      t.equal(memory.held, 3 * MIB);
      driver.launch('silu_forward_float32', [0n, 0n, 0]);
      t.same([memory.held, recorded], [most, most > 0], call);
    }
    const { device, failing } = openFailing();
    failing.fail(call, 'CUDA_ERROR_OUT_OF_MEMORY', { always: true });
    t.throws(() => device.driver.launch('silu_forward_float32', [0n, 0n, 0]), {
      message: `${call} failed with CUDA_ERROR_OUT_OF_MEMORY; use a smaller size, fewer images or a half-precision --dtype`,
    });
  }
  t.end();
});

test('the message names the holders, the largest first', (t) => {
  const { device, failing } = openFailing();
  const weight = new Parameter([1024, 1024]);
  weight.tensor = unscoped(() => tensor(new Float32Array(2 ** 20), [1024, 1024], { device }));
  const optimizer = optimize(new Map([['w', weight]]), adamw({ betas: [0.9, 0.99], eps: 1e-8 }), {
    ...{ weight_decay: 0, stochastic_rounding: false, seed: 0 },
  });
  failing.fail('cuMemAllocAsync', 'CUDA_ERROR_OUT_OF_MEMORY', { always: true });
  t.throws(() => device.memory.take(2 ** 25), {
    message: /32.0 MiB wanted.*optimizer 8.0 MiB, tensors at work 4.0 MiB/,
  });
  optimizer.release();
  weight.unload();
  t.equal(device.memory.storages, 0);
  t.end();
});

test('without memory to pin, copies go directly, and what was had by then is given back', (t) => {
  for (const call of ['cuMemAllocHost', 'cuEventCreate'] as const)
    for (const at of [1, 2]) {
      const { device, failing } = openFailing();
      failing.fail(call, 'CUDA_ERROR_OUT_OF_MEMORY', { at, always: true });
      const numbers = Float32Array.from({ length: 50_000 }, (_, i) => i);
      scope(() => t.ok(same(tensor(numbers, [50_000], { device }).floats(), numbers)));
      t.ok(failing.failed);
      const had = (made: keyof GpuApi, failed: boolean) => failing.made(made) - Number(failed);
      t.equal(
        failing.made('cuMemFreeHost'),
        had('cuMemAllocHost', call === 'cuMemAllocHost'),
        'pinned memory',
      );
      t.equal(failing.made('cuEventDestroy'), had('cuEventCreate', call === 'cuEventCreate'), 'events');
    }
  t.end();
});

test('a GPU that cannot be opened is let go', (t) => {
  for (const call of ['cuDeviceGetDefaultMemPool', 'cuMemPoolSetAttribute', 'cuStreamCreate'] as const) {
    const { api, fail, made } = failingGpu(openVirtualGpu());
    fail(call, 'CUDA_ERROR_OUT_OF_MEMORY');
    t.throws(() => cudaDevice(api), { message: new RegExp(`^${call} failed with CUDA_ERROR_OUT_OF_MEMORY`) });
    t.equal(made('cuDevicePrimaryCtxRelease'), 1, call);
  }
  t.end();
});

test('an upload may be overwritten at once, whatever its size and wherever it lies', (t) => {
  for (const pinned of [true, false]) {
    const { gpu, failing } = openFailing();
    if (!pinned) failing.fail('cuMemAllocHost', 'CUDA_ERROR_OUT_OF_MEMORY', { always: true });
    const stream = gpu.cuStreamCreate(1);
    const staging = openStaging(failing.api, stream, 4096);
    const sizes = [5, 256, 1, 3000, 900, 4096, 70_000, 4095, 300, 4097, 12];
    const whole = Uint8Array.from({ length: sizes.reduce((a, b) => a + b) }, (_, i) => (i * 7) % 251);
    const to = gpu.cuMemAllocAsync(whole.length, stream);
    let at = 0;
    for (const size of sizes) {
      const source = whole.slice(at, at + size);
      staging.upload(to + BigInt(at), source);
      source.fill(0);
      at += size;
    }
    const back = new Uint8Array(whole.length);
    for (const size of [50, 80_000]) {
      const part = back.subarray(0, size);
      staging.download(part, to);
      t.equal(Buffer.compare(part, whole.subarray(0, size)), 0, `${part.length} bytes back`);
      back.fill(0);
    }
  }
  const gpu = openVirtualGpu();
  const source = Uint8Array.of(1, 2);
  gpu.cuMemcpyHtoDAsync(gpu.cuMemAllocAsync(2, 0n), source, 0n);
  source[0] = 3;
  t.throws(() => gpu.cuStreamSynchronize(0n), { message: /the host wrote memory that a copy/ });
  t.end();
});

/** Where a fault of a kernel shows, as work is asynchronous: at a later launch, copy or wait. */
const places: readonly (keyof GpuApi)[] = [
  'cuLaunchKernel',
  'cuMemcpyHtoDAsync',
  'cuMemcpyDtoHAsync',
  'cuStreamSynchronize',
  'cuMemAllocAsync',
];
const afterLaunch: readonly string[] = ['cuMemcpyDtoHAsync', 'cuStreamSynchronize'];

test('each sticky error at a launch, a copy, a wait: told once in full, then every call is refused', (t) => {
  for (const result of stickyResults) {
    t.ok(cudaResults[result] > 0, result);
    for (const place of places) {
      const { device, failing, gpu } = openFailing();
      const error = thrown(() =>
        scope(() => {
          silu(tensor([1, 2], [2], { device }));
          failing.fail(place, result, { always: true });
          return exp(tensor(values(1000, 1), [1000], { device })).floats();
        }),
      );
      const where = `${result} at ${place}`;
      t.ok(error instanceof UserError && error.name === 'CudaError', `${where}: ${error?.message}`);
      const kernel = afterLaunch.includes(place) ? 'exp_forward_float32' : 'silu_forward_float32';
      t.match(
        error?.message,
        new RegExp(`^${place} failed with ${result}: the last kernel queued was ${kernel}; \\w`),
      );
      t.equal(device.memory.storages, 0, `${where}: scopes are cleared`);
      // The driver is not asked again, even if it would answer.
      failing.heal();
      const launches = gpu.stats.launches;
      const later = thrown(() => device.driver.launch('silu_forward_float32', [1n, 1n, 1]));
      t.match(
        later?.message,
        new RegExp(`^cuLaunchKernel failed with ${result}: the GPU was lost before, in ${place}`),
      );
      t.throws(() => device.memory.take(2 ** 20), { name: 'CudaError' });
      t.throws(() => device.memory.trim(), { name: 'CudaError' });
      t.equal(gpu.stats.launches, launches, `${where}: nothing ran`);
    }
  }
  t.end();
});

test('errors that are not sticky leave the device as it was', (t) => {
  const { device, failing } = openFailing();
  const passing: CudaResult[] = ['CUDA_ERROR_INVALID_VALUE', 'CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES'];
  for (const result of passing) {
    failing.fail('cuLaunchKernel', result);
    const run = () => scope(() => silu(tensor([0], [1], { device })).floats()[0]);
    t.throws(run, { name: 'CudaError', message: new RegExp(`cuLaunchKernel failed with ${result}`) });
    t.equal(run(), 0);
    t.equal(device.memory.storages, 0);
  }
  t.end();
});

test('PTX newer than the driver reads: both versions and the mend', (t) => {
  const old = cudaDevice(openVirtualGpu({ driverVersion: 10020 }));
  scope(() => {
    const x = tensor([1], [1], { device: old });
    t.throws(() => silu(x), {
      name: 'CudaError',
      message:
        'cuModuleLoadData failed with CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the elementwise_float32 kernels are PTX 7, and a driver for CUDA 10.2 reads up to 6.2; the NVIDIA driver is too old for these kernels; install r535 or later',
    });
  });
  t.equal(old.memory.storages, 0);
  const launch = (driverVersion: number, version: string) => () =>
    new KernelTable(
      openVirtualGpu({ driverVersion }),
      () => `.version ${version}\n.target sm_80\n.address_size 64\n`,
    ).ready({ family: 'f', entry: 'e', grid: [1, 1, 1], block: 32, shared: 0, args: [] }, 'float32');
  const missing = { message: /f_float32.ptx.br has no kernel e_float32/ };
  for (const [driver, newest, next] of [
    [11080, '7.8', '8.0'],
    [12020, '8.2', '8.3'],
    [12060, '8.5', '8.6'],
    [12090, '8.8', '8.9'],
    [13000, '9.0', '9.1'],
  ] as const) {
    t.throws(launch(driver, newest), missing, `CUDA ${driver} reads PTX ${newest}`);
    t.throws(launch(driver, next), { message: /CUDA_ERROR_UNSUPPORTED_PTX_VERSION/ }, `and not ${next}`);
  }
  t.end();
});
