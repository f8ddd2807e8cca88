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
import { cudaDevice, openDevice } from '../engine/device.ts';
import { registry } from '../engine/op.ts';
import type { FloatDType } from '../io/dtype.ts';
import { type AnyRecord, type AnySample, gpuErrors } from './op_cases.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';

const gpu = openVirtualGpu();
const device = cudaDevice(gpu);
const reference = openDevice('reference');

/** What is wrong with one sample in one type; undefined where nothing is. */
function problem(record: AnyRecord, sample: AnySample, dtype: FloatDType): string | undefined {
  const errors = gpuErrors(device, reference, record, sample, dtype);
  const bad = errors.filter(({ error, bound }) => !(error <= bound));
  return bad.length
    ? bad.map(({ name, error }) => `${name} ${error.toExponential(1)}`).join(', ')
    : undefined;
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
