// Schedule-Free AdamW step by step against its paper's formula in float64, where all three points are kept; its weights in bfloat16; whole
// runs, which save and draw with the mean and resume bit for bit; mistakes.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'tap';
import { type Device, openDevice } from '../../engine/device.ts';
import { clearGrad } from '../../engine/grad.ts';
import { keep } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { openSafetensors } from '../../io/safetensors.ts';
import { listCheckpoints } from '../../train/checkpoint.ts';
import { createOptimizer, type OptimizerSettings } from '../../train/optimizers/create.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import type { RunInput } from '../../train/run/run.ts';
import { allClose } from '../support/golden.ts';
import { giveGradient } from '../support/gradients.ts';
import { refuses } from '../support/io_helpers.ts';
import { parametersOn } from '../support/prodigy_golden.ts';
import { basic, device, folder, losses, resumes } from '../support/small_runs.ts';

const name = 'adamw_schedule_free';
const settings: OptimizerSettings = {
  ...resolveRun({}, 'test', 'test').optimizer,
  ...{ name, betas: [0.9, 0.99], weight_decay: 0.1 },
};
const STEPS = 30;
/** A warm-up that begins with nothing, as schedules of diffusers do. */
const rates = Array.from({ length: STEPS }, (_, k) => 0.02 * Math.min(1, k / 6));
const gradientOf = (y: number, k: number, i: number) => 0.3 * (y - Math.sin(i)) + 0.05 * Math.cos(3 * k + i);

/** The three points of each weight after each step; `factor` is of the rate. */
function byFormula(begin: readonly number[], factor: number, given: OptimizerSettings): Points[] {
  const [[beta1, beta2], { eps, weight_decay, r, weight_lr_power }] = [given.betas, given];
  const [z, x, v] = [[...begin], [...begin], begin.map(() => 0)];
  let [most, sum] = [0, 0];
  return rates.map((lr, k) => {
    most = Math.max(most, lr);
    const weight = (k + 1) ** r * most ** weight_lr_power;
    sum += weight;
    const c = sum > 0 ? weight / sum : 0;
    for (const i of begin.keys()) {
      const y = (1 - beta1) * z[i] + beta1 * x[i];
      const g = 0.5 * gradientOf(y, k, i);
      v[i] = beta2 * v[i] + (1 - beta2) * g * g;
      const root = Math.sqrt(v[i] / (1 - beta2 ** (k + 1)));
      z[i] -= lr * factor * (g / (root + eps) + weight_decay * y);
      x[i] = (1 - c) * x[i] + c * z[i];
    }
    return { y: z.map((at, i) => (1 - beta1) * at + beta1 * x[i]), z: [...z], x: [...x] };
  });
}

interface Points {
  y: readonly number[];
  z: readonly number[];
  x: readonly number[];
}

/** The same on a device, each parameter's after the other; the second has half the rate, and gradients come twice as large as they count. */
function trained(on: Device, given: OptimizerSettings, dtype: FloatDType = 'float32') {
  const parameters = parametersOn(on, dtype);
  const optimizer = createOptimizer(parameters, given, 1, (each) => (each === 'p1' ? 0.5 : 1));
  const averages = optimizer.averages as ReadonlyMap<string, Tensor>;
  const floats = (key: string) => [...(optimizer.state.get(key) as Tensor).floats()];
  const steps = rates.map((lr, k) => {
    for (const p of parameters.values()) {
      const values = Float64Array.from(p.tensor.floats(), (y, i) => gradientOf(y, k, i));
      clearGrad(p.tensor);
      giveGradient(p.tensor, keep(tensor(values, p.shape, { device: on, dtype })));
    }
    optimizer.step(lr, 0.5);
    return [...parameters].map(([key, p]): Points => {
      const x = [...(averages.get(key) as Tensor).floats()];
      return { y: [...p.tensor.floats()], z: floats(`z.${key}`), x };
    });
  });
  const state = [...optimizer.state].map(([key, t]) => `${key} ${t.dtype} ${t.size}`);
  for (const p of parameters.values()) {
    clearGrad(p.tensor);
    p.unload();
  }
  optimizer.release();
  return { steps, state };
}

for (const on of [device, openDevice('reference')])
  for (const [r, weight_lr_power] of [
    [0, 2],
    [1.5, 0.5],
    [0, 0],
  ])
    test(`all three points, ${on.name}, r ${r}, weight_lr_power ${weight_lr_power}`, (t) => {
      const before = on.memory.storages;
      const given = { ...settings, r, weight_lr_power };
      const begin = [...parametersOn(on, 'float32').values()].map((p) => {
        const values = [...p.tensor.floats()];
        p.unload();
        return values;
      });
      const wanted = begin.map((values, k) => byFormula(values, k === 1 ? 0.5 : 1, given));
      const { steps } = trained(on, given);
      for (const point of ['y', 'z', 'x'] as const)
        for (const k of begin.keys())
          allClose(
            t,
            `${point} of p${k}`,
            steps.flatMap((step) => [...step[k][point]]),
            wanted[k].flatMap((step) => [...step[point]]),
            { atol: 2e-6, rtol: 0 },
          );
      t.equal(on.memory.storages, before, 'live tensors');
      t.end();
    });

test('weights in bfloat16 are what lies between the points, rounded, and there are no masters', (t) => {
  const { steps, state } = trained(device, settings, 'bfloat16');
  t.same(state.slice(0, 5), [
    ...['step int32 1', 'lr_max_and_weight_sum float32 2'],
    ...['weight.p0 bfloat16 12', 'z.p0 float32 12', 'exp_avg_sq.p0 float32 12'],
  ]);
  for (const { y, z, x } of steps[STEPS - 1]) {
    const want = z.map((at, i) => at + 0.9 * (x[i] - at));
    allClose(t, 'weights', y, want, { atol: 1e-7, rtol: 2 ** -8 });
  }
  t.end();
});

const ofRun: RunInput = {
  optimizer: { lr: 1e-2, name },
  lr_scheduler: { name: 'constant_with_warmup', warmup_steps: 1 },
  ema: { decay: 0 },
};

test('a run saves and finishes the mean, measures it, and goes on bit for bit', async (t) => {
  const before = device.memory.storages;
  for (const dtype of ['float32', 'bfloat16'] as const)
    await resumes(t, `schedule-free-${dtype}`, {
      ...ofRun,
      ...{ dtype, train: { target: 'lora' }, lora: { rank: 2 }, validation: { samples: 2 } },
    });
  t.equal(device.memory.storages, before, 'live tensors');
  const output = join(folder, 'schedule-free-float32-whole');
  const last = listCheckpoints(output).at(-1) as string;
  const file = 'pytorch_lora_weights.safetensors';
  const [saved, finished] = [join(last, 'lora'), join(output, 'final')].map((at) =>
    readFileSync(join(at, file)),
  );
  t.ok(saved.equals(finished), 'the checkpoint has the weights of the finished model');
  const adapters = openSafetensors(join(last, 'lora', file));
  const state = openSafetensors(join(last, 'optimizer.safetensors'));
  const key = [...adapters.tensors.keys()].find((each) => each.endsWith('lora_B.weight')) as string;
  const floats = (from: typeof state, at: string) => new Float32Array(Uint8Array.from(from.read(at)).buffer);
  const [x, y, z] = [
    floats(adapters, key),
    ...['weight', 'z'].map((slot) => floats(state, `${slot}.lora.${key}`)),
  ];
  allClose(
    t,
    'its y is between',
    y,
    [...z].map((at, i) => at + 0.9 * (x[i] - at)),
    { atol: 1e-8, rtol: 1e-6 },
  );
  t.notSame([...x], [...y]);
  for (const each of [adapters, state]) each.close();
  t.ok(losses(output).every(([, loss]) => (loss as number) > 0));
  t.end();
});

test('mistakes', (t) => {
  for (const [more, sentence] of [
    [
      { lr_scheduler: { name: 'cosine' } },
      /"lr_scheduler\.name" "cosine" changes the learning rate as it goes/,
    ],
    [
      { ema: { decay: 0.9 } },
      /"ema\.decay" keeps a moving average, and Schedule-Free AdamW draws and saves a mean/,
    ],
    [{ train: { fused_backward_pass: true } }, /and Schedule-Free AdamW moves all at once/],
    [
      { optimizer: { name, stochastic_rounding: true } },
      /"optimizer\.stochastic_rounding" is in the place of float32/,
    ],
    [
      { train: { target: 'lora' }, lora: { scale_weight_norms: 1 } },
      /"lora\.scale_weight_norms" shrinks weights/,
    ],
    [{ optimizer: { r: 1 } }, /"optimizer\.r" is of Schedule-Free AdamW, and "optimizer\.name" is "adamw"/],
    [{ optimizer: { name, eps: 0 } }, /"optimizer\.eps" is 0/],
  ] as const)
    refuses(t, sentence, () => resolveRun({ ...basic('x'), ...ofRun, ...more }, 'run.ts', 'test'));
  t.end();
});
