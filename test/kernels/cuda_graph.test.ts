// A step recorded as a graph and replayed, on the virtual GPU: the same bits as eager runs, on memory that nobody else gets;
// misuse is an error. What models are recorded: cuda_recorded.test.ts.
import { test } from 'tap';
import { eagerStep, type Step } from '../../engine/capture.ts';
import type { GpuApi } from '../../engine/cuda/api.ts';
import { cudaDevice, type Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { attention } from '../../engine/ops/attention.ts';
import { linear } from '../../engine/ops/linear.ts';
import { concat } from '../../engine/ops/move.ts';
import { groupNorm } from '../../engine/ops/norm.ts';
import { scale, silu } from '../../engine/ops/unary.ts';
import { scope } from '../../engine/scope.ts';
import { empty, type Tensor, tensor } from '../../engine/tensor.ts';
import { values } from '../support/op_cases.ts';
import { failingGpu } from '../virtual-gpu/failing.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

/** The device, and how often each call of its driver was made. */
function open() {
  const gpu = openVirtualGpu({ arenaBytes: 2 ** 25 });
  const calls: Record<string, number> = {};
  const counted = Object.entries(gpu).map(([name, call]) => [
    name,
    (...args: unknown[]) => {
      calls[name] = (calls[name] ?? 0) + 1;
      return (call as (...args: unknown[]) => unknown)(...args);
    },
  ]);
  const failing = failingGpu(Object.fromEntries(counted) as GpuApi);
  return { device: cudaDevice(failing.api), gpu, calls, failing };
}

const CHANNELS = 32;
const shape = [2, 6, CHANNELS];

/** Ops with plans of several launches and workspaces: norm, split products, attention of wide heads. */
function block(device: Device) {
  const made = (seed: number, ...dims: number[]) =>
    tensor(
      values(
        dims.reduce((a, b) => a * b),
        seed,
      ),
      dims,
      { device, dtype: 'bfloat16' },
    );
  const weights = { gamma: made(1, CHANNELS), beta: made(2, CHANNELS), w: made(3, CHANNELS, 2 * CHANNELS) };
  const x = empty(shape, { device, dtype: 'bfloat16' });
  const forward = (): Tensor =>
    noGrad(() => {
      const h = groupNorm(x.reshape(2, 2, 3, CHANNELS), weights.gamma, weights.beta, {
        ...{ groups: 4, eps: 1e-5, silu: false },
      }).reshape(...shape);
      const mixed = attention(h, h, x, { heads: 2 });
      return silu(linear(concat([mixed, x], 2), weights.w));
    });
  return { x, weights, forward };
}

const inputs = (run: number): Float64Array => values(2 * 6 * CHANNELS, 10 + run);
const read = (y: Tensor): string => Buffer.from(y.bytes()).toString('hex');

test('replays give the bits of eager runs, in one call each, and allocate nothing', (t) => {
  const { device, calls, gpu } = open();
  scope(() => {
    const { x, forward } = block(device);
    const eager = eagerStep(forward);
    const want = [0, 1, 2, 3, 4, 5].map((run) => {
      x.set(inputs(run));
      return eager.run(read);
    });
    t.equal(new Set(want).size, 6, 'six different results');
    const step = device.step(forward);
    want.forEach((y, run) => {
      const [launches, allocations] = [calls.cuLaunchKernel, gpu.liveAllocations()];
      x.set(inputs(run));
      t.ok(step.run(read) === y, `run ${run}`);
      // The second run is recorded too.
      const queued = run < 2 ? launches + 7 * (run + 1) : launches;
      t.ok(run < 2 ? calls.cuLaunchKernel >= queued : calls.cuLaunchKernel === queued, 'launches');
      if (run > 1) t.equal(gpu.liveAllocations(), allocations, 'allocations');
    });
    t.equal(calls.cuGraphLaunch, 4);
    t.equal(calls.cuStreamBeginCapture, 1);
    step.release();
    t.equal(calls.cuGraphExecDestroy, 1);
    t.equal(calls.cuGraphDestroy, 1);
  });
  t.same([device.memory.storages, device.memory.live], [0, 0]);
  device.memory.trim();
  t.equal(device.memory.held, 0, 'nor is its memory kept from others');
  t.end();
});

test('while a step can be replayed nobody else gets its memory, and what it reads is not freed', (t) => {
  const { device } = open();
  scope(() => {
    const { x, weights, forward } = block(device);
    const step = device.step(forward);
    for (let run = 0; run < 3; run++) {
      x.set(inputs(run));
      step.run(read);
    }
    const want = step.run(read);
    // The model is let go, and its memory asked for by others, of all the sizes that the step takes.
    for (const t of [x, ...Object.values(weights)]) t.release();
    const others = [1, 2, 4, 8, 16].flatMap((k) =>
      Array.from({ length: 8 }, (_, i) => tensor(values(64 * k, i), [64 * k], { device })),
    );
    t.ok(step.run(read) === want, 'the step still reads what it was recorded on');
    const intact = others.every((y, i) => {
      const { size } = y;
      return (
        Buffer.compare(Buffer.from(y.bytes()), Buffer.from(Float32Array.from(values(size, i % 8)).buffer)) ===
        0
      );
    });
    t.ok(intact, 'and writes into nothing of others');
    step.release();
  });
  t.same([device.memory.storages, device.memory.live], [0, 0]);
  t.end();
});

test('steps that take turns share memory', (t) => {
  const { device, gpu, calls, failing } = open();
  scope(() => {
    const reserve = device.memory.openReserve();
    const blocks = [1, 2, 3].map(() => block(device));
    const want = blocks.map(({ x, forward }, i) => {
      x.set(inputs(i));
      return eagerStep(forward).run(read);
    });
    const held: number[] = [];
    const steps = blocks.map(({ forward }) => {
      const step = device.step(forward, reserve);
      for (let run = 0; run < 3; run++) step.run(read);
      held.push(gpu.liveAllocations());
      return step;
    });
    // Each keeps its result, and no more.
    t.same([held[1] - held[0], held[2] - held[1]], [1, 1]);
    for (const i of [2, 0, 1, 0, 2]) t.ok(steps[i].run(read) === want[i], `step ${i}`);
    failing.fail('cuGraphInstantiate', 'CUDA_ERROR_OUT_OF_MEMORY', { at: 1 });
    const fourth = device.step(blocks[0].forward, reserve);
    for (let run = 0; run < 3; run++) t.ok(fourth.run(read) === want[0], 'one that is not recorded');
    t.ok(failing.failed);
    const launches = calls.cuGraphLaunch;
    for (const step of steps) step.run(read);
    t.equal(calls.cuGraphLaunch, launches + 3, 'leaves the others their recordings');
    for (const step of [...steps, fourth]) step.release();
    reserve.release();
  });
  t.same([device.memory.storages, device.memory.live], [0, 0]);
  t.end();
});

test('what is read of a run outlives the recordings of steps that share its memory', (t) => {
  const { device, failing } = open();
  scope(() => {
    const reserve = device.memory.openReserve();
    const [first, second, third] = [1, 2, 3].map((seed) => {
      const x = tensor(values(64, seed), [64], { device });
      return device.step(() => noGrad(() => scope(() => silu(scale(x, 2)))), reserve);
    });
    const copyOf = (step: Step): Tensor => step.run((y) => noGrad(() => scale(y, 1)));
    for (let run = 0; run < 3; run++) first.run(read);
    /** Whether a copy is in memory of its own, and stays as it was when the recording runs again. */
    const stays = (copy: Tensor): boolean => {
      const want = read(copy);
      first.run(read);
      return !device.memory.isReserved(copy.block) && read(copy) === want;
    };
    t.ok(stays(copyOf(second)), 'of the first run');
    t.ok(stays(copyOf(second)), 'of the second');
    failing.fail('cuGraphInstantiate', 'CUDA_ERROR_OUT_OF_MEMORY', { always: true });
    for (let run = 0; run < 2; run++) third.run(read);
    t.ok(failing.failed);
    t.ok(stays(copyOf(third)), 'of one that is not recorded');
    for (const step of [first, second, third]) step.release();
    reserve.release();
  });
  t.same([device.memory.storages, device.memory.live], [0, 0]);
  t.end();
});

test('what a reader of a run has made goes where it fails', (t) => {
  const { device } = open();
  const x = tensor(values(64, 1), [64], { device });
  const step = device.step(() => noGrad(() => silu(x)));
  for (let run = 0; run < 4; run++) {
    const fails = (y: Tensor) => {
      noGrad(() => scale(y, 1));
      throw new Error('not to be read');
    };
    t.throws(() => step.run(fails), /not to be read/);
    t.equal(device.memory.storages, run < 1 ? 1 : 2, 'x, and what is recorded');
  }
  step.release();
  x.release();
  t.same([device.memory.storages, device.memory.live], [0, 0]);
  t.end();
});

test('where a graph or its memory does not fit, the step goes on eagerly', (t) => {
  for (const call of ['cuStreamBeginCapture', 'cuStreamEndCapture', 'cuGraphInstantiate'] as const) {
    const { device, failing } = open();
    scope(() => {
      const { x, forward } = block(device);
      const step = device.step(forward);
      x.set(inputs(0));
      const want = step.run(read);
      failing.fail(call, 'CUDA_ERROR_OUT_OF_MEMORY');
      t.ok(step.run(read) === want, call);
      t.ok(failing.failed);
      t.ok(step.run(read) === want);
      t.equal(failing.made('cuStreamBeginCapture'), 1, 'it is not tried again');
      t.equal(failing.made('cuGraphLaunch'), 0);
      step.release();
    });
    t.same([device.memory.storages, device.memory.live], [0, 0]);
  }
  t.end();
});

test('where a recorded graph finds no memory at a launch, the step goes on eagerly', (t) => {
  for (const [replays, recordings] of [
    [1, 1],
    [8, 2],
  ] as const) {
    const { device, failing } = open();
    scope(() => {
      const x = tensor(values(64, 1), [64], { device });
      const step = device.step(() => noGrad(() => silu(x)));
      const want = step.run(read);
      for (let run = 0; run < 1 + replays; run++) step.run(read);
      failing.fail('cuGraphLaunch', 'CUDA_ERROR_OUT_OF_MEMORY', { always: true });
      t.ok(step.run(read) === want);
      t.ok(failing.failed);
      t.equal(failing.made('cuGraphExecDestroy'), 1, 'what did not fit is let go');
      failing.heal();
      for (let run = 0; run < 3; run++) t.ok(step.run(read) === want);
      t.equal(failing.made('cuStreamBeginCapture'), recordings, 'and made again where it had paid');
      step.release();
    });
    t.same([device.memory.storages, device.memory.live], [0, 0]);
  }
  t.end();
});

test('misuse', (t) => {
  const { device } = open();
  scope(() => {
    const x = tensor(values(64, 1), [64], { device });
    const released = device.step(() => silu(x));
    released.run(read);
    released.release();
    t.throws(() => released.run(read), { message: /a step was run after its release/ });

    /** Runs `fn` up to the recording, where the error comes, and then goes on. */
    const recording = (fn: () => Tensor) => {
      const step = device.step(fn);
      step.run(read);
      return () => step.run(read);
    };
    const inner = device.step(() => silu(x));
    for (let run = 0; run < 4; run++) inner.run(read);
    for (const [what, fn] of [
      [
        /bytes were uploaded in a step that is being captured/,
        () => silu(tensor(values(64, 2), [64], { device })),
      ],
      [/a tensor was read in a step/, () => silu(tensor(x.floats(), [64], { device }))],
      [/a step was replayed in a step/, () => inner.run((y) => silu(y))],
      [/another capture was begun in a step/, () => nested(device, x)],
    ] as const)
      t.throws(recording(fn), { message: what });
    const wider = tensor(values(4096, 3), [4096], { device });
    let calls = 0;
    t.throws(
      recording(() => silu(++calls < 3 ? x : wider)),
      { message: /a captured step takes 16384 bytes that its run before did not take/ },
    );
    inner.release();
    t.ok(read(silu(x)).length, 'the stream is usable after a capture that failed');
  });
  t.same([device.memory.storages, device.memory.live], [0, 0]);
  t.end();
});

function nested(device: Device, x: Tensor): Tensor {
  const step = device.step(() => silu(x));
  step.run(() => undefined);
  try {
    return step.run((y) => silu(y));
  } finally {
    step.release();
  }
}
