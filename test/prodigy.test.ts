// Prodigy against what prodigyopt does in float64 (golden/prodigy.py) on each kind of device, its state in each storage type, and in
// whole runs: the log, resuming bit for bit.
import { join } from 'node:path';
import { test } from 'tap';
import { cudaDevice, type Device, openDevice } from '../engine/device.ts';
import { clearGrad, requireGrad } from '../engine/grad.ts';
import { Parameter } from '../engine/module.ts';
import { standInCuda } from '../engine/profile.ts';
import { keep } from '../engine/scope.ts';
import { empty, type Tensor, tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import { readLog } from '../train/log.ts';
import { type LrSchedule, learningRate } from '../train/lr_schedule.ts';
import { createOptimizer, type OptimizerSettings } from '../train/optimizers/create.ts';
import { resolveRun } from '../train/resolve_run.ts';
import { allClose, goldenLines } from './golden.ts';
import { giveGradient } from './gradients.ts';
import { basic, folder, resumes, run } from './small_runs.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';

const usual = resolveRun({ optimizer: { name: 'prodigy', lr: 1, weight_decay: 0 } }, 'test', 'test');

interface Case {
  id: string;
  lr: number;
  schedule: LrSchedule['name'];
  options: Partial<OptimizerSettings>;
  /** After every third step. */
  d: number[];
  weights: number[];
  /** How far torch's float32 is off. */
  noise: [d: number, weights: number];
}

const cases = goldenLines<Case>('prodigy');

// As prodigy.py has them.
const shapes = [[3, 4], [2, 2, 3, 3], [5], [4, 2]];
const begin = (k: number, i: number) => (k === 3 ? 0 : Math.cos(1 + 0.7 * i + k) / 256);
const gradientOf = (k: number, step: number, i: number, w: number) =>
  0.02 * (1 + (i % 3)) * (w - 0.5 * Math.sin(2 + 1.1 * i + k)) +
  0.003 * Math.sin(1 + 1.3 * i + k + 2.1 * step);
const STEPS = 60;

function parametersOn(device: Device, dtype: FloatDType): Map<string, Parameter> {
  return new Map(
    shapes.map((shape, k) => {
      const p = new Parameter(shape);
      const values = Float64Array.from({ length: p.size }, (_, i) => begin(k, i));
      p.tensor = requireGrad(keep(tensor(values, shape, { device, dtype })));
      return [`p${k}`, p];
    }),
  );
}

interface How {
  dtype?: FloatDType;
  options?: Partial<OptimizerSettings>;
  schedule?: LrSchedule['name'];
  lr?: number;
  /** Gradients come times this, and are scaled back. */
  times?: number;
  steps?: number;
}

/** d after each step, the weights at full precision after the last one, and what was kept. */
function trained(
  device: Device,
  { dtype = 'float32', options = {}, schedule = 'constant', lr = 1, times = 1, steps = STEPS }: How,
) {
  const parameters = parametersOn(device, dtype);
  const optimizer = createOptimizer(parameters, { ...usual.optimizer, ...options }, 1);
  const rates = { ...usual.lr_scheduler, name: schedule, warmup_steps: schedule === 'cosine' ? 5 : 0 };
  const d: number[] = [];
  const found: unknown[] = [];
  for (let step = 0; step < steps; step++) {
    [...parameters].forEach(([name, p], k) => {
      const weights = optimizer.weightOf(name).floats();
      const values = Float64Array.from(weights, (w, i) => times * gradientOf(k, step, i, w));
      clearGrad(p.tensor);
      giveGradient(p.tensor, keep(tensor(values, p.shape, { device, dtype })));
    });
    found.push(optimizer.step(learningRate(rates, lr, step, STEPS), 1 / (times || 1)).dlr);
    d.push((optimizer.state.get('d') as Tensor).floats()[0]);
  }
  const weights = [...parameters.keys()].flatMap((name) => [...optimizer.weightOf(name).floats()]);
  const state = [...optimizer.state].map(([name, t]) => `${name} ${t.dtype} ${t.size}`);
  for (const p of parameters.values()) {
    clearGrad(p.tensor);
    p.unload();
  }
  optimizer.release();
  return { d, found, weights, state };
}

const cpu = openDevice('auto');
const devices = { auto: cpu, reference: openDevice('reference'), gpu: cudaDevice(openVirtualGpu()) };

for (const [name, device] of Object.entries(devices))
  test(`prodigyopt's d and weights over 60 steps, ${name}`, { timeout: 120_000 }, (t) => {
    const before = device.memory.storages;
    for (const { id, lr, schedule, options, d, weights, noise } of cases) {
      const got = trained(device, { options, schedule, lr });
      const thirds = got.d.filter((_, step) => step % 3 === 2);
      allClose(t, `${id}: d`, thirds, d, { atol: 0, rtol: 10 * noise[0] });
      allClose(t, `${id}: weights`, got.weights, weights, { atol: 10 * noise[1], rtol: 0 });
      t.equal(got.found[0], schedule === 'cosine' ? 0 : Math.fround(options.d0 ?? 1e-6) * lr, `${id}: d lr`);
    }
    t.equal(device.memory.storages, before, 'live tensors');
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
  t.ok(Math.abs(last(mastered) / last(want) - 1) < 0.02, `d ${last(mastered)}, in float32 ${last(want)}`);
  allClose(t, 'weights', mastered.weights, want.weights, { atol: 0.02, rtol: 0 });
  const rounded = trained(cpu, { steps: 30, dtype: 'bfloat16', options: { stochastic_rounding: true } });
  t.notOk(rounded.state.some((name) => name.startsWith('master.')));
  t.ok(Math.abs(last(rounded) / last(want) - 1) < 0.2, `d ${last(rounded)}, in float32 ${last(want)}`);
  t.end();
});

test('an update whose gradients are all zero finds nothing', (t) => {
  const { d, weights } = trained(cpu, { times: 0, steps: 2 });
  t.same(d, [1e-6, 1e-6].map(Math.fround));
  t.same(
    weights,
    [...parametersOn(cpu, 'float32').values()].flatMap((p) => [...p.tensor.floats()]),
  );
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
  t.ok(told[2] >= 0.4 * told[1] && told[2] < 1, `${told[2]}`);
  t.same(
    of('prodigy-broken').map((entry) => entry['d*lr']),
    told,
  );
  await run({ ...basic('adamw'), steps: 1 });
  t.notOk('d*lr' in of('adamw')[0], 'others find none');
});
