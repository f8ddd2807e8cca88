// Prodigy against what prodigyopt does in float64 (golden/prodigy.py), its state in each storage type, and in whole runs: the log,
// resuming bit for bit. On a GPU: gpu_training.test.ts.
import { join } from 'node:path';
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { requireGrad } from '../../engine/grad.ts';
import { Parameter } from '../../engine/module.ts';
import { update } from '../../engine/op.ts';
import { prodigyStep } from '../../engine/ops/prodigy.ts';
import { standInCuda } from '../../engine/profile.ts';
import { keep, scope } from '../../engine/scope.ts';
import { empty, tensor } from '../../engine/tensor.ts';
import { readLog } from '../../train/log/log.ts';
import { createOptimizer } from '../../train/optimizers/create.ts';
import { allClose } from '../support/golden.ts';
import { giveGradient } from '../support/gradients.ts';
import { asProdigyopt, parametersOn, trained, usual } from '../support/prodigy_golden.ts';
import { basic, folder, resumes, run } from '../support/small_runs.ts';

const cpu = openDevice('auto');

for (const device of [cpu, openDevice('reference')])
  test(`prodigyopt's d and weights over 60 steps, ${device.name}`, (t) => {
    asProdigyopt(t, device);
    t.end();
  });

test('gradients that are clipped count as the smaller ones that they become', (t) => {
  t.same(trained(cpu, { times: 8, steps: 20 }), trained(cpu, { steps: 20 }));
  t.end();
});

test('bfloat16 weights: masters go the way of float32, without them weights are rounded at random', (t) => {
  const want = trained(cpu, { steps: 30 });
  const mastered = trained(cpu, { steps: 30, dtype: 'bfloat16' });
  const kept = ['exp_avg.p0 float32 12', 'exp_avg_sq.p0 float32 12', 's.p0 float32 12'];
  t.same(want.state.slice(0, 6), ['step int32 1', 'd float32 4', ...kept, 'p0.p0 float32 12']);
  t.same(mastered.state.slice(0, 7), [
    ...['step int32 1', 'd float32 4', 'master.p0 float32 12', ...kept],
    'p0.p0 bfloat16 12', // which the master begins with
  ]);
  const last = ({ d }: { d: number[] }) => d[d.length - 1];
  t.ok(Math.abs(last(mastered) / last(want) - 1) < 1e-3, `d ${last(mastered)}, in float32 ${last(want)}`);
  allClose(t, 'weights', mastered.weights, want.weights, { atol: 0.02, rtol: 0 });
  const rounded = trained(cpu, { steps: 30, dtype: 'bfloat16', options: { stochastic_rounding: true } });
  t.notOk(rounded.state.some((name) => name.startsWith('master.')));
  t.ok(Math.abs(last(rounded) / last(want) - 1) < 0.2, `d ${last(rounded)}, in float32 ${last(want)}`);
  t.end();
});

test('an update whose gradients are all zero finds nothing', (t) => {
  for (const on of [cpu, openDevice('reference')]) {
    const { d, weights } = trained(on, { times: 0, steps: 2, options: { weight_decay: 0.1, d0: 1e-3 } });
    t.same(d, [1e-3, 1e-3].map(Math.fround));
    const begin = [...parametersOn(on, 'float32').values()].flatMap((p) => [...p.tensor.floats()]);
    t.same(weights, begin, `nor does weight decay move anything, ${on.name}`);
  }
  t.end();
});

test('a decay of 1e-7 is that on average, and no multiple of what is next to 1', (t) => {
  scope(() => {
    const begin = Float32Array.from({ length: 4096 }, (_, i) => 1 + i / 4096);
    const of = (values: ArrayLike<number>) => tensor(values, [values.length], { device: cpu });
    const [weight, none] = [of(begin), new Float32Array(4096)];
    const tensors = { weight, exp_avg: of(none), exp_avg_sq: of(none), d: of([1, 1, 0, 1]) };
    update([prodigyStep(tensors, { dlr: 1e-4, weightDecay: 1e-3, eps: 1e-8 })]);
    const mean = weight.floats().reduce((sum, w, i) => sum + (begin[i] - w) / begin[i] / 4096, 0);
    t.ok(Math.abs(mean - 1e-7) < 1e-8, `${mean}`);
  });
  t.end();
});

test('a plan counts what it keeps, and a step on it', (t) => {
  const device = standInCuda();
  const p = new Parameter([1024, 1024]);
  const half = () => keep(empty(p.shape, { device, dtype: 'bfloat16' }));
  p.tensor = requireGrad(half());
  giveGradient(p.tensor, half());
  const takes = (name: 'adamw' | 'prodigy') => {
    const before = device.memory.live;
    const optimizer = createOptimizer(new Map([['p', p]]), { ...usual.optimizer, name }, 1);
    const kept = device.memory.live - before;
    device.memory.peak = 0;
    optimizer.step(1);
    const most = device.memory.peak - before;
    optimizer.release();
    return { kept, most };
  };
  const [adamw, prodigy] = [takes('adamw'), takes('prodigy')];
  const more = prodigy.kept - adamw.kept;
  t.ok(more >= 6 * p.size && more < 6.01 * p.size, `s in float32 and p0 in bfloat16 more: ${more}`);
  const sums = prodigy.most - prodigy.kept;
  t.ok(sums > 0 && sums < 2 ** 14, `sums of 128 chunks: ${sums}`);
  t.end();
});

test('a run tells d times lr, and goes on bit for bit', async (t) => {
  const optimizer = {
    name: 'prodigy',
    lr: 1,
    d0: 1e-4,
    use_bias_correction: true,
    safeguard_warmup: true,
  } as const;
  const of = (output: string) => readLog(join(folder, output, 'log.jsonl'));
  await resumes(t, 'prodigy', { optimizer, train: { target: 'lora' }, dtype: 'bfloat16' });
  const told = of('prodigy-whole').map((entry) => entry['d*lr'] as number);
  t.equal(told.length, 3);
  t.equal(told[0], 0, 'the first update has the rate 0 of a warm-up');
  t.equal(told[1], Math.fround(1e-4), 'then d0');
  t.ok(told[2] >= 0.4 * told[1] && told[2] < 10 * told[1], `${told[2]}`);
  t.same(
    of('prodigy-resumed').map((entry) => entry['d*lr']),
    told.slice(1),
  );
  await run({ ...basic('adamw'), steps: 1 });
  t.notOk('d*lr' in of('adamw')[0], 'others find none');
});
