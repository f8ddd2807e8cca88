// The matrix products on Hopper's own instructions, on the virtual GPU: each tile at shapes that are no multiples of it, under
// three schedules, against the reference; no synchronisation of the kernels can be taken away unnoticed. One multiprocessor
// makes a block take all items in turn, so that the ring goes round.
import { test } from 'tap';
import { keyOf, overrides, type ProductKind, type TileName } from '../engine/cuda/plan_sm90.ts';
import { cudaDevice, openDevice } from '../engine/device.ts';
import { registry } from '../engine/op.ts';
import type { FloatDType } from '../io/dtype.ts';
import { type AnyRecord, type AnySample, relativeError, runOn } from './op_cases.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';
import { schedules } from './virtual-gpu/run_kernel.ts';

const gpu = openVirtualGpu({ capability: [9, 0], multiprocessors: 1 });
const device = cudaDevice(gpu);
const reference = openDevice('reference');
const record = (name: string) => registry.get(name) as AnyRecord;

/** Names whose gradient or result is not the reference's. */
function problem(op: string, sample: AnySample, dtype: FloatDType): string | undefined {
  const [want, got] = [reference, device].map((on) => runOn(on, record(op), sample, dtype));
  const errors = Object.keys(want.gradients).map(
    (name) => [name, relativeError(got.gradients[name], want.gradients[name])] as const,
  );
  const bad = [...errors, ['y', relativeError(got.y, want.y)] as const].filter(
    ([name, e]) => !(e <= (name === 'y' ? 3.1e-3 : 5e-3)),
  );
  return bad.length ? bad.map(([name, e]) => `${name} ${e.toExponential(1)}`).join(', ') : undefined;
}

interface Product {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly activation?: string;
  readonly extras?: readonly ('bias' | 'residual')[];
  readonly splits?: number;
}

/** A linear layer, each of whose products uses the tile. */
function linearCase(tile: TileName, p: Product): AnySample {
  const { m, n, k, activation = 'none', extras = [], splits = 1 } = p;
  const gated = activation === 'geglu';
  const h = gated ? 2 * n : n;
  overrides.clear();
  const force = (kind: ProductKind, [rows, columns, depth]: readonly number[], parts: number) => {
    const size = { kind, m: rows, n: columns, steps: Math.ceil(depth / 64), slabs: 1 };
    overrides.set(keyOf(size), { tile, splits: parts });
  };
  if (gated) force('geglu', [m, n, k], 1);
  force('nt', [m, h, k], splits);
  force('nn', [m, k, h], splits);
  force('tn', [h, k, m], splits);
  return {
    inputs: {
      ...{ x: [m, k], weight: [h, k] },
      ...(extras.includes('bias') ? { bias: [h] } : {}),
      ...(extras.includes('residual') ? { residual: [m, n] } : {}),
    },
    attrs: { activation },
  };
}

const shapes: readonly Product[] = [
  { m: 200, n: 168, k: 136, extras: ['bias', 'residual'] },
  { m: 129, n: 64, k: 328, activation: 'gelu', extras: ['bias'], splits: 2 },
  { m: 72, n: 328, k: 64, activation: 'silu', extras: ['residual'] },
];
const gated: readonly Product[] = [
  { m: 150, n: 136, k: 72, activation: 'geglu', extras: ['bias', 'residual'] },
  { m: 64, n: 88, k: 200, activation: 'geglu' },
  { m: 130, n: 264, k: 64, activation: 'geglu', extras: ['bias'] },
];
const everyTile: readonly TileName[] = ['256', '160', '160_pingpong', '80'];

schedules.forEach((schedule, turn) => {
  test(`linear layers, ${schedule.async} copies, ${schedule.order} order`, (t) => {
    gpu.setSchedule(schedule);
    everyTile.forEach((tile, i) => {
      for (const [at, dtype] of [[turn + i, 'bfloat16'] as const, [turn + i + 1, 'float16'] as const]) {
        const shape = shapes[at % 3];
        const found = problem('linear', linearCase(tile, shape), dtype);
        t.equal(found, undefined, `${tile} ${dtype} ${JSON.stringify(shape)}`);
      }
    });
    for (const tile of ['256', '160_pingpong'] as const) {
      const shape = gated[turn];
      const found = problem('linear', linearCase(tile, shape), turn === 1 ? 'float16' : 'bfloat16');
      t.equal(found, undefined, `${tile} ${JSON.stringify(shape)}`);
    }
    overrides.clear();
    t.end();
  });
});
