// A NaN in any input of any op: the GPU's kernels lose none of it that the reference keeps, neither forward nor in gradients.
// Optimizers' steps are left out: the trainer gives them no gradient that is not finite.
import { test } from 'tap';
import { cudaDevice } from '../engine/device.ts';
import { registry } from '../engine/op.ts';
import { type Planted, size, withDtype } from './op_cases.ts';
import { runExactly, runKernels } from './op_exact.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';

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
