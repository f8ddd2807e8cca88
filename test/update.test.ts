// One update of training over a model of one weight: what is queued before anything is read, what is prepared meanwhile, and
// what becomes of numbers that are not finite.
import { test } from 'tap';
import { openDevice } from '../engine/device.ts';
import { gradOf, requireGrad } from '../engine/grad.ts';
import { module, namedParameters, parameter, unload } from '../engine/module.ts';
import { mse } from '../engine/ops/loss.ts';
import { unscoped } from '../engine/scope.ts';
import { tensor, zeros } from '../engine/tensor.ts';
import type { MicroBatch } from '../train/data/order.ts';
import { createOptimizer } from '../train/optimizers/create.ts';
import { resolveRun } from '../train/run.ts';
import type { Session } from '../train/session.ts';
import type { Task } from '../train/task.ts';
import { makeUpdate, openFeed } from '../train/update.ts';

const device = openDevice('auto');
const run = resolveRun({ optimizer: { max_grad_norm: 0 } }, 'test', 'test');
const pass = (...samples: number[]): MicroBatch => ({ bucket: 0, samples });

/** A session whose loss is the mean square of weight - x; sample i has x = i, and `events` what is done in order. */
function open(events: string[] = []) {
  const net = module({ weight: parameter([2]) }, () => undefined);
  const { weight } = net.children;
  weight.tensor = requireGrad(unscoped(() => zeros([2], { device })));
  const parameters = namedParameters(net);
  const task = {
    async prepare({ samples }: MicroBatch) {
      events.push(`prepare ${samples}`);
      if (samples[0] < 0) throw new Error('no such picture');
      return samples[0];
    },
    loss(x: number) {
      events.push(`queue ${x}`);
      return mse(weight.tensor, tensor([x, x], [2], { device }));
    },
    components: [{ name: 'net', parameters, trained: [...parameters.keys()] }],
  } as unknown as Task;
  const optimizer = createOptimizer(parameters, run.optimizer, 0);
  const session = { run, task, device, parameters, optimizer, ema: undefined } as unknown as Session;
  const release = () => {
    optimizer.release();
    unload(net);
  };
  return { session, weight, release };
}

test('the host prepares while the device works', async (t) => {
  const before = device.memory.storages;
  const events: string[] = [];
  const { session, weight, release } = open(events);
  const feed = openFeed(session.task);
  const { driver } = device;
  const { download } = driver;
  driver.download = (...args) => {
    events.push('read');
    download(...args);
  };
  try {
    const next = [pass(3)];
    const { loss, grad_norm } = await makeUpdate(session, feed, [pass(1, 1, 1), pass(2)], 0, 0.1, next);
    const queued = ['prepare 1,1,1', 'queue 1', 'prepare 2', 'queue 2', 'prepare 3'];
    t.same(
      events.slice(0, 6),
      [...queued, 'read'],
      'all is queued, and the next pass prepared, before a loss is read',
    );
    t.equal(loss, (3 * 1 + 4) / 4, 'losses weigh as their samples');
    t.equal(grad_norm, Math.hypot(1.25, 1.25), 'and so do gradients');
    events.length = 0;
    await makeUpdate(session, feed, next, 0, 0.1);
    t.equal(events[0], 'queue 3', 'what was prepared is not prepared again');
  } finally {
    driver.download = download;
  }
  t.notOk(gradOf(weight.tensor), 'no gradient is left');
  release();
  t.equal(device.memory.storages, before, 'live tensors');
});

test('a pass whose loss is not finite leaves the weights', async (t) => {
  const before = device.memory.storages;
  const { session, weight, release } = open();
  const made = await makeUpdate(session, openFeed(session.task), [pass(1), pass(Number.NaN)], 0, 0.1);
  t.match(made.skipped, /the loss is NaN; the first tensor that is not finite is the input target of mse/);
  t.same([...weight.tensor.floats()], [0, 0]);
  const huge = await makeUpdate(session, openFeed(session.task), [pass(1.8e19)], 0, 0.1);
  t.match(huge.skipped, /the gradient of weight is not finite/, 'its square is beyond float32');
  t.same([...weight.tensor.floats()], [0, 0]);
  release();
  t.equal(device.memory.storages, before, 'live tensors');
});

test('what cannot be prepared ahead is told when its turn comes', async (t) => {
  const { session, release } = open();
  const feed = openFeed(session.task);
  const next = [pass(-1)];
  await makeUpdate(session, feed, [pass(1)], 0, 0.1, next);
  await t.rejects(makeUpdate(session, feed, next, 0, 0.1), /no such picture/);
  release();
});
