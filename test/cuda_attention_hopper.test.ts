// Attention's kernels for Hopper on the virtual GPU: right and clean at the edges of their tiles under every schedule. One
// multiprocessor makes a block walk all the work, so that every ring goes round; four leave pieces over, which both
// warpgroups share.
import { test } from 'tap';
import { cudaDevice, openDevice } from '../engine/device.ts';
import { registry } from '../engine/op.ts';
import { type AnyRecord, type AnySample, gpuErrors } from './op_cases.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';
import { schedules } from './virtual-gpu/run_kernel.ts';

const record = registry.get('attention') as AnyRecord;
const reference = openDevice('reference');

function sample(n: number, heads: number, lq: number, lk: number, causal: boolean): AnySample {
  const c = heads * 64;
  return {
    inputs: { q: [n, lq, c], k: [n, lk, c], v: [n, lk, c] },
    attrs: { heads, causal, scale: 0.125 },
  };
}

/** [images, heads, queries, keys, causal] by the number of multiprocessors. */
const cases: Readonly<Record<string, readonly (readonly [number, number, number, number, boolean])[]>> = {
  1: [
    [1, 3, 129, 77, false],
    [1, 1, 388, 390, true],
    [1, 1, 63, 128, false],
  ],
  4: [
    [1, 1, 1, 1, false],
    [2, 1, 128, 129, false],
    [1, 2, 77, 80, true],
    [1, 1, 200, 270, false],
  ],
};

for (const multiprocessors of [1, 4]) {
  const gpu = openVirtualGpu({ capability: [9, 0], multiprocessors });
  const device = cudaDevice(gpu);
  for (const [turn, schedule] of schedules.entries()) {
    const title = `${multiprocessors} multiprocessors, ${schedule.async} copies, ${schedule.order} order`;
    test(`heads of 64 on ${title}`, (t) => {
      gpu.setSchedule(schedule);
      cases[multiprocessors].forEach(([n, heads, lq, lk, causal], i) => {
        const dtype = (i + turn) % 3 === 0 ? 'float16' : 'bfloat16';
        const errors = gpuErrors(device, reference, record, sample(n, heads, lq, lk, causal), dtype);
        for (const { name, error, bound } of errors)
          t.ok(error <= bound, `${dtype} ${n} x ${heads}, ${lq} queries, ${lk} keys: ${name} ${error}`);
      });
      t.end();
    });
  }
}
