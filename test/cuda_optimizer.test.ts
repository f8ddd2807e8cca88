// On the GPU an update of all weights is one launch however many parameters there are, and gives what steps one by one on
// the reference give: AdamW, Lion and the moving average, and clipping's sums of squares in two launches.
import { test } from 'tap';
import { cudaDevice, type Device, openDevice } from '../engine/device.ts';
import { type Update, update } from '../engine/op.ts';
import { adamwStep, emaStep, lionStep, sumSquares } from '../engine/ops/optimizer.ts';
import { scope } from '../engine/scope.ts';
import { type Tensor, tensor } from '../engine/tensor.ts';
import type { FloatDType } from '../io/dtype.ts';
import { relativeError, values } from './op_cases.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';

const gpu = openVirtualGpu();
const devices = { got: cudaDevice(gpu), want: openDevice('reference') };
/** Longer than a chunk of the kernel, shorter, no multiple of a pack, and the shortest. */
const sizes = [9001, 8192, 30, 1];
const step = { lr: 0.01, weightDecay: 0.1, gradientScale: 0.5, step: 3 };

interface Made {
  updates: Update[];
  changed: Tensor[];
}

/** The tensors of parameter `i`, the weight in `dtype` and all others in float32. */
function tensors(device: Device, i: number, dtype: FloatDType) {
  const make = (seed: number, type: FloatDType, change = (x: number) => x) =>
    tensor(values(sizes[i], 10 * i + seed).map(change), [sizes[i]], { device, dtype: type });
  const [weight, gradient] = [make(1, dtype), make(2, dtype)];
  const [exp_avg, exp_avg_sq] = [make(3, 'float32'), make(4, 'float32', Math.abs)];
  const master = i % 2 ? make(5, 'float32') : undefined;
  return { weight, gradient, exp_avg, exp_avg_sq, master };
}

const kinds: Record<string, (device: Device, dtype: FloatDType) => Made> = {
  adamw: (device, dtype) =>
    each(device, dtype, (t) => ({
      update: adamwStep(t, { ...step, betas: [0.9, 0.999], eps: 1e-8 }),
      changed: [t.weight, t.exp_avg, t.exp_avg_sq, ...(t.master ? [t.master] : [])],
    })),
  lion: (device, dtype) =>
    each(device, dtype, ({ exp_avg_sq, ...t }) => ({
      update: lionStep(t, { ...step, betas: [0.9, 0.99] }),
      changed: [t.weight, t.exp_avg],
    })),
  ema: (device, dtype) =>
    each(device, dtype, ({ weight, exp_avg }) => ({
      update: emaStep(exp_avg, weight, 0.9),
      changed: [exp_avg],
    })),
  sum_squares(device, dtype) {
    const sums = tensor(new Float32Array(sizes.length), [sizes.length], { device });
    const made = each(device, dtype, ({ gradient }, i) => ({
      update: sumSquares(gradient, sums, i),
      changed: [],
    }));
    return { ...made, changed: [sums] };
  },
};

function each(
  device: Device,
  dtype: FloatDType,
  make: (t: ReturnType<typeof tensors>, i: number) => { update: Update; changed: Tensor[] },
): Made {
  const made = sizes.map((_, i) => make(tensors(device, i, dtype), i));
  return { updates: made.map((m) => m.update), changed: made.flatMap((m) => m.changed) };
}

for (const [name, make] of Object.entries(kinds)) {
  for (const dtype of ['float32', 'bfloat16'] as const) {
    test(`${name} of ${sizes.length} parameters, ${dtype}`, (t) => {
      const results = Object.values(devices).map((device) =>
        scope(() => {
          const { updates, changed } = make(device, dtype);
          const before = gpu.stats.launches;
          update(updates);
          const launches = gpu.stats.launches - before;
          return { launches, values: changed.map((tensor) => tensor.floats()) };
        }),
      );
      const [got, want] = results;
      t.equal(got.launches, name === 'sum_squares' ? 2 : 1, 'launches');
      const bound = dtype === 'float32' ? 1e-6 : 3.1e-3;
      got.values.forEach((y, i) => {
        const error = relativeError(y, want.values[i]);
        t.ok(error <= bound, `tensor ${i}: ${error}`);
      });
      t.equal(devices.got.memory.storages, 0, 'live tensors');
      t.end();
    });
  }
}
