// A NaN in any input of any op: the GPU's kernels lose none of it that the reference keeps, neither forward nor in gradients.
// Optimizers' steps are left out: the trainer gives them no gradient that is not finite. And the search for where one came from.
import { test } from 'tap';
import { cudaDevice } from '../../engine/device.ts';
import { registry } from '../../engine/op.ts';
import { attention } from '../../engine/ops/attention.ts';
import { linear } from '../../engine/ops/linear.ts';
import { mse } from '../../engine/ops/loss.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import type { PassInputs } from '../../train/objective/pass_inputs.ts';
import { firstBadTensor } from '../../train/passes/nonfinite.ts';
import type { Task } from '../../train/passes/task.ts';
import { type Planted, size, values, withDtype } from '../support/op_cases.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';
import { runExactly, runKernels } from './op_exact.ts';

const FEW = 3000;
const device = cudaDevice(openVirtualGpu({ arenaBytes: 2 ** 26 }));

for (const dtype of ['float32', 'bfloat16'] as const)
  test(`a NaN is not lost, in ${dtype}`, (t) => {
    for (const record of registry.values()) {
      if (record.updates) continue;
      const inputsOf = ({ inputs }: Planted) => Object.values(inputs).reduce((sum, x) => sum + size(x), 0);
      const samples = record.samples.filter((sample) => inputsOf(sample) < FEW).slice(0, 2);
      const lost = samples.flatMap((given) =>
        Object.keys(given.inputs)
          .filter((name) => !given.ints?.[name])
          .flatMap((planted) => {
            const plant = (name: string, data: Float64Array): void => {
              if (name === planted) data[data.length >> 1] = Number.NaN;
            };
            const sample: Planted = { ...given, attrs: withDtype(given.attrs, dtype), plant };
            const got = runKernels(device, record, sample, dtype);
            return Object.entries(runExactly(record, sample, dtype, got))
              .filter(([name, want]) =>
                want.some((v, i) => !Number.isFinite(v) && Number.isFinite(got[name][i])),
              )
              .map(([name]) => `${planted} in ${name}`);
          }),
      );
      t.same(lost, [], record.name);
    }
    t.end();
  });

test('launches that may become one hide nothing from the search for the first tensor that is not finite', (t) => {
  const C = 8;
  scope(() => {
    const [q, k, v] = [1, 2, 3].map((seed) => tensor(values(C * C, seed), [C, C], { device }));
    const task = {
      components: [],
      loss({ x, target }) {
        const [a, b, c] = device.together(() => [linear(x, q), linear(x, k), linear(x, v)]);
        return mse(attention(a, b, c, { heads: 1 }), target);
      },
    } as Partial<Task> as Task;
    const numbers = Float32Array.from(values(4 * C, 4));
    const target = numbers.with(5, Number.POSITIVE_INFINITY);
    const inputs: PassInputs = {
      x: { values: numbers, shape: [1, 4, C], dtype: 'float32' },
      target: { values: target, shape: [1, 4, C], dtype: 'float32' },
    };
    // What a pass that was not finite leaves in the pool.
    const left = Array.from({ length: 12 }, () =>
      tensor(new Float32Array(64).fill(Number.NaN), [64], { device }),
    );
    for (const each of left) each.release();
    const { together } = device;
    t.equal(firstBadTensor(task, inputs, device), 'the input target of mse');
    t.equal(device.together, together, 'afterwards they go together again');
  });
  t.end();
});
