// Several GPUs at an update's passes: on as many virtual ones as it has passes the weights are those of one GPU, bit for bit.
// And what is told when one fails.
import { test } from 'tap';
import type { GpuApi } from '../../engine/cuda/api.ts';
import type { CudaResult } from '../../engine/cuda/errors.ts';
import type { Device } from '../../engine/device.ts';
import { makeUpdate, openFeed } from '../../train/update.ts';
import { open, pass, trained, turn } from '../support/small_session.ts';
import { openGpus } from '../virtual-gpu/several.ts';

const held = (devices: readonly Device[]): number[] =>
  devices.flatMap(({ memory }) => [memory.storages, memory.live]);

/** Updates of `count` passes, of which the fourth has a last loss that is not finite; each third is a short one. */
const updates = (count: number, length = 7) =>
  Array.from({ length }, (_, k) =>
    Array.from({ length: k % 3 === 2 ? 1 : count }, (_, i) =>
      i === 0 ? pass(k, 1) : pass(k === 3 && i === count - 1 ? Number.NaN : 0.3 * k + i, i),
    ),
  );

/** Of three weights each of three GPUs owns one, and of two GPUs the first owns one. */
const names = ['weight', 'second', 'third'];
const three = openGpus(3, { peers: true });

test('as many GPUs as passes make the bits of one', { timeout: 120_000 }, async (t) => {
  for (const count of [2, 3])
    for (const records of [false, true]) {
      const what = `${count} GPUs, ${records ? 'recorded' : 'eager'}`;
      const [devices, failing] = [three.devices.slice(0, count), three.failing.slice(0, count)];
      const alone = open(devices.slice(0, 1), { records, names });
      const want = await trained(alone, updates(count));
      t.equal(new Set(want).size, 6, `${what}: each update but one changes the weights`);
      alone.release();
      const made = (call: keyof GpuApi) => failing.map((gpu) => gpu.made(call));
      const before = made('cuLaunchKernel');
      const together = open(devices, { records, names });
      const owners = [...together.session.parameters.values()].map(({ tensor }) => tensor.device);
      const state = [...together.session.optimizer.state.values()].map(({ device }) => device);
      t.same(new Set(owners), new Set(devices), `${what}: each owns some`);
      t.same(
        state,
        [owners[0], ...owners.flatMap((owner) => [owner, owner])],
        `${what}: the optimizer's state is there`,
      );
      t.same(await trained(together, updates(count)), want, what);
      const launches = made('cuLaunchKernel').map((calls, i) => calls - before[i]);
      t.ok(Math.min(...launches) > 10, `${what}: all work: ${launches}`);
      t.equal(Math.min(...made('cuGraphLaunch')) > 0, records);
      t.ok(Math.min(...made('cuMemcpyDtoDAsync')) > 0, `${what}: all fetch`);
      together.release();
      t.same(held(devices), Array(2 * count).fill(0), `${what}: nothing is held`);
    }
});

test('Prodigy finds on several GPUs, of which each has some of the weights, what it finds on one', async (t) => {
  // As many as d takes to grow.
  for (const count of [2, 3]) {
    const devices = three.devices.slice(0, count);
    const optimizer = 'prodigy' as const;
    const found = async (on: readonly Device[]) => {
      const session = open(on, { names, optimizer });
      const weights = await trained(session, updates(count, 12));
      const d = session.session.optimizer.state.get('d')?.floats();
      session.release();
      return { weights, d: [...(d ?? [])] };
    };
    const want = await found(devices.slice(0, 1));
    t.equal(new Set(want.weights).size, 11, 'each update but one changes the weights');
    t.ok(want.d[0] > 5e-6 && want.d[3] === 11, `d ${want.d}`);
    t.same(await found(devices), want, `${count} GPUs`);
    t.same(held(devices), Array(2 * count).fill(0), 'nothing is held');
  }
});

test('more passes than GPUs: only the order of sums is another', async (t) => {
  const devices = three.devices.slice(0, 2);
  const floats = async (on: readonly Device[]) => {
    const session = open(on, { names });
    const after = await trained(session, updates(5));
    session.release();
    return new Float32Array(Uint8Array.from(Buffer.from(after[6], 'hex')).buffer);
  };
  const [one, two] = [await floats(devices.slice(0, 1)), await floats(devices)];
  t.ok(Math.max(...one.map((w, i) => Math.abs(w - two[i]))) < 1e-6);
  t.same(held(devices), [0, 0, 0, 0]);
});

test('a loss or gradient on another GPU that is not finite leaves the weights', async (t) => {
  const devices = three.devices.slice(0, 2);
  const {
    session,
    weights: [weight],
    release,
  } = open(devices, { names: ['weight', 'second'] });
  const feed = openFeed(session.task);
  const made = await makeUpdate(session, feed, turn(pass(1), pass(Number.NaN)), { lr: 0.1 });
  t.match(made.skipped, /the loss is NaN; the first tensor that is not finite is the input x of linear/);
  const huge = await makeUpdate(session, feed, turn(pass(1), pass(1e15)), { lr: 0.1 });
  t.match(huge.skipped, /the gradient of net.weight is not finite/);
  t.ok(weight.tensor.floats().every((w) => w === 0));
  release();
  t.same(held(devices), [0, 0, 0, 0]);
});

type Place = readonly [gpu: number, call: keyof GpuApi, at: number];

/** Calls of the copies between GPUs, and of a pass. */
const places: readonly Place[] = [
  [1, 'cuMemcpyPeerAsync', 2],
  [0, 'cuMemcpyPeerAsync', 2],
  [1, 'cuStreamWaitEvent', 2],
  [0, 'cuEventRecord', 5],
  [0, 'cuEventRecord', 6],
  [1, 'cuLaunchKernel', 3],
  [1, 'cuGraphLaunch', 2],
  [1, 'cuMemcpyDtoHAsync', 2],
];

test('what fails is told with its GPU, and nothing is held', { timeout: 120_000 }, async (t) => {
  const fails = async (
    result: CudaResult,
    { failing, devices }: ReturnType<typeof openGpus>,
    place: Place,
  ) => {
    const [gpu, call, at] = place;
    const session = open(devices, { records: true, names });
    failing[gpu].fail(call, result, { at });
    const what = `${result} at ${call} on cuda:${gpu}`;
    const sentence = new RegExp(`^${call} failed with ${result} on cuda:${gpu}(: the last kernel|$)`);
    await t.rejects(trained(session, updates(2)), { name: 'CudaError', message: sentence }, what);
    t.doesNotThrow(session.release, what);
    t.same(held(devices), [0, 0, 0, 0], `${what}: nothing is held`);
  };
  const two = openGpus(2);
  for (const place of places) await fails('CUDA_ERROR_INVALID_VALUE', two, place);
  // A GPU that is lost is so for good.
  for (const place of places.slice(0, 3)) await fails('CUDA_ERROR_ECC_UNCORRECTABLE', openGpus(2), place);
});
