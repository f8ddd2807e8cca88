// A convolution of a doubled image without the doubled image (engine/doubled.ts), against the loops that define upsampling and
// convolution: as the upsampler of a model, plain and with an adapter on it. On a GPU: gpu_sampling.test.ts.
import { test } from 'tap';
import { openDevice } from '../../engine/device.ts';
import { bounds, reference, upsampled } from '../support/doubled_upsampler.ts';
import { maxDifference } from '../support/golden.ts';
import { relativeError } from '../support/op_cases.ts';

const shapes = [
  [1, 1, 1, 8],
  [2, 3, 5, 16],
  [1, 8, 8, 64],
  [1, 16, 7, 33],
];

test('against upsampling and convolution', (t) => {
  const cpu = openDevice('cpu');
  for (const device of [cpu, reference])
    for (const dtype of ['float32', 'bfloat16', 'float16'] as const)
      for (const shape of shapes)
        for (const adapted of [false, true]) {
          const before = device.memory.storages;
          const [want] = upsampled(reference, dtype, shape, { cached: false, adapted });
          const [first, second] = upsampled(device, dtype, shape, { cached: true, adapted });
          const nmse = relativeError(first, want) ** 2;
          const name = `${device.name} ${dtype} [${shape}]${adapted ? ' with an adapter' : ''}`;
          t.ok(nmse <= bounds[dtype], `${name}: ${nmse.toExponential(2)}`);
          t.equal(maxDifference(second, first), 0, `${name}: again, from what was kept`);
          t.equal(device.memory.storages, before, `${name}: live tensors`);
        }
  t.end();
});
