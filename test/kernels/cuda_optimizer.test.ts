// On the GPU an update of all weights is a launch or a few, however many parameters there are and of whatever sizes, and changes
// each parameter as a step of its own does, to the bit, and as the reference does.
import { test } from 'tap';
import { cudaDevice, type Device, openDevice } from '../../engine/device.ts';
import { registry, update, updateOf } from '../../engine/op.ts';
import { scope } from '../../engine/scope.ts';
import type { DType, FloatDType } from '../../io/dtype.ts';
import { type AnyRecord, type Planted, relativeError } from '../support/op_cases.ts';
import { openVirtualGpu } from '../virtual-gpu/gpu.ts';
import { tensorsOf } from './op_exact.ts';

const gpu = openVirtualGpu();
const devices = { gpu: cudaDevice(gpu), reference: openDevice('reference') };
const launches: Record<string, number> = {
  adamw: 2, // moments in float32, and in bfloat16
  ...{ lion: 1, ema: 1, adamw_8bit: 1, sum_squares: 2, prodigy_moments: 2, prodigy: 1, schedule_free: 1 },
  adafactor: 5 + 3 + 3, // linear layers, convolutions, vectors
};

/** Of the relative error, by what a number is stored in. Rounded at random by other bits, bfloat16 would be 3e-3 off. */
const bounds: Partial<Record<DType, number>> = { float32: 1e-6, bfloat16: 1e-3, float16: 1e-3 };

/** The op's samples as parameters of one update: each has its own numbers, and its own bits for what is rounded at random. */
const parametersOf = (record: AnyRecord): Planted[] =>
  record.samples.map((sample, i) => {
    const rounding = { seedLow: 5, seedHigh: i, stream: 7 };
    const plant = (_name: string, data: Float64Array) => void data.set(data.map((x) => x * (1 + i / 32)));
    return { ...sample, attrs: { ...sample.attrs, rounding }, plant };
  });

/** What an update changes, by parameter, and its launches. */
function run(device: Device, record: AnyRecord, dtype: FloatDType, together: boolean) {
  return scope(() => {
    const parameters = parametersOf(record);
    const made = parameters.map((sample) => tensorsOf(device, sample, dtype));
    const updates = made.map((inputs, i) => updateOf(record, inputs, parameters[i].attrs));
    const before = gpu.stats.launches;
    if (together) update(updates);
    else for (const one of updates) update([one]);
    const changed = made.flatMap((inputs, i) =>
      Object.keys(inputs)
        .filter((name) => record.updates?.includes(name))
        .map((name) => ({
          name: `${name} [${inputs[name].shape}] of parameter ${i}`,
          bytes: Buffer.from(inputs[name].bytes()),
          values: inputs[name].floats(),
          bound: bounds[inputs[name].dtype] ?? (bounds[dtype] as number),
        })),
    );
    return { changed, launches: gpu.stats.launches - before };
  });
}

for (const [op, count] of Object.entries(launches)) {
  const record = registry.get(op) as AnyRecord;
  for (const dtype of ['float32', 'bfloat16', 'float16'] as const) {
    test(`${record.name} of ${record.samples.length} parameters, ${dtype}`, (t) => {
      const together = run(devices.gpu, record, dtype, true);
      const alone = run(devices.gpu, record, dtype, false);
      const want = run(devices.reference, record, dtype, true);
      t.equal(together.launches, count, 'launches');
      together.changed.forEach(({ name, bytes, values, bound }, i) => {
        t.ok(bytes.equals(alone.changed[i].bytes), `${name}: the same alone`);
        const error = relativeError(values, want.changed[i].values);
        t.ok(error <= bound, `${name}: ${error}`);
      });
      t.equal(devices.gpu.memory.storages, 0, 'live tensors');
      t.end();
    });
  }
}
