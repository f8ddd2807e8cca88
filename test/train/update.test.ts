// One update of training over a model of one weight: what is queued before anything is read, what is prepared meanwhile, and
// what becomes of numbers that are not finite. Recorded passes are gpu_training.test.ts's matter.
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { gradOf } from '../../engine/grad.ts';
import type { Session } from '../../train/session.ts';
import { makeUpdate, openFeed } from '../../train/update.ts';
import { validationLoss } from '../../train/validation.ts';
import { open, pass, turn } from '../support/small_session.ts';

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
    const { loss, grad_norm } = await makeUpdate(session, feed, turn(pass(1, 1, 1), pass(2)), {
      lr: 0.1,
      next,
    });
    const queued = ['prepare 1,1,1', 'queue', 'prepare 2', 'queue', 'prepare 3'];
    t.same(
      events.slice(0, 6),
      [...queued, 'read'],
      'all is queued, and the next pass prepared, before a loss is read',
    );
    t.equal(loss, (3 * 1 + 4) / 4, 'losses weigh as their samples');
    t.equal(grad_norm, (2 * (3 * 1 + 4)) / 4, 'and so do gradients');
    events.length = 0;
    await makeUpdate(session, feed, next, { lr: 0.1 });
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
  await makeUpdate(session, openFeed(session.task), turn(pass(1), pass(2), pass(3)), { lr: 0.1 });
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
  t.ok(Math.abs(loss - (0 + 1 + 9 + 16 + 25) / 5) < 1e-6, `${loss}`);
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
  const made = await makeUpdate(session, openFeed(session.task), turn(pass(1), pass(Number.NaN)), {
    lr: 0.1,
  });
  t.match(made.skipped, /the loss is NaN; the first tensor that is not finite is the input x of linear/);
  t.ok(weight.tensor.floats().every((w) => w === 0));
  const huge = await makeUpdate(session, openFeed(session.task), turn(pass(1e15)), { lr: 0.1 });
  t.match(huge.skipped, /the gradient of net.weight is not finite/, 'its square is beyond float32');
  t.ok(weight.tensor.floats().every((w) => w === 0));
  weight.tensor.set(Array<number>(64).fill(Number.POSITIVE_INFINITY));
  const worn = await makeUpdate(session, openFeed(session.task), turn(pass(1)), { lr: 0.1 });
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
  await makeUpdate(session, feed, turn(pass(1)), { lr: 0.1, next });
  await t.rejects(makeUpdate(session, feed, next, { lr: 0.1 }), /no such picture/);
  release();
});
