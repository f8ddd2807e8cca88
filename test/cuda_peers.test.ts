// Copies between GPUs, on virtual ones that know each other: what they bring, what they wait for, and which GPU an error names.
import { test } from 'tap';
import type { GpuApi } from '../engine/cuda/api.ts';
import type { Device } from '../engine/device.ts';
import { scope, unscoped } from '../engine/scope.ts';
import { copyBetween, empty, type Tensor, tensor, zeros } from '../engine/tensor.ts';
import { openGpus } from './virtual-gpu/several.ts';

const onGpu = (device: Device, ...values: number[]): Tensor =>
  unscoped(() => tensor(values, [values.length], { device }));

test('copies between GPUs', (t) => {
  const { devices } = openGpus(2);
  const [a, b] = devices.map((device) => [onGpu(device, 1, 2), onGpu(device, 3)]);
  copyBetween([
    [b[0], a[0]],
    [b[1], a[1]],
  ]);
  a[0].clear();
  t.same([...b[0].floats(), ...b[1].floats()], [1, 2, 3]);
  t.same([...a[0].floats()], [0, 0], 'what comes after the copy is not copied');
  copyBetween([]);
  a[0].release();
  devices[0].memory.trim();
  const source = { address: a[1].block.address - 1024n, bytes: 256 };
  const copies = [{ to: b[0].block, from: source, bytes: 8 }];
  t.throws(() => devices[1].driver.copyFrom?.(devices[0].driver, copies), {
    message: /^out of bounds: cuMemcpyPeerAsync of 8 bytes at .* of a freed 256-byte allocation/,
  });
  const own = [{ to: b[0].block, from: b[1].block, bytes: 4 }];
  t.throws(() => devices[1].driver.copyFrom?.(devices[0].driver, own), { message: /^out of bounds/ });
  const nothing = unscoped(() => empty([2], { device: devices[0] }));
  t.throws(() => copyBetween([[b[0], nothing]]), {
    message: /^uninitialised: cuMemcpyPeerAsync reads byte 0/,
  });
  const replay = () => devices[1].driver.capture?.(() => copyBetween([[b[1], a[1]]]));
  t.throws(replay, { message: /tensors were copied in a step that is being captured/ });
  const cpu = { name: 'cpu', driver: {} } as Device;
  const there = { device: cpu } as Tensor;
  t.throws(() => copyBetween([[there, a[1]]]), { message: /cpu cannot take tensors from cuda:0: only GPUs/ });
  t.end();
});

test('a wait that is left out is a report', (t) => {
  /** The driver with its `at`-th wait of a stream for an event left out. */
  const without = (at: number) => (api: GpuApi) => {
    let calls = 0;
    const cuStreamWaitEvent: GpuApi['cuStreamWaitEvent'] = (stream, event) => {
      if (++calls !== at) api.cuStreamWaitEvent(stream, event);
    };
    return { ...api, cuStreamWaitEvent };
  };
  const run = (at: number) => () => {
    const [one, two] = openGpus(2, without(at)).devices;
    scope(() => {
      const [x, y] = [zeros([9], { device: one }), zeros([9], { device: two })];
      copyBetween([[y, x]]);
      x.clear();
    });
  };
  t.throws(run(1), { message: /^race: cuMemcpyPeerAsync does not wait for what is queued on GPU 0$/ });
  t.throws(run(2), { message: /^race: cuMemsetD8Async on GPU 0 does not wait for GPU 1's copy$/ });
  t.doesNotThrow(run(3));
  t.end();
});

test('where memory runs out, the GPU is told', async (t) => {
  const { failing, devices } = openGpus(2);
  failing[1].fail('cuMemAllocAsync', 'CUDA_ERROR_OUT_OF_MEMORY', { always: true });
  t.throws(() => unscoped(() => zeros([8], { device: devices[1] })), {
    message:
      /^out of memory on cuda:1: 0\.0 MiB wanted while these hold it: nothing; .* are free; use a smaller/,
  });
  t.end();
});
