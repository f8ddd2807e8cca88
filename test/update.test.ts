// One update of training over a model of one weight: what is queued before anything is read, what is prepared meanwhile, and
// what becomes of numbers that are not finite.
import { test } from 'tap';
import { cudaDevice, openDevice } from '../engine/device.ts';
import { gradOf } from '../engine/grad.ts';
import { unscoped } from '../engine/scope.ts';
import { type Tensor, zeros } from '../engine/tensor.ts';
import type { Session } from '../train/session.ts';
import { makeUpdate, openFeed } from '../train/update.ts';
import { validationLoss } from '../train/validation.ts';
import { open, pass, trained, turn } from './small_session.ts';
import { failingGpu } from './virtual-gpu/failing.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';

const cpu = openDevice('auto');

test('the host prepares while the device works', async (t) => {
  const before = cpu.memory.storages;
  const {
    session,
    weights: [weight],
    events,
    release,
  } = open([cpu]);
  const feed = openFeed(session.task);
  const { driver } = cpu;
  const { download } = driver;
  driver.download = (...args) => {
    events.push('read');
    download(...args);
  };
  try {
    const next = { update: [pass(3)], epoch: 1 };
    const { loss, grad_norm } = await makeUpdate(session, feed, turn(pass(1, 1, 1), pass(2)), 0.1, next);
    const queued = ['prepare 1,1,1', 'queue', 'prepare 2', 'queue', 'prepare 3'];
    t.same(
      events.slice(0, 6),
      [...queued, 'read'],
      'all is queued, and the next pass prepared, before a loss is read',
    );
    t.equal(loss, (3 * 1 + 4) / 4, 'losses weigh as their samples');
    t.equal(grad_norm, (2 * (3 * 1 + 4)) / 4, 'and so do gradients');
    events.length = 0;
    await makeUpdate(session, feed, next, 0.1);
    t.equal(events[0], 'queue', 'what was prepared is not prepared again');
  } finally {
    driver.download = download;
  }
  t.notOk(gradOf(weight.tensor), 'no gradient is left');
  release();
  t.equal(cpu.memory.storages, before, 'live tensors');
});

test('between passes others have their turn, when the next pass is prepared already', async (t) => {
  const { session, events, release } = open([cpu]);
  let others = setImmediate(function again() {
    events.push('others');
    others = setImmediate(again);
  });
  await makeUpdate(session, openFeed(session.task), turn(pass(1), pass(2), pass(3)), 0.1);
  clearImmediate(others);
  const told = events.filter((event, i) => event !== 'others' || events[i - 1] !== 'others');
  const between = ['queue', 'prepare 2', 'others', 'queue', 'prepare 3', 'others', 'queue'];
  t.same(told.slice(told.indexOf('queue'), told.lastIndexOf('queue') + 1), between);
  release();
});

test('the validation loss is the mean over its samples, in batches of a size', async (t) => {
  const { session, events, release } = open([cpu]);
  const run = { ...session.run, batch_size: 2, validation: { samples: 9, every_steps: 0 } };
  const samples = [0, 1, 2, 3, 4, 5].map((i) => ({ prior: i === 2 }));
  const pictures = { samples, bucketOf: [0, 0, 0, 1, 0, 1] };
  const loss = await validationLoss({ ...session, run, pictures } as unknown as Session);
  // The weight is 0, so that the loss of sample i is i squared.
  t.ok(Math.abs(loss - (0 + 1 + 9 + 16 + 25) / 5) < 1e-5, `${loss}`);
  t.same(
    events.filter((event) => event !== 'queue'),
    ['prepare 0,1', 'prepare 4', 'prepare 3,5'],
    'none for prior preservation',
  );
  release();
});

test('a pass whose loss is not finite leaves the weights', async (t) => {
  const before = cpu.memory.storages;
  const {
    session,
    weights: [weight],
    release,
  } = open([cpu]);
  const made = await makeUpdate(session, openFeed(session.task), turn(pass(1), pass(Number.NaN)), 0.1);
  t.match(made.skipped, /the loss is NaN; the first tensor that is not finite is the input x of linear/);
  t.ok(weight.tensor.floats().every((w) => w === 0));
  const huge = await makeUpdate(session, openFeed(session.task), turn(pass(1e15)), 0.1);
  t.match(huge.skipped, /the gradient of net.weight is not finite/, 'its square is beyond float32');
  t.ok(weight.tensor.floats().every((w) => w === 0));
  weight.tensor.set(Array<number>(64).fill(Number.POSITIVE_INFINITY));
  const worn = await makeUpdate(session, openFeed(session.task), turn(pass(1)), 0.1);
  t.match(worn.skipped, /the first tensor that is not finite is the weight net\.weight$/);
  release();
  t.equal(cpu.memory.storages, before, 'live tensors');
});

test('what is prepared ahead is left at the end', (t) => {
  const { session, release } = open([cpu]);
  let asked: AbortSignal | undefined;
  const { prepare } = session.task;
  session.task.prepare = (batch, epoch, signal) => {
    asked = signal;
    return prepare(batch, epoch, signal);
  };
  const feed = openFeed(session.task);
  feed.begin(pass(1), 0);
  t.notOk(asked?.aborted);
  feed.end();
  t.ok(asked?.aborted);
  release();
  t.end();
});

test('what cannot be prepared ahead is told when its turn comes', async (t) => {
  const { session, release } = open([cpu]);
  const feed = openFeed(session.task);
  const next = turn(pass(-1));
  await makeUpdate(session, feed, turn(pass(1)), 0.1, next);
  await t.rejects(makeUpdate(session, feed, next, 0.1), /no such picture/);
  release();
});

/** Passes of two shapes, two or three to an update; the fourth update has a loss that is not finite. */
const updates = Array.from({ length: 12 }, (_, k) => [
  pass(k, 1),
  pass(2),
  ...(k % 2 ? [pass(k === 3 ? Number.NaN : k)] : []),
]);

test('recorded passes make the weights that passes make', async (t) => {
  const gpu = failingGpu(openVirtualGpu({ arenaBytes: 2 ** 24, memoryBytes: 2 ** 22 }));
  const device = cudaDevice(gpu.api);
  const names = ['weight', 'unread'];
  const eager = open([device], { names });
  const want = await trained(eager, updates);
  t.equal(new Set(want).size, 11, 'each update but one changes them');
  const unread = Math.fround(0.01);
  t.ok(
    eager.weights[1].tensor.floats().every((w) => w === unread),
    'one that no gradient reaches does not decay',
  );
  t.equal(gpu.made('cuGraphLaunch'), 0);
  eager.release();
  const recorded = open([device], { names, records: true });
  t.same(await trained(recorded, updates), want);
  t.equal(gpu.made('cuStreamBeginCapture'), 2, 'one recording for a shape');
  t.equal(gpu.made('cuGraphLaunch'), 12 + 18 - 2 * 2, 'which runs from the third pass on');
  recorded.release();
  t.same([device.memory.storages, device.memory.live], [0, 0]);
  device.memory.trim();
  t.equal(device.memory.held, 0, 'what was set aside for recordings is given back');
});

test('on a GPU too, weights that move amid the pass are those that move after it', async (t) => {
  const gpu = failingGpu(openVirtualGpu({ arenaBytes: 2 ** 24, memoryBytes: 2 ** 22 }));
  const device = cudaDevice(gpu.api);
  const single = [0, 1, 2, Number.NaN, 4, 5].map((k) => [pass(k, 1)]);
  const names = ['weight', 'second', 'unread'];
  for (const max_grad_norm of [0, 0.5]) {
    const [kept, fused] = [false, true].map((fused_backward_pass) => {
      const opened = open([device], { names, records: fused_backward_pass });
      Object.assign(opened.session.run.train, { fused_backward_pass });
      Object.assign(opened.session.run.optimizer, { max_grad_norm });
      return opened;
    });
    const want = await trained(kept, single);
    t.equal(new Set(want).size, 5, 'each update but one changes them');
    t.same(await trained(fused, single), want, `clipped to ${max_grad_norm}`);
    for (const { release } of [kept, fused]) release();
    t.same([device.memory.storages, device.memory.live], [0, 0]);
  }
});

test('where memory is needed, recordings give theirs, and are made again if they had paid', async (t) => {
  const gpu = failingGpu(openVirtualGpu({ arenaBytes: 2 ** 24, memoryBytes: 2 ** 22 }));
  const device = cudaDevice(gpu.api);
  const eager = open([device]);
  const want = await trained(eager, updates);
  eager.release();
  const recorded = open([device], { records: true });
  const got = await trained(recorded, updates, (k) => {
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

test('what cannot be placed for a recording leaves nothing', async (t) => {
  for (const call of ['cuMemAllocAsync', 'cuMemcpyHtoDAsync'] as const) {
    const gpu = failingGpu(openVirtualGpu({ arenaBytes: 2 ** 24, memoryBytes: 2 ** 22 }));
    const device = cudaDevice(gpu.api);
    for (let at = 1; ; at++) {
      const recorded = open([device], { records: true });
      gpu.fail(call, 'CUDA_ERROR_OUT_OF_MEMORY', { at, always: true });
      await trained(recorded, updates.slice(0, 1)).catch(() => undefined);
      const { failed } = gpu;
      gpu.heal();
      recorded.release();
      t.same([device.memory.storages, device.memory.live], [0, 0], `${call} ${at}`);
      device.memory.trim();
      if (failed) continue;
      t.ok(at > 5, `${at - 1} of them were refused in turn`);
      break;
    }
  }
});

test('a GPU that is lost is told once, and what is held is given back', async (t) => {
  const gpu = failingGpu(openVirtualGpu({ arenaBytes: 2 ** 24, memoryBytes: 2 ** 22 }));
  const device = cudaDevice(gpu.api);
  const recorded = open([device], { records: true });
  gpu.fail('cuGraphLaunch', 'CUDA_ERROR_ECC_UNCORRECTABLE', { at: 2 });
  await t.rejects(trained(recorded, updates), { message: /^cuGraphLaunch failed with CUDA_ERROR_ECC_UNC/ });
  t.doesNotThrow(recorded.release);
  t.same([device.memory.storages, device.memory.live], [0, 0]);
});
