// Prodigy over the cases of golden/prodigy.jsonl: the parameters and gradients that golden/prodigy.py has by formulas, d and weights after
// each step on a device, and how near they must come to what prodigyopt does in float64.
import type { Test } from 'tap';
import type { Device } from '../../engine/device.ts';
import { clearGrad, requireGrad } from '../../engine/grad.ts';
import { Parameter } from '../../engine/module.ts';
import { keep } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { createOptimizer, type OptimizerSettings } from '../../train/optimizers/create.ts';
import { type LrSchedule, learningRate } from '../../train/optimizers/lr_schedule.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import { allClose, goldenLines } from './golden.ts';
import { giveGradient } from './gradients.ts';

export const usual = resolveRun({ optimizer: { name: 'prodigy', lr: 1, weight_decay: 0 } }, 'test', 'test');

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

export function parametersOn(device: Device, dtype: FloatDType): Map<string, Parameter> {
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
export function trained(
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

/** d and the weights over 60 steps are prodigyopt's, in every case, and no tensor is left. */
export function asProdigyopt(t: Test, device: Device): void {
  const before = device.memory.storages;
  for (const { id, lr, schedule, options, d, weights, noise } of cases) {
    const got = trained(device, { options, schedule, lr });
    const thirds = got.d.filter((_, step) => step % 3 === 2);
    allClose(t, `${id}: d`, thirds, d, { atol: 0, rtol: 10 * noise[0] });
    allClose(t, `${id}: weights`, got.weights, weights, { atol: 10 * noise[1], rtol: 0 });
    t.equal(got.found[0], schedule === 'cosine' ? 0 : Math.fround(options.d0 ?? 1e-6) * lr, `${id}: d lr`);
  }
  t.equal(device.memory.storages, before, 'live tensors');
}
