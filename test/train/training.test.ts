// Training against diffusers' numbers (golden area training): three steps of losses, gradient norms, parameters, moments,
// averages and learning rates; and the parts of the objective that golden data lacks, against their formulas.
import { join } from 'node:path';
import { test } from 'tap';
import { backward, clearGrad, gradOf, requireGrad } from '../../engine/grad.ts';
import { namedParameters, type Parameter, unload } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { parseUNetConfig, type UNet, unet } from '../../models/unet/unet.ts';
import { toDevice, toHost } from '../../models/vae/latents.ts';
import { addNoise, diffusionLoss, noisedInputs, objectiveOf } from '../../train/objective/objective.ts';
import { adamw } from '../../train/optimizers/adamw.ts';
import { clipGradients } from '../../train/optimizers/clip.ts';
import { ema } from '../../train/optimizers/ema.ts';
import { type LrSchedule, learningRate } from '../../train/optimizers/lr_schedule.ts';
import { optimize } from '../../train/optimizers/rule.ts';
import { place } from '../../train/passes/pass.ts';
import { fill } from '../../train/run/fields.ts';
import { fields } from '../../train/run/run_fields.ts';
import { allClose, type GoldenCase, goldenArea, goldenFolder } from '../support/golden.ts';
import { devices } from '../support/models_golden.ts';
import { nonEmpty } from '../support/non_empty.ts';

const [device] = devices;
const area = goldenArea('training');
const source = openModel(join(goldenFolder, 'tiny-sdxl'));
const schedule: LrSchedule = {
  name: 'constant',
  warmup_steps: 0,
  num_cycles: 1,
  power: 1,
  step_rules: '',
};
/** What a run has that says nothing: epsilon, mean squared error, no weights. */
const plain = fill(fields, {}, 'defaults').objective;

/** Entry `step` along the first axis of a stored tensor, and its shape. */
function entry(name: string, step: number): { shape: number[]; data: Float32Array } {
  const [, ...shape] = area.shape(name);
  const size = shape.reduce((a, b) => a * b, 1);
  return { shape, data: area.floats(name).slice(step * size, (step + 1) * size) };
}

const onDevice = (name: string, step: number): Tensor => {
  const { shape, data } = entry(name, step);
  return tensor(data, shape, { device });
};

/** A stored [n, c, h, w] as our [n, h, w, c] numbers. */
const channelsLast = (latents: { shape: number[]; data: Float32Array }) =>
  scope(() => toDevice(latents, device, 'float32').floats());

/** A tensor of the model as checkpoints lay it out. */
const stored = (p: Parameter, t: Tensor): Float32Array =>
  p.layout === 'conv' ? scope(() => toHost(t.handle(p.memoryShape)).data) : t.floats();

interface Settings {
  lr: number;
  betas: [number, number];
  eps: number;
  weight_decay: number;
  max_grad_norm: number;
  lr_scheduler: LrSchedule['name'];
  lr_warmup_steps: number;
  prediction_type: 'epsilon' | 'v_prediction';
  snr_gamma: number | null;
  noise_offset: number;
  gradient_accumulation: number;
  ema_decay: number;
}

/** The loss of stored micro-batch `index`, on the tape. */
function goldenLoss(
  model: UNet,
  settings: Settings,
  index: number,
  context = onDevice('data.prompt_embeds', index),
): Tensor {
  const objective = objectiveOf(
    { ...plain, prediction_type: settings.prediction_type, snr_gamma: settings.snr_gamma ?? 0 },
    source.config('scheduler'),
  );
  const latents = entry('data.latents', index);
  const [n, c, h, w] = latents.shape;
  const noise = channelsLast(entry('data.noise', index));
  const offset = entry('data.offset', index).data;
  for (let i = 0; i < noise.length; i++) {
    const image = Math.floor(i / (h * w * c));
    noise[i] += settings.noise_offset * offset[image * c + (i % c)];
  }
  const timesteps = entry('data.timesteps', index).data;
  const drawn = { shape: [n, h, w, c], latents: channelsLast(latents), timesteps, noise };
  const noised = addNoise(objective, drawn);
  return diffusionLoss(model, objective, place(noisedInputs(noised, 'float32'), device), {
    context,
    textEmbeds: onDevice('data.pooled', index),
    timeIds: onDevice('data.time_ids', index),
  });
}

test('three steps as diffusers makes them', (t) => {
  const names = area.cases[0].parameter_names as string[];
  const before = device.memory.storages;
  for (const c of nonEmpty(area.cases.filter(({ id }) => id !== 'lr_table'))) {
    const got = threeSteps(c, names);
    for (const [label, expected] of Object.entries(c.expect))
      allClose(t, `${c.id} ${label}`, got(label), area.doubles(expected.tensor), expected);
  }
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

/** Trains and returns what the expectations' labels name. */
function threeSteps(c: GoldenCase, names: string[]): (label: string) => ArrayLike<number> {
  const settings = c.settings as unknown as Settings;
  const model = unet(parseUNetConfig(source.config('unet')));
  source.load('unet', model, device, 'float32');
  const parameters = namedParameters(model);
  for (const p of parameters.values()) requireGrad(p.tensor);
  const optimizer = optimize(parameters, adamw(settings), {
    ...settings,
    stochastic_rounding: false,
    seed: 0,
  });
  const averages = ema(parameters.keys(), optimizer.weightOf, settings.ema_decay);
  const rows: Record<string, number[]> = {};
  const note = (label: string, ...values: number[]) => (rows[label] = [...(rows[label] ?? []), ...values]);
  for (let step = 0; step < 3; step++) {
    const passes = settings.gradient_accumulation;
    const share = tensor([1 / passes], [1], { device });
    let loss = 0;
    for (let pass = 0; pass < passes; pass++)
      scope(() => {
        const value = goldenLoss(model, settings, (step + pass) % 3);
        backward(value, share);
        loss += value.floats()[0] / passes;
      });
    share.release();
    const lr = learningRate(
      { ...schedule, name: settings.lr_scheduler, warmup_steps: settings.lr_warmup_steps },
      settings.lr,
      step,
      3,
    );
    const { norm, scale } = clipGradients(parameters, settings.max_grad_norm);
    const { made } = optimizer.step(lr, scale);
    note('losses', loss);
    note('grad_norms', norm);
    note('lrs', lr);
    note('ema_decays', averages.step(made));
    for (const p of parameters.values()) clearGrad(p.tensor);
    const each = (label: string, of: (name: string) => Float32Array, measure: (x: Float32Array) => number) =>
      note(label, ...names.map((name) => measure(of(name))));
    const weight = (name: string) => (parameters.get(name) as Parameter).tensor.floats();
    each('param_norms', weight, (x) => Math.sqrt(x.reduce((sum, value) => sum + value * value, 0)));
    each('param_sums', weight, (x) => x.reduce((sum, value) => sum + value, 0));
    each(
      'ema_norms',
      (name) => (averages.weights.get(name) as Tensor).floats(),
      (x) => Math.sqrt(x.reduce((sum, value) => sum + value * value, 0)),
    );
  }
  const tensors = new Map<string, Float32Array>();
  for (const [name, p] of parameters) {
    tensors.set(`param.${name}`, stored(p, p.tensor));
    tensors.set(`ema.${name}`, stored(p, averages.weights.get(name) as Tensor));
  }
  for (const [name, state] of optimizer.state) tensors.set(name, state.floats());
  averages.release();
  optimizer.release();
  unload(model);
  return (label) => rows[label] ?? tensors.get(label) ?? [];
}

test('learning rates', (t) => {
  const c = area.cases.find(({ id }) => id === 'lr_table') as GoldenCase;
  const { base_lr, num_warmup_steps, num_training_steps } = c.settings as Record<string, number>;
  const rows = c.rows as Partial<LrSchedule>[];
  const got = rows.flatMap((row) =>
    Array.from({ length: 105 }, (_, step) =>
      learningRate(
        { ...schedule, ...row, warmup_steps: num_warmup_steps },
        base_lr,
        step,
        num_training_steps,
      ),
    ),
  );
  allClose(t, 'table', got, area.doubles(c.expect.lr.tensor), c.expect.lr);
  const rules = { ...schedule, name: 'piecewise_constant', step_rules: '1:10,0.1:20,0.01' } as const;
  const at = (step: number) => learningRate(rules, 1, step, 100);
  t.same([0, 9, 10, 19, 20, 99].map(at), [1, 1, 0.1, 0.1, 0.01, 0.01]);
  const turned = { ...rules, step_rules: '0.1:20,1:10,0.01' };
  t.same(
    [9, 10, 19, 20].map((step) => learningRate(turned, 1, step, 100)),
    [1, 0.1, 0.1, 0.01],
    'in whatever order',
  );
  t.throws(() => learningRate({ ...rules, step_rules: '1:10,0.1:20' }, 1, 0, 100), /step_rules/);
  const shared = { ...schedule, name: 'linear', warmup_steps: 0.25 } as const;
  t.same(
    [0, 1, 5, 6].map((step) => learningRate(shared, 1, step, 22)),
    [0, 1 / 5, 1, 16 / 17],
    'a share of 22 updates is 5 of them, rounded down',
  );
  const polynomial = { ...schedule, name: 'polynomial', warmup_steps: 5 } as const;
  for (const lr of [1e-7, 5e-8, 0])
    t.throws(
      () => learningRate(polynomial, lr, 0, 100),
      {
        name: 'UserError',
        message: /"polynomial" ends at a rate of 1e-7, and optimizer\.lr \S+ is not above it/,
      },
      `a rate of ${lr} would rise`,
    );
  for (const step_rules of ['fast', '1:ten,0.1', '1:10,5,0.1', 'one:10,0.1', '1:10,'])
    t.throws(() => learningRate({ ...rules, step_rules }, 1, 0, 100), /step_rules/);
  t.end();
});

/** Loss, gradients and peak memory of one pass over the first stored batch. */
function onePass(gradientCheckpointing: boolean) {
  const model = unet(parseUNetConfig(source.config('unet')), { gradientCheckpointing });
  source.load('unet', model, device, 'float32');
  const parameters = namedParameters(model);
  for (const p of parameters.values()) requireGrad(p.tensor);
  const context = requireGrad(onDevice('data.prompt_embeds', 0));
  const held = device.memory.live;
  let afterForward = 0;
  const loss = scope(() => {
    const value = goldenLoss(model, area.cases[0].settings as unknown as Settings, 0, context);
    afterForward = device.memory.live - held;
    backward(value);
    return value.floats()[0];
  });
  const gradients = new Map(
    [...parameters].map(([name, p]) => [name, scope(() => gradOf(p.tensor)?.floats()) as Float32Array]),
  );
  gradients.set('context', scope(() => gradOf(context)?.floats()) as Float32Array);
  for (const t of [context, ...[...parameters.values()].map((p) => p.tensor)]) clearGrad(t);
  context.release();
  unload(model);
  return { loss, gradients, afterForward };
}

test('gradient checkpointing gives the same gradients and keeps less', (t) => {
  const before = device.memory.storages;
  const [plainly, checkpointed] = [onePass(false), onePass(true)];
  t.equal(checkpointed.loss, plainly.loss);
  // The prompt's gradient sums what each block's keys and values give, block by block instead of all in a row; and on a GPU a layer that
  // records nothing has its gate in the product, which rounds once less.
  const exact = [...plainly.gradients.keys()].filter(
    (name) => !device.name.startsWith('cuda') && name !== 'context',
  );
  const differing = exact.filter((name) => {
    const [got, want] = [checkpointed, plainly].map(({ gradients }) => gradients.get(name) as Float32Array);
    return Buffer.compare(Buffer.from(got.buffer), Buffer.from(want.buffer));
  });
  t.same(differing, [], `${exact.length} gradients`);
  for (const [name, want] of plainly.gradients) {
    if (exact.includes(name)) continue;
    const got = checkpointed.gradients.get(name) as Float32Array;
    const atol = name === 'context' ? 1e-8 : 1e-5 * Math.max(...want.map(Math.abs));
    allClose(t, `the gradient of ${name}`, got, want, { atol, rtol: 1e-5 });
  }
  const share = checkpointed.afterForward / plainly.afterForward;
  t.ok(share < 0.5, `the tape holds ${(100 * share).toFixed(0)} % of what it holds without`);
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});
