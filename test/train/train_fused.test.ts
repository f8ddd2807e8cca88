// Updates whose gradients are never all there: the bits of those that keep them, whatever is trained; what is not finite moves nothing
// that could be spared; and what cannot be done so is refused.
import { join } from 'node:path';
import { test } from 'tap';
import { backward, gradOf, handOver, requireGrad } from '../../engine/grad.ts';
import { parameter } from '../../engine/module.ts';
import { mul } from '../../engine/ops/binary.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { readLog } from '../../train/log/log.ts';
import { openMaterials } from '../../train/materials.ts';
import { measure, moveThrough } from '../../train/passes/fused.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import {
  basic,
  control,
  device,
  digest,
  locate,
  losses,
  run,
  sessionOf,
  silent,
} from '../support/small_runs.ts';

/** One pass to an update, two updates: the second finds moments and averages. */
const input = (output: string, more: RunInput): RunInput => ({
  ...basic(output),
  ...{ steps: 2, gradient_accumulation_steps: 1, lr_scheduler: {} },
  ...more,
});

const rounding = { lr: 1e-3, stochastic_rounding: true } as const;

/** Every kind of adapter, of a layer of each sort; factors and magnitudes beside it. */
const adapters = (
  [
    { use_dora: true },
    { algo: 'loha' },
    { algo: 'lokr', decompose_both: true },
    { algo: 'oft', rescaled: true },
  ] as const
).flatMap((lora) =>
  (['float32', 'bfloat16'] as const).map((dtype): [string, RunInput] => [
    `${Object.values(lora)} in ${dtype}`,
    { dtype, train: { target: 'lora' }, lora: { ...lora, rank: 4, targets: ['to_q', 'conv1'] } },
  ]),
);

test('an update has the bits of one that keeps its gradients', async (t) => {
  const before = device.memory.storages;
  const kinds: Record<string, RunInput> = {
    ...Object.fromEntries(adapters),
    plain: {},
    checkpointed: { train: { gradient_checkpointing: true } },
    unclipped: { optimizer: { lr: 1e-3, max_grad_norm: 0 } },
    clipped: { optimizer: { lr: 1e-3, max_grad_norm: 0.01 } },
    masters: { dtype: 'bfloat16', optimizer: { lr: 1e-3, name: 'lion' } },
    adafactor: { dtype: 'bfloat16', optimizer: { ...rounding, name: 'adafactor' } },
    adamw8bit: { dtype: 'bfloat16', optimizer: { ...rounding, name: 'adamw8bit' } },
    texts: { train: { text_encoders: true, gradient_checkpointing: true } },
    lora: { train: { target: 'lora' } },
    controlnet: control,
    vae: { train: { target: 'vae' } },
  };
  for (const [name, more] of Object.entries(kinds)) {
    const [kept, fused] = ['kept', 'fused'].map((how) => input(`${name}-${how}`, more));
    await run(kept);
    await run({ ...fused, train: { ...fused.train, fused_backward_pass: true } });
    const outputs = [kept, fused].map(({ output }) => output as string);
    const [a, b] = outputs.map((output) => digest(listCheckpoints(output).at(-1) as string));
    t.equal(b, a, `${name}: weights, averages, optimizer`);
    const [all, own] = outputs.map((output) => readLog(join(output, 'log.jsonl')));
    const told = (log: typeof all) => log.map(({ loss, grad_norm }) => ({ loss, grad_norm }));
    t.same(told(own), told(all), `${name}: losses and norms`);
  }
  t.equal(device.memory.storages, before, 'live tensors');
});

test('stopped and resumed, with or without gradients that are kept, a run goes on as if it had not been', async (t) => {
  const keeping = (fused_backward_pass: boolean) => ({ train: { fused_backward_pass } });
  const newest = ({ output }: RunInput) => digest(listCheckpoints(output as string).at(-1) as string);
  const whole = input('whole', keeping(true));
  await run(whole);
  for (const [first, then] of [
    [true, true],
    [false, true],
    [true, false],
  ]) {
    const name = `broken-${first}-${then}`;
    const { folder: checkpoint } = await run(input(name, keeping(first)), { until: 1 });
    const broken = input(name, keeping(then));
    await run(broken, { checkpoint });
    t.equal(newest(broken), newest(whole), name);
    t.same(losses(broken.output as string), losses(whole.output as string));
  }
});

test('the device never holds all gradients, nor any after an update', async (t) => {
  const peaks: number[] = [];
  for (const fused_backward_pass of [false, true]) {
    const own = resolveRun(input('peak', { ema: {}, train: { fused_backward_pass } }), 'test', 'test');
    const session = await sessionOf(await openMaterials(own, locate, silent));
    const { memory } = device;
    const live = memory.live;
    memory.peak = live;
    const inputs = session.task.blank({ bucket: 0, samples: [0, 1] });
    if (fused_backward_pass) {
      const parts: number[] = [];
      moveThrough(session, inputs, (part) => void parts.push(part.size));
      t.equal(
        parts.reduce((a, b) => a + b, 0),
        session.parameters.size,
        'each weight has its turn',
      );
      t.ok(parts.length > 16, `weights move in ${parts.length} parts`);
      t.equal(memory.live, live, 'nothing is left');
    } else session.passes.queue(inputs, 1).release();
    peaks.push(memory.live - live);
    session.release();
  }
  t.ok(peaks[0] > 1e6 && peaks[1] === 0, `${peaks} bytes after a pass`);
});

test('what is not finite leaves the weights where the norm is measured first', async (t) => {
  const fused = { train: { fused_backward_pass: true } };
  const own = resolveRun(input('bad', fused), 'test', 'test');
  const session = await sessionOf(await openMaterials(own, locate, silent));
  const bytes = () => [...session.parameters.values()].map(({ tensor: w }) => Buffer.from(w.bytes()));
  const inputs = session.task.blank({ bucket: 0, samples: [0, 1] });
  const values = inputs.target.values.map(() => Number.NaN);
  const nan = { ...inputs, target: { ...inputs.target, values } };
  const before = bytes();
  t.ok(Number.isNaN(measure(session, nan, 1).loss));
  const { move } = session.optimizer.begin(1);
  const { nonfinite } = moveThrough(session, nan, move, true);
  t.ok(nonfinite, `${nonfinite} is told`);
  t.ok(
    bytes().every((now, i) => now.equals(before[i])),
    'of all that is bad nothing moves, without the norm either',
  );
  session.release();
});

test('updates that are not finite are told as they are with all gradients', async (t) => {
  const told = async (name: string, fused_backward_pass: boolean) => {
    const failing = input(name, { optimizer: { lr: 1e30 }, train: { fused_backward_pass } });
    await run(failing);
    return readLog(join(failing.output as string, 'log.jsonl')).map(({ skipped }) => skipped);
  };
  const all = await told('failing', false);
  t.match(all.at(-1), /first tensor that is not finite is /);
  t.same(await told('failing-fused', true), all);
});

test('a weight that a pass uses twice has no gradient that is whole before its end', (t) => {
  const held = parameter([1]);
  held.tensor = requireGrad(tensor([3], [1], { device }));
  const weight = held.tensor;
  const times = (n: number) => (): ReturnType<typeof tensor> => {
    const x = tensor([2], [1], { device });
    return n === 1 ? mul(x, weight) : mul(mul(x, weight), weight);
  };
  const found: number[] = [];
  handOver(weight, (gradient) => void found.push(gradient.floats()[0]));
  scope(() => backward(times(2)()));
  t.same(found, [6, 6], 'each use hands over its own');
  t.equal(gradOf(weight), undefined, 'and nothing is collected');
  handOver(weight);
  scope(() => backward(times(1)()));
  t.equal(
    scope(() => gradOf(weight)?.floats()[0]),
    2,
    'collected again',
  );
  const parameters = new Map([['weight', held]]);
  const pass = (n: number) => moveThrough({ task: { loss: times(n) }, parameters, device }, {}, () => {});
  t.equal(pass(1).norm, 2);
  t.throws(() => pass(2), /weight is used twice in a pass/);
  t.equal(pass(1).norm, 2, 'what failed leaves nothing');
  held.unload();
  t.end();
});
