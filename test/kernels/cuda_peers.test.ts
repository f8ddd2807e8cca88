// Copies between GPUs, on virtual ones that know each other: what they bring, what they wait for, and which GPU an error names.
import { test } from 'tap';
import type { GpuApi } from '../../engine/cuda/api.ts';
import type { Device } from '../../engine/device.ts';
import type { Block, Exchange } from '../../engine/driver.ts';
import { copyBetween } from '../../engine/exchange.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { empty, type Tensor, tensor, zeros } from '../../engine/tensor.ts';
import { openGpus } from '../virtual-gpu/several.ts';

const onGpu = (device: Device, ...values: number[]): Tensor =>
  unscoped(() => tensor(values, [values.length], { device }));

const onGpus = (devices: readonly Device[], values: number[]): Tensor[] =>
  devices.map((device, i) => onGpu(device, ...values.map((value) => 10 * i + value)));

for (const peers of [false, true]) {
  const how = peers ? 'straight' : 'by the driver';

  test(`copies between GPUs, ${how}`, (t) => {
    const { devices, failing } = openGpus(2, { peers });
    const [a, b] = devices.map((device) => [onGpu(device, 1, 2), onGpu(device, 3)]);
    copyBetween([
      [b[0], a[0]],
      [b[1], a[1]],
    ]);
    a[0].clear();
    t.same([...b[0].floats(), ...b[1].floats()], [1, 2, 3]);
    t.same([...a[0].floats()], [0, 0], 'what comes after the copy is not copied');
    t.same(
      failing.map(({ made }) => [
        made('cuMemcpyDtoDAsync'),
        made('cuMemcpyPeerAsync'),
        made('cuMemPoolSetAccess'),
      ]),
      peers
        ? [
            [0, 0, 1],
            [2, 0, 0],
          ]
        : [
            [0, 0, 0],
            [0, 2, 0],
          ],
      "the target copies, and the source's pool is opened once",
    );
    copyBetween([]);
    const events = () => failing.map(({ made }) => made('cuEventCreate'));
    const marks = events();
    copyBetween([[b[1], a[1]]]);
    t.same(events(), marks, 'a GPU marks its queue by one event');
    a[0].release();
    devices[0].memory.trim();
    const source = { address: a[1].block.address - 1024n, bytes: 256 };
    const copy = (from: Block) => {
      const [here, there] = devices.map(({ driver }) => driver.exchange as Exchange);
      return () => there.copy(b[0].block, from, here, 8);
    };
    t.throws(copy(source), {
      message: /^out of bounds: cuMemcpy\w+ of 8 bytes at .* of a freed 256-byte allocation/,
    });
    if (!peers) t.throws(copy(b[1].block), { message: /^out of bounds/ });
    const nothing = unscoped(() => empty([2], { device: devices[0] }));
    t.throws(() => copyBetween([[b[0], nothing]]), {
      message: /^uninitialised: cuMemcpy\w+ reads byte 0/,
    });
    const replay = () => devices[1].driver.capture?.(() => copyBetween([[b[1], a[1]]]));
    t.throws(replay, { message: /tensors were copied in a step that is being captured/ });
    const cpu = { name: 'cpu', driver: {} } as Device;
    const there = { device: cpu } as Tensor;
    t.throws(() => copyBetween([[there, a[1]]]), {
      message: /cpu cannot take tensors from cuda:0: only GPUs/,
    });
    t.end();
  });

  test(`a ring of copies in one call waits for none of them, ${how}`, (t) => {
    const { devices } = openGpus(3, { peers });
    const [from, to] = [onGpus(devices, [1, 2]), onGpus(devices, [0, 0])];
    copyBetween(to.map((tensor, i) => [tensor, from[(i + 1) % 3]]));
    for (const tensor of from) tensor.clear();
    t.same(
      to.map((tensor) => [...tensor.floats()]),
      [
        [11, 12],
        [21, 22],
        [1, 2],
      ],
    );
    // What the first brings the second needs: that is for two calls.
    const chain = [[to[1], from[0]] as const, [to[2], to[1]] as const];
    t.throws(() => copyBetween(chain), {
      message: /^race: cuMemcpy\w+ does not wait for what is queued on GPU 1$/,
    });
    t.end();
  });
}

test('where a pool cannot be opened, the driver carries the bytes', (t) => {
  const { devices, failing } = openGpus(2, { peers: true });
  failing[0].fail('cuMemPoolSetAccess', 'CUDA_ERROR_NOT_SUPPORTED');
  const [a, b] = onGpus(devices, [1, 2]);
  for (let i = 0; i < 2; i++) copyBetween([[b, a]]);
  t.same([...b.floats()], [1, 2]);
  t.equal(failing[1].made('cuMemcpyPeerAsync'), 2);
  t.equal(failing[0].made('cuMemPoolSetAccess'), 1);
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
  /** Two GPUs swap: each waits for the other before it copies, and before it writes where the other reads. */
  const run = (at: number) => () => {
    const { devices } = openGpus(2, { wrap: without(at) });
    scope(() => {
      const [from, to] = [0, 0].map(() => devices.map((device) => zeros([9], { device })));
      copyBetween([
        [to[1], from[0]],
        [to[0], from[1]],
      ]);
      for (const tensor of from) tensor.clear();
    });
  };
  for (const [at, gpu] of [0, 1].entries()) {
    t.throws(run(at + 1), {
      message: `race: cuMemcpyPeerAsync does not wait for what is queued on GPU ${gpu}`,
    });
    const early = new RegExp(`^race: cuMemsetD8Async on GPU ${gpu} does not wait for GPU ${1 - gpu}'s copy$`);
    t.throws(run(at + 3), { message: early });
  }
  t.doesNotThrow(run(5));
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
