// One update of training over a model of one weight: what is queued before anything is read, what is prepared meanwhile, and
// what becomes of numbers that are not finite.
import { test } from 'tap';
import { cudaDevice, type Device, openDevice } from '../engine/device.ts';
import { gradOf, requireGrad } from '../engine/grad.ts';
import { module, namedParameters, parameter, unload } from '../engine/module.ts';
import type { Tensors } from '../engine/op.ts';
import { linear } from '../engine/ops/linear.ts';
import { mse } from '../engine/ops/loss.ts';
import { unscoped } from '../engine/scope.ts';
import { type Tensor, zeros } from '../engine/tensor.ts';
import type { MicroBatch } from '../train/data/order.ts';
import { createOptimizer } from '../train/optimizers/create.ts';
import { openPasses } from '../train/pass.ts';
import { resolveRun } from '../train/run.ts';
import type { Session } from '../train/session.ts';
import type { Task } from '../train/task.ts';
import { makeUpdate, openFeed } from '../train/update.ts';
import { failingGpu } from './virtual-gpu/failing.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';

const SIDE = 8;

const cpu = openDevice('auto');
const run = resolveRun({ optimizer: { lr: 0.1, max_grad_norm: 0 } }, 'test', 'test');
const pass = (...samples: number[]): MicroBatch => ({ bucket: 0, samples });

/** A session whose loss is the mean square of x w - x, w a matrix; sample i has i in all places of x, and `events` what is done. */
function open({ device = cpu, repeats = false }: { device?: Device; repeats?: boolean } = {}) {
  const events: string[] = [];
  const net = module({ weight: parameter([SIDE, SIDE]) }, () => undefined);
  const { weight } = net.children;
  weight.tensor = requireGrad(unscoped(() => zeros([SIDE, SIDE], { device })));
  const parameters = namedParameters(net);
  const task = {
    async prepare({ samples }: MicroBatch) {
      events.push(`prepare ${samples}`);
      if (samples[0] < 0) throw new Error('no such picture');
      const values = Float32Array.from(
        { length: samples.length * SIDE },
        (_, i) => samples[Math.floor(i / SIDE)],
      );
      return { x: { shape: [samples.length, SIDE], values, dtype: 'float32' } };
    },
    loss({ x }: Tensors) {
      events.push('queue');
      return mse(linear(x, weight.tensor), x);
    },
    repeats,
    components: [{ name: 'net', parameters, trained: [...parameters.keys()] }],
  } as unknown as Task;
  const optimizer = createOptimizer(parameters, run.optimizer, 0);
  const passes = openPasses(task, parameters, device);
  const session = { run, task, device, parameters, passes, optimizer } as unknown as Session;
  const release = () => {
    passes.release();
    optimizer.release();
    unload(net);
  };
  return { session, weight, events, release };
}

test('the host prepares while the device works', async (t) => {
  const before = cpu.memory.storages;
  const { session, weight, events, release } = open();
  const feed = openFeed(session.task);
  const { driver } = cpu;
  const { download } = driver;
  driver.download = (...args) => {
    events.push('read');
    download(...args);
  };
  try {
    const next = [pass(3)];
    const { loss, grad_norm } = await makeUpdate(session, feed, [pass(1, 1, 1), pass(2)], 0, 0.1, next);
    const queued = ['prepare 1,1,1', 'queue', 'prepare 2', 'queue', 'prepare 3'];
    t.same(
      events.slice(0, 6),
      [...queued, 'read'],
      'all is queued, and the next pass prepared, before a loss is read',
    );
    t.equal(loss, (3 * 1 + 4) / 4, 'losses weigh as their samples');
    t.equal(grad_norm, (2 * (3 * 1 + 4)) / 4, 'and so do gradients');
    events.length = 0;
    await makeUpdate(session, feed, next, 0, 0.1);
    t.equal(events[0], 'queue', 'what was prepared is not prepared again');
  } finally {
    driver.download = download;
  }
  t.notOk(gradOf(weight.tensor), 'no gradient is left');
  release();
  t.equal(cpu.memory.storages, before, 'live tensors');
});

test('a pass whose loss is not finite leaves the weights', async (t) => {
  const before = cpu.memory.storages;
  const { session, weight, release } = open();
  const made = await makeUpdate(session, openFeed(session.task), [pass(1), pass(Number.NaN)], 0, 0.1);
  t.match(made.skipped, /the loss is NaN; the first tensor that is not finite is the input x of linear/);
  t.ok(weight.tensor.floats().every((w) => w === 0));
  const huge = await makeUpdate(session, openFeed(session.task), [pass(1e15)], 0, 0.1);
  t.match(huge.skipped, /the gradient of weight is not finite/, 'its square is beyond float32');
  t.ok(weight.tensor.floats().every((w) => w === 0));
  release();
  t.equal(cpu.memory.storages, before, 'live tensors');
});

test('what cannot be prepared ahead is told when its turn comes', async (t) => {
  const { session, release } = open();
  const feed = openFeed(session.task);
  const next = [pass(-1)];
  await makeUpdate(session, feed, [pass(1)], 0, 0.1, next);
  await t.rejects(makeUpdate(session, feed, next, 0, 0.1), /no such picture/);
  release();
});

/** Passes of two shapes, two or three to an update; the fourth update has a loss that is not finite. */
const updates = Array.from({ length: 12 }, (_, k) => [
  pass(k, 1),
  pass(2),
  ...(k % 2 ? [pass(k === 3 ? Number.NaN : k)] : []),
]);

/** The weights after each update. */
async function trained(
  { session, weight }: ReturnType<typeof open>,
  between?: (k: number) => void,
): Promise<string[]> {
  const feed = openFeed(session.task);
  const after: string[] = [];
  for (const [k, update] of updates.entries()) {
    await makeUpdate(session, feed, update, 0, 0.1, updates[k + 1]);
    after.push(Buffer.from(weight.tensor.bytes()).toString('hex'));
    between?.(k);
  }
  return after;
}

test('recorded passes make the weights that passes make', async (t) => {
  const gpu = failingGpu(openVirtualGpu({ arenaBytes: 2 ** 24, memoryBytes: 2 ** 22 }));
  const device = cudaDevice(gpu.api);
  const [eager, recorded] = [open({ device }), open({ device, repeats: true })];
  const want = await trained(eager);
  t.equal(new Set(want).size, 11, 'each update but one changes them');
  t.equal(gpu.made('cuGraphLaunch'), 0);
  eager.release();
  t.same(await trained(recorded), want);
  t.equal(gpu.made('cuStreamBeginCapture'), 2, 'one recording for a shape');
  t.equal(gpu.made('cuGraphLaunch'), 12 + 18 - 2 * 2, 'which runs from the third pass on');
  recorded.release();
  t.same([device.memory.storages, device.memory.live], [0, 0]);
});

test('where memory is needed, recordings give theirs, and are made again if they had paid', async (t) => {
  const gpu = failingGpu(openVirtualGpu({ arenaBytes: 2 ** 24, memoryBytes: 2 ** 22 }));
  const device = cudaDevice(gpu.api);
  const eager = open({ device });
  const want = await trained(eager);
  eager.release();
  const recorded = open({ device, repeats: true });
  const got = await trained(recorded, (k) => {
    if (k !== 8) return;
    t.equal(gpu.made('cuGraphExecDestroy'), 0);
    const others: Tensor[] = [];
    t.throws(() => {
      for (;;) others.push(unscoped(() => zeros([2 ** 13], { device })));
    }, /out of memory/);
    for (const other of others) other.release();
  });
  t.same(got, want);
  t.equal(gpu.made('cuGraphExecDestroy'), 2, 'both are dropped');
  t.equal(gpu.made('cuStreamBeginCapture'), 3, 'one had been replayed 11 times, the other 7');
  recorded.release();
  t.same([device.memory.storages, device.memory.live], [0, 0]);
});

test('a GPU that is lost is told once, and what is held is given back', async (t) => {
  const gpu = failingGpu(openVirtualGpu({ arenaBytes: 2 ** 24, memoryBytes: 2 ** 22 }));
  const device = cudaDevice(gpu.api);
  const recorded = open({ device, repeats: true });
  gpu.fail('cuGraphLaunch', 'CUDA_ERROR_ECC_UNCORRECTABLE', { at: 2 });
  await t.rejects(trained(recorded), { message: /^cuGraphLaunch failed with CUDA_ERROR_ECC_UNC/ });
  t.doesNotThrow(recorded.release);
  t.same([device.memory.storages, device.memory.live], [0, 0]);
});
