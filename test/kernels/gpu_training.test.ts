// What training does on a GPU, a virtual one here: an update's passes are recorded and replayed, weights move amid the pass, memory
// runs out, the GPU is lost. And what has a judge elsewhere: Prodigy over 60 steps, a pass of consistency distillation
// and one of distillation into a smaller network.
import { test } from 'tap';
import { cudaDevice, type Device, openDevice } from '../../engine/device.ts';
import { gradOf, noGrad, requireGrad } from '../../engine/grad.ts';
import { module, namedParameters, parameter } from '../../engine/module.ts';
import type { Tensors } from '../../engine/op.ts';
import { mul } from '../../engine/ops/binary.ts';
import { linear } from '../../engine/ops/linear.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { type Tensor, tensor, zeros } from '../../engine/tensor.ts';
import { presets } from '../../models/formats/presets.ts';
import { distillation } from '../../train/methods/distillation.ts';
import { consistencyLoss } from '../../train/methods/lcm.ts';
import type { LossContext } from '../../train/methods/method.ts';
import { objectiveOf } from '../../train/objective/objective.ts';
import { openPasses } from '../../train/passes/pass.ts';
import { lent } from '../../train/passes/task.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import { numbers } from '../support/controlnet_golden.ts';
import { allClose } from '../support/golden.ts';
import { asProdigyopt } from '../support/prodigy_golden.ts';
import { open, pass, trained } from '../support/small_session.ts';
import { failingGpu } from '../virtual-gpu/failing.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';

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

test("prodigyopt's d and weights over 60 steps", { timeout: 120_000 }, (t) => {
  asProdigyopt(t, cudaDevice(openVirtualGpu()));
  t.end();
});

type LossOf = (context: LossContext, inputs: Tensors) => Tensor;

/** Losses and gradients of three passes through networks that are a product. */
function passesOn(device: Device, lossOf: LossOf): number[] {
  const product = (name: string) => {
    const weight = parameter([4, 4]);
    weight.tensor = unscoped(() => tensor(numbers(name, [4, 4]), [4, 4], { device }));
    const layer = module({ weight }, (m, x: Tensor) => linear(x, m.weight.tensor));
    const net = module({ mid_block: layer }, (m, x: Tensor) => m.mid_block(x));
    namedParameters(net); // gives the paths
    return { net, weight };
  };
  const [{ net: student, weight }, other] = [product('weight'), product('other')];
  requireGrad(weight.tensor);
  const average = tensor(numbers('average', [4, 4]), [4, 4], { device, dtype: 'bfloat16' });
  const asked: Omit<LossContext, 'conditioning' | 'unconditional'> = {
    student,
    // As a twin has an average of another type: cast in the pass, and let go.
    target(x) {
      const own = unscoped(() => lent(new Map([['weight', average]]))('weight', weight.tensor));
      const made = noGrad(() => linear(x, own));
      own.release();
      return made;
    },
    teacher: (x, _, { context }) => noGrad(() => other.net(mul(x, context))),
  };
  const said = (context: Tensor) => ({ context, textEmbeds: context, timeIds: context });
  const loss = (inputs: Tensors) =>
    lossOf(
      { ...asked, conditioning: said(inputs.context), unconditional: said(inputs.unconditional) },
      inputs,
    );
  const passes = openPasses({ loss }, new Map([['weight', weight]]), device);
  const got = [1, 2, 3].flatMap((k) => {
    const input = (name: string, ...shape: number[]) => {
      return { shape, values: numbers(`${name} ${k}`, shape), dtype: 'float32' as const };
    };
    const pictures = Object.fromEntries(
      ['sample', 'target', 'context', 'unconditional'].map((name) => [name, [2, 3, 5, 4]]),
    );
    const rows = { factors: [2, 7], weights: [2], timesteps: [2], ends: [2] };
    const inputs = Object.entries({ ...pictures, ...rows }).map(([name, shape]) => [
      name,
      input(name, ...shape),
    ]);
    const made = passes.queue(Object.fromEntries(inputs), 1);
    const [value] = made.floats();
    made.release();
    average.set(numbers(`average ${k}`, [4, 4]));
    return [value, ...scope(() => gradOf(weight.tensor)?.floats() ?? [])];
  });
  passes.release();
  for (const each of [weight, other.weight]) each.unload();
  average.release();
  return got;
}

const run = resolveRun({}, 'test', 'test');
const kinds: Record<string, LossOf> = {
  consistency: (asked, inputs) =>
    consistencyLoss(asked, inputs, { loss_type: 'huber', huber_c: 0.01 }, 'float32'),
  distillation: distillation(run, objectiveOf(run.objective, presets.tiny.scheduler)).loss,
};

for (const [kind, lossOf] of Object.entries(kinds))
  test(`a pass of ${kind} is recorded on a GPU, and tells what it tells on a CPU`, (t) => {
    const failing = failingGpu(openVirtualGpu({ arenaBytes: 2 ** 26, races: false }));
    const gpu = cudaDevice(failing.api);
    const [recorded, eager] = [gpu, openDevice('reference')].map((device) => passesOn(device, lossOf));
    t.ok(failing.made('cuGraphLaunch') > 0, 'it was replayed');
    allClose(t, 'losses and gradients', recorded, eager, { atol: 1e-5, rtol: 1e-5 });
    t.equal(gpu.memory.storages, 0);
    t.end();
  });
