// The matrix products on Hopper's own instructions, on the virtual GPU: each tile at shapes that are no multiples of it, under
// three schedules, against the reference; and the kernels lose no synchronisation unnoticed.
import { test } from 'tap';
import { type Choice, keyOf, overrides, type ProductKind } from '../engine/cuda/plan_sm90.ts';
import { cudaDevice, type Device, openDevice } from '../engine/device.ts';
import { registry } from '../engine/op.ts';
import type { FloatDType } from '../io/dtype.ts';
import { type AnyRecord, type AnySample, relativeError, runOn } from './op_cases.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';
import { schedules } from './virtual-gpu/run_kernel.ts';

const reference = openDevice('reference');
const linear = registry.get('linear') as AnyRecord;

function linearSample(m: number, n: number, k: number, activation: string, more: readonly string[]): AnySample {
  const h = activation === 'geglu' ? 2 * n : n;
  const inputs: Record<string, number[]> = { x: [m, k], weight: [h, k] };
  if (more.includes('bias')) inputs.bias = [h];
  if (more.includes('residual')) inputs.residual = [m, n];
  return { inputs, attrs: { activation } } as AnySample;
}

/** Has every product of a linear layer, forward and backward, use one tile. */
function force(choice: Choice, m: number, n: number, k: number, gated: boolean): void {
  overrides.clear();
  const put = (kind: ProductKind, size: readonly [number, number, number]) =>
    overrides.set(keyOf({ kind, m: size[0], n: size[1], steps: Math.ceil(size[2] / 64), slabs: 1 }), choice);
  const h = gated ? 2 * n : n;
  if (gated) put('geglu', [m, n, k]);
  put('nt', [m, h, k]);
  put('nn', [m, k, h]);
  put('tn', [h, k, m]);
}

function problem(device: Device, record: AnyRecord, sample: AnySample, dtype: FloatDType): string | undefined {
  const [want, got] = [reference, device].map((on) => runOn(on, record, sample, dtype));
  const all = { y: [got.y, want.y], ...Object.fromEntries(Object.keys(want.gradients).map((k) => [k, [got.gradients[k], want.gradients[k]]])) };
  const bad = Object.entries(all).map(([name, [g, w]]) => [name, relativeError(g, w)] as const).filter(([, e]) => !(e <= 3.1e-3));
  return bad.length ? bad.map(([name, e]) => `${name} ${e.toExponential(1)}`).join(', ') : undefined;
}

for (const schedule of schedules) {
  test(`linear layers, ${schedule.async} copies, ${schedule.order} order`, (t) => {
    for (const tile of ['256', '160', '160_pingpong', '80'] as const) {
      const device = cudaDevice(openVirtualGpu({ capability: [9, 0], schedule }));
      const [m, n, k] = [200, 168, 136];
      force({ tile, splits: 1 }, m, n, k, false);
      const s = performance.now();
      t.equal(problem(device, linear, linearSample(m, n, k, 'none', ['bias', 'residual']), 'bfloat16'), undefined, tile);
      console.log(tile, performance.now() - s);
    }
    t.end();
  });
}
