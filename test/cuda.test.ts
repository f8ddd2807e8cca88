// The cuda device on the virtual GPU: every op of the registry against the reference, in each storage type, through the
// same allocator, plans, launches and PTX that a real GPU gets. Samples are spread over the types, so that every kernel meets
// several shapes. Live tensors return to their count.
import { test } from 'tap';
import { findLibrary } from '../engine/cpu/build.ts';
import { openCpuDriver } from '../engine/cpu/driver.ts';
import { expectedFiles } from '../engine/cuda/build.ts';
import { readPtx } from '../engine/cuda/kernels.ts';
import { readManifest } from '../engine/cuda/manifest.ts';
import { plans } from '../engine/cuda/plans.ts';
import { cudaDevice, type Device, openDevice } from '../engine/device.ts';
import { registry } from '../engine/op.ts';
import type { FloatDType } from '../io/dtype.ts';
import { type AnyRecord, type AnySample, relativeError, runOn, withDtype } from './op_cases.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';

/**
 * The square root of the NMSE: 1e-7 for float32, and 1e-5 for the half types. Where a gradient passes through an
 * intermediate that is itself rounded to the half type (an activation's input, attention's probabilities), 2.5e-5.
 */
const tolerance: Record<FloatDType, number> = { float32: 3.1e-4, bfloat16: 3.1e-3, float16: 3.1e-3 };
const throughStorage = { names: ['linear', 'attention'], tolerance: 5e-3 };

const gpu = openVirtualGpu();
const device = cudaDevice(gpu);
const reference = openDevice('reference');

/** What is wrong with one sample in one type; undefined where nothing is. */
function problem(record: AnyRecord, sample: AnySample, dtype: FloatDType): string | undefined {
  const adjusted = { ...sample, attrs: withDtype(sample.attrs, dtype) };
  const live = () => `${device.memory.storages} and ${reference.memory.storages}`;
  const before = live();
  const [want, got] = [reference, device].map((on: Device) => runOn(on, record, adjusted, dtype));
  const loose = dtype !== 'float32' && throughStorage.names.includes(record.name);
  const bound = loose ? throughStorage.tolerance : tolerance[dtype];
  const errors = Object.keys(want.gradients).map(
    (name) => [name, relativeError(got.gradients[name], want.gradients[name]), bound] as const,
  );
  errors.push(['y', relativeError(got.y, want.y), tolerance[dtype]]);
  const bad = errors.filter(([, error, most]) => !(error <= most));
  if (bad.length) return bad.map(([name, error]) => `${name} ${error.toExponential(1)}`).join(', ');
  return live() === before ? undefined : `live tensors ${before} → ${live()}`;
}

/** Every sample of a small op, a third of the others in each type: all are met in some type. */
const dtypes = ['float32', 'bfloat16', 'float16'] as const;

for (const record of registry.values()) {
  test(`${record.name} on the virtual GPU`, (t) => {
    dtypes.forEach((dtype, d) => {
      const chosen = record.samples.map((sample, i) => [i, sample] as const);
      for (const [i, sample] of chosen.filter(([i]) => (i + d) % 3 === 0 || i < 2)) {
        t.equal(problem(record, sample, dtype), undefined, `${dtype} sample ${i}`);
      }
    });
    t.end();
  });
}

test('every kernel of the CPU library is planned, with the same parameters', (t) => {
  const library = findLibrary();
  if ('reason' in library) return t.end();
  const entries = new Map(
    expectedFiles().flatMap(({ family, dtype }) => [...readManifest(readPtx(family, dtype))]),
  );
  for (const [symbol, signature] of openCpuDriver(library.path).symbols) {
    const plan = plans.get(symbol.slice(0, symbol.lastIndexOf('_')));
    const own = entries
      .get(symbol)
      ?.parameters.map(({ kind }) => kind)
      .join('');
    t.equal(plan && (plan.signature ?? own), signature, symbol);
  }
  t.end();
});

test('the committed PTX is made from the committed sources', (t) => {
  for (const { family, dtype, digest } of expectedFiles()) {
    t.ok(readPtx(family, dtype).split('\n')[0].includes(digest), `${family} ${dtype}`);
  }
  t.end();
});
