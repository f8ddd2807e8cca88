// Optimizers that golden data lacks, against numbers from transformers' Adafactor and float64; bfloat16 weights with
// masters and with stochastic rounding; clipping. Three steps on a matrix, a convolution, a vector and matrices each time.
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { clearGrad, requireGrad } from '../../engine/grad.ts';
import { Parameter } from '../../engine/module.ts';
import { keep } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { bytesPerElement, decodeFloats, encodeNumbers, type FloatDType } from '../../io/dtype.ts';
import { toMemoryLayout } from '../../models/checkpoint/weights.ts';
import { clipGradients } from '../../train/optimizers/clip.ts';
import { createOptimizer, type OptimizerSettings } from '../../train/optimizers/create.ts';
import { ema } from '../../train/optimizers/ema.ts';
import { resolveRun } from '../../train/run/resolve_run.ts';
import { allClose } from '../support/golden.ts';
import { giveGradient } from '../support/gradients.ts';

const device = openDevice('auto');
const settings: OptimizerSettings = {
  ...resolveRun({}, 'test', 'test').optimizer,
  betas: [0.9, 0.99],
  weight_decay: 0.1,
};
const shapes = [[3, 4], [2, 2, 3, 3], [5], [2, 3, 2]];
const sizeOf = (shape: readonly number[]) => shape.reduce((a, b) => a * b, 1);

/** Numbers in the checkpoint's order as a tensor of the parameter. */
function laid(p: Parameter, values: Float32Array, dtype: FloatDType): Tensor {
  const bytes = new Uint8Array(values.buffer);
  const floats =
    p.layout === 'conv'
      ? new Float32Array(toMemoryLayout(bytes, p.shape, bytesPerElement.float32).buffer)
      : values;
  return keep(tensor(floats, p.memoryShape, { device, dtype }));
}

/** And back. */
function checkpointOrder(p: Parameter, values: Float32Array): number[] {
  if (p.layout !== 'conv') return [...values];
  const [o, i, kh, kw] = p.shape;
  return Array.from({ length: p.size }, (_, at) => {
    const [tap, rest] = [at % (kh * kw), Math.floor(at / (kh * kw))];
    return values[(Math.floor(rest / i) * kh * kw + tap) * i + (rest % i)];
  }).slice(0, o * i * kh * kw);
}

function parametersOf(dtype: FloatDType): Map<string, Parameter> {
  return new Map(
    shapes.map((shape, k) => {
      const p = new Parameter(shape, shape.length === 4 ? 'conv' : 'plain');
      const values = Float32Array.from({ length: sizeOf(shape) }, (_, i) => Math.cos(1 + 0.7 * i + k));
      p.tensor = requireGrad(laid(p, values, dtype));
      return [`p${k}`, p];
    }),
  );
}

const gradientAt = (k: number, step: number, i: number) =>
  0.1 * Math.sin(1 + 1.3 * i + k + 2.1 * step) * (1 + (i % 3));

function setGradients(parameters: Map<string, Parameter>, step: number): void {
  [...parameters.values()].forEach((p, k) => {
    const values = Float32Array.from({ length: p.size }, (_, i) => gradientAt(k, step, i));
    giveGradient(p.tensor, laid(p, values, p.tensor.dtype as FloatDType));
  });
}

/** Weights after three steps at rate 0.05, in the checkpoint's order. */
function threeSteps(given: Partial<OptimizerSettings>, dtype: FloatDType = 'float32'): number[] {
  const parameters = parametersOf(dtype);
  const optimizer = createOptimizer(parameters, { ...settings, ...given }, 1);
  for (let step = 0; step < 3; step++) {
    setGradients(parameters, step);
    optimizer.step(0.05);
  }
  const out = [...parameters.values()].flatMap((p) => checkpointOrder(p, p.tensor.floats()));
  free(parameters, optimizer);
  return out;
}

function free(parameters: Map<string, Parameter>, optimizer: { release(): void }): void {
  for (const p of parameters.values()) {
    clearGrad(p.tensor);
    p.unload();
  }
  optimizer.release();
}

test('a parameter may have a learning rate of its own', (t) => {
  const names = ['adamw', 'adafactor', 'adamw8bit', 'lion'] as const;
  for (const name of names) {
    const moved = (lr: number, factor: number) => {
      const parameters = parametersOf('float32');
      const own = [...parameters.keys()][1];
      const before = [...parameters.values()].map((p) => p.tensor.floats());
      const given = { ...settings, name, weight_decay: 0 };
      const optimizer = createOptimizer(parameters, given, 1, (each) => (each === own ? factor : 1));
      setGradients(parameters, 0);
      optimizer.step(lr);
      const after = [...parameters.values()].map((p) => p.tensor.floats());
      free(parameters, optimizer);
      return after.map((weights, i) => Math.max(...weights.map((w, j) => Math.abs(w - before[i][j]))));
    };
    const [plain, slower, all] = [moved(0.05, 1), moved(0.05, 0.1), moved(0.005, 1)];
    t.equal(slower[0], plain[0], name);
    t.ok(
      Math.abs(slower[1] - all[1]) < 1e-6 && all[1] < 0.2 * plain[1],
      `${name}: ${slower[1]}, ${plain[1]}`,
    );
  }
  t.end();
});

// transformers 5.18.0, Adafactor(lr=0.05, weight_decay=0.1, scale_parameter=False, relative_step=False, clip_threshold=…).
// biome-ignore format: a table of numbers
const adafactorAt1 = [
  0.5303988, -0.1184507, -0.6920738, -0.9658304, -0.7791493, -0.185681, 0.4720134, 0.9297521, 0.9400417, 0.522957, -0.1438274, -0.7586121,
  -0.4090709, -0.8854862, -0.9660714, -0.5562778, 0.0940559, 0.6951753, 0.9947352, 0.81548, 0.2551892, -0.4272512, -0.9084004, -0.9426261,
  -0.5651686, 0.0983681, 0.7279446, 0.9749826, 0.7996743, 0.2249439, -0.4388739, -0.9163398, -0.9468529, -0.5369024, 0.1251754, 0.7041185,
  1.0068774, 0.7783132, 0.2068867, -0.4538424, -0.8902158, -0.9399056, -0.5193058, 0.1302674, 0.7446666, 0.9549139, 0.7810821, 0.2137297,
  -1.0129271, -0.8532694, -0.284397, 0.3479695, 0.8805966,
  -0.6285183, -0.0258078, 0.5457893, 0.9676486, 0.8591118, 0.3122468, -0.3423416, -0.9006943, -0.9384086, -0.6356151, -0.0104563, 0.6613274,
];
// biome-ignore format: a table of numbers
const adafactorAtHalf = [
  0.531308, -0.1221475, -0.7086831, -0.9752074, -0.779584, -0.1965257, 0.4670802, 0.9218799, 0.9376481, 0.520445, -0.1434116, -0.7475047,
  -0.4094451, -0.8882183, -0.959383, -0.561151, 0.0903422, 0.6966376, 0.988, 0.8093925, 0.2514948, -0.4258959, -0.9029914, -0.9455273,
  -0.5589706, 0.1006951, 0.7189922, 0.9788469, 0.7965453, 0.2281632, -0.4391461, -0.9101455, -0.9452302, -0.5380673, 0.1221706, 0.7127941,
  0.9954786, 0.7809549, 0.2109098, -0.4541494, -0.9002097, -0.9391307, -0.522276, 0.1327543, 0.7385644, 0.9699328, 0.7774553, 0.2062254,
  -0.993866, -0.8457587, -0.2941873, 0.3607051, 0.8776309,
  -0.6370311, -0.0188618, 0.5871705, 0.9683978, 0.8569961, 0.3254172, -0.3379626, -0.8749834, -0.9536866, -0.6339901, -0.0038691, 0.6504029,
];

test('Adafactor takes the steps that transformers takes', (t) => {
  const before = device.memory.storages;
  const close = { atol: 1e-6, rtol: 0 };
  allClose(t, 'clip_threshold 1', threeSteps({ name: 'adafactor' }), adafactorAt1, close);
  const half = threeSteps({ name: 'adafactor', clip_threshold: 0.5 });
  allClose(t, 'clip_threshold 0.5', half, adafactorAtHalf, close);
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

test('Lion, in float64 by its formula', (t) => {
  const want = shapes.flatMap((shape, k) =>
    Array.from({ length: sizeOf(shape) }, (_, i) => {
      let [w, m] = [Math.cos(1 + 0.7 * i + k), 0];
      for (let step = 0; step < 3; step++) {
        const g = gradientAt(k, step, i);
        w = w * (1 - 0.05 * 0.1) - 0.05 * Math.sign(0.9 * m + 0.1 * g);
        m = 0.99 * m + 0.01 * g;
      }
      return w;
    }),
  );
  allClose(t, 'weights', threeSteps({ name: 'lion' }), want, { atol: 1e-6, rtol: 0 });
  t.end();
});

test('bfloat16 weights: masters follow float32, stochastic rounding keeps the mean', (t) => {
  for (const name of ['adamw', 'adafactor', 'lion'] as const) {
    const want = threeSteps({ name });
    allClose(t, `${name} with masters`, threeSteps({ name }, 'bfloat16'), want, {
      atol: 0.005,
      rtol: 2 ** -8,
    });
  }
  t.end();
});

/** The mean of 40,000 weights of 1 after `steps` updates of -1e-4 each, a fortieth of what nearest rounding could see. */
function drift(
  stochastic_rounding: boolean,
  steps: number,
): { mean: number; distinct: number; state: string[] } {
  const p = new Parameter([200, 200]);
  const ones = new Float32Array(p.size).fill(1);
  p.tensor = requireGrad(keep(tensor(ones, p.shape, { device, dtype: 'bfloat16' })));
  const parameters = new Map([['p', p]]);
  const optimizer = createOptimizer(
    parameters,
    { ...settings, name: 'lion', weight_decay: 0, stochastic_rounding },
    7,
  );
  for (let step = 0; step < steps; step++) {
    clearGrad(p.tensor);
    giveGradient(p.tensor, keep(tensor(ones, p.shape, { device, dtype: 'bfloat16' })));
    optimizer.step(1e-4);
  }
  const values = p.tensor.floats();
  const state = [...optimizer.state.keys()];
  free(parameters, optimizer);
  return {
    mean: values.reduce((sum, x) => sum + x, 0) / values.length,
    distinct: new Set(values).size,
    state,
  };
}

test('stochastic rounding is unbiased', (t) => {
  const { mean, distinct, state } = drift(true, 50);
  // Below 1 bfloat16 steps by 2^-8; 50 updates of 1e-4 are 5e-3, the mean's own deviation 2.2e-5.
  t.ok(Math.abs(mean - 0.995) < 8e-5, `mean ${mean}, want 0.995`);
  t.ok(distinct > 1 && distinct < 12, `${distinct} neighbouring values`);
  t.same(state, ['step', 'exp_avg.p'], 'no masters are kept');
  const mastered = drift(false, 50);
  t.equal(mastered.distinct, 1);
  t.ok(Math.abs(mastered.mean - 0.995) < 2 ** -9, `with masters ${mastered.mean}`);
  t.same(mastered.state, ['step', 'master.p', 'exp_avg.p']);
  t.end();
});

test('moments in bfloat16 come to the mean of gradients and squares, where nearest rounding stands still', (t) => {
  const [size, steps, g] = [2048, 4000, 0.3];
  const p = new Parameter([size]);
  p.tensor = requireGrad(keep(tensor(new Float32Array(size), p.shape, { device })));
  const parameters = new Map([['p', p]]);
  const given = { ...settings, betas: [0.99, 0.999], moments_dtype: 'bfloat16' } as const;
  const optimizer = createOptimizer(parameters, given, 5);
  giveGradient(p.tensor, keep(tensor(new Float32Array(size).fill(g), p.shape, { device })));
  for (let step = 0; step < steps; step++) optimizer.step(0);
  const v = g ** 2 * (1 - 0.999 ** steps);
  for (const [name, want] of [
    ['exp_avg.p', g],
    ['exp_avg_sq.p', v],
  ] as const) {
    const moment = optimizer.state.get(name) as Tensor;
    t.equal(moment.dtype, 'bfloat16');
    const mean = moment.floats().reduce((sum, x) => sum + x / size, 0);
    // Each lies about a neighbour's distance from it, 2^-8 to 2^-7 of it; a mean of 2048 a 45th as far.
    t.ok(Math.abs(mean / want - 1) < 4 * (2 ** -7 / 45), `${name}: ${mean}, want ${want}`);
  }
  free(parameters, optimizer);
  const toNearest = (x: number) => decodeFloats(encodeNumbers([x], 'bfloat16'), 'bfloat16')[0];
  let stuck = 0;
  for (let step = 0; step < steps; step++) stuck = toNearest(0.999 * stuck + 0.001 * g ** 2);
  t.ok(stuck < 0.5 * v, `to nearest the second stays at ${stuck}`);
  t.end();
});

test('AdamW, in float64 by its formula, with either moments', (t) => {
  const want = shapes.flatMap((shape, k) =>
    Array.from({ length: sizeOf(shape) }, (_, i) => {
      let [w, m, v] = [Math.cos(1 + 0.7 * i + k), 0, 0];
      for (let step = 0; step < 3; step++) {
        const g = gradientAt(k, step, i);
        [m, v] = [0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g];
        const root = Math.sqrt(v / (1 - 0.99 ** (step + 1)));
        w = w * (1 - 0.05 * 0.1) - (0.05 * m) / (1 - 0.9 ** (step + 1)) / (root + 1e-8);
      }
      return w;
    }),
  );
  allClose(t, 'float32', threeSteps({}), want, { atol: 1e-6, rtol: 0 });
  // Two roundings of 2^-7 each, of steps of 0.05.
  allClose(t, 'bfloat16', threeSteps({ moments_dtype: 'bfloat16' }), want, {
    atol: 2 * 2 ** -7 * 0.05,
    rtol: 0,
  });
  t.end();
});

test('the moving average of weights without masters', (t) => {
  const before = device.memory.storages;
  const values = [1, -2, 3, 0.5];
  const weight = keep(tensor(values, [4], { device, dtype: 'bfloat16' }));
  const average = ema(['w'], () => weight, 0.9);
  const of = average.weights.get('w') as Tensor;
  t.same([of.dtype, ...of.floats()], ['float32', ...values], 'begins as a copy');
  const want = [...values];
  for (let k = 1; k <= 4; k++) {
    const moved = values.map((x) => x * 2 ** -k);
    weight.set(moved);
    // 0 at the first, then (1 + n) / (10 + n), n = k - 1.
    const decay = k === 1 ? 0 : k / (9 + k);
    t.equal(average.step(k), decay);
    want.forEach((x, i) => {
      want[i] = decay * x + (1 - decay) * moved[i];
    });
    allClose(t, `update ${k}`, of.floats(), want, { atol: 1e-6, rtol: 1e-6 });
  }
  t.equal(average.step(1000), 0.9, 'and no more than was asked for');
  average.release();
  weight.release();
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

test('both devices round the same weights and moments to the same bits', (t) => {
  const results = ['auto', 'reference'].map((name) => {
    const on = openDevice(name);
    // Sums, products and the step are exact before they are rounded: halves of eight bits, and a step that is a power of two.
    const bitsOf = (given: Partial<OptimizerSettings>, steps: number, lr: number) => {
      const p = new Parameter([37]);
      const values = Float32Array.from({ length: 37 }, (_, i) => Math.sin(i) + 2);
      const bfloat16 = () => keep(tensor(values, p.shape, { device: on, dtype: 'bfloat16' }));
      p.tensor = requireGrad(bfloat16());
      const parameters = new Map([['p', p]]);
      const options = { ...settings, weight_decay: 0, stochastic_rounding: true, ...given };
      const optimizer = createOptimizer(parameters, options, 3);
      giveGradient(p.tensor, bfloat16());
      for (let step = 0; step < steps; step++) optimizer.step(lr);
      const bits = [p.tensor, ...optimizer.state.values()].map((x) => Buffer.from(x.bytes()).toString('hex'));
      free(parameters, optimizer);
      return bits;
    };
    return {
      lion: bitsOf({ name: 'lion' }, 1, 2 ** -9)[0],
      adamw: bitsOf({ betas: [0.5, 0.5], moments_dtype: 'bfloat16' }, 3, 0),
    };
  });
  t.same(results[0], results[1]);
  t.end();
});

test('clipping: the global norm, its factor, and who is not finite', (t) => {
  const before = device.memory.storages;
  const parameters = parametersOf('float32');
  setGradients(parameters, 0);
  const squares = shapes.flatMap((shape, k) =>
    Array.from({ length: sizeOf(shape) }, (_, i) => gradientAt(k, 0, i) ** 2),
  );
  const norm = Math.sqrt(squares.reduce((a, b) => a + b, 0));
  const clipped = clipGradients(parameters, 0.5);
  t.ok(Math.abs(clipped.norm - norm) < 1e-7 * norm, `norm ${clipped.norm}`);
  t.ok(Math.abs(clipped.scale - 0.5 / (norm + 1e-6)) < 1e-7);
  t.equal(clipGradients(parameters, 100).scale, 1);
  t.equal(clipGradients(parameters, 0).scale, 1, 'no clipping');
  t.equal(clipped.nonfinite, undefined);
  const tiny = new Map([...parameters].slice(0, 1));
  const [[, first]] = tiny;
  clearGrad(first.tensor);
  const level = 1e-6 / Math.sqrt(first.tensor.size);
  giveGradient(first.tensor, laid(first, new Float32Array(first.tensor.size).fill(level), 'float32'));
  t.ok(Math.abs(clipGradients(tiny, 1e-6).scale - 0.5) < 1e-6, "torch's 1e-6 stands beside a norm of 1e-6");
  const bad = new Float32Array(36).fill(1);
  bad[35] = Number.NaN;
  const p1 = parameters.get('p1') as Parameter;
  clearGrad(p1.tensor);
  giveGradient(p1.tensor, laid(p1, bad, 'float32'));
  t.equal(clipGradients(parameters, 1).nonfinite, 'p1');
  const [p0] = parameters.values();
  clearGrad(p0.tensor);
  giveGradient(p0.tensor, laid(p0, bad.subarray(24).slice(), 'float32'));
  t.equal(clipGradients(parameters, 1).nonfinite, 'p0', 'the first of them');
  free(parameters, { release() {} });
  t.equal(device.memory.storages, before, 'live tensors');
  t.end();
});

test('AdamW with moments of a byte: steps near those of float32 moments', (t) => {
  const p = (name: 'adamw' | 'adamw8bit') => {
    const weights = new Parameter([50, 100]);
    weights.tensor = requireGrad(keep(tensor(new Float32Array(5000), weights.shape, { device })));
    const parameters = new Map([['p', weights]]);
    const optimizer = createOptimizer(parameters, { ...settings, name, weight_decay: 0 }, 1);
    for (let step = 0; step < 20; step++) {
      clearGrad(weights.tensor);
      const values = Float32Array.from(
        { length: 5000 },
        (_, i) => Math.sin(1 + i) + 0.3 * Math.sin(i * step),
      );
      giveGradient(weights.tensor, keep(tensor(values, weights.shape, { device })));
      optimizer.step(0.01);
    }
    const result = { values: weights.tensor.floats(), slots: [...optimizer.state.keys()] };
    free(parameters, optimizer);
    return result;
  };
  const [full, small] = [p('adamw'), p('adamw8bit')];
  t.same(small.slots, ['step', 'state1.p', 'state2.p', 'absmax1.p', 'absmax2.p']);
  const difference = full.values.reduce((sum, x, i) => sum + Math.abs(x - small.values[i]), 0);
  const moved = full.values.reduce((sum, x) => sum + Math.abs(x), 0);
  t.ok(difference < 0.03 * moved, `differs by ${((100 * difference) / moved).toFixed(2)} % of the way gone`);
  const kept = [4095, 4096].map((size) => {
    const one = new Parameter([size]);
    one.tensor = keep(tensor(new Float32Array(size), [size], { device }));
    const parameters = new Map([['p', one]]);
    const optimizer = createOptimizer(parameters, { ...settings, name: 'adamw8bit' }, 1);
    const slots = [...optimizer.state.keys()];
    free(parameters, optimizer);
    return slots.includes('state1.p');
  });
  t.same(kept, [false, true], "bitsandbytes' bound on what is small");
  const tiny = threeSteps({ name: 'adamw8bit' });
  t.same(tiny, threeSteps({ name: 'adamw' }), 'small parameters keep float32 moments');
  t.end();
});
