// The matrix products on Hopper's own instructions, on the virtual GPU: each tile at shapes that are no multiples of it, under
// three schedules, against the reference; no synchronisation of the kernels can be taken away unnoticed. One multiprocessor
// makes a block take all items in turn, so that the ring goes round.
import { test } from 'tap';
import { keyOf, overrides, type ProductKind, type TileName, tilesOf } from '../engine/cuda/plan_sm90.ts';
import { cudaDevice, openDevice } from '../engine/device.ts';
import { registry } from '../engine/op.ts';
import type { FloatDType } from '../io/dtype.ts';
import { type AnyRecord, type AnySample, gpuErrors } from './op_cases.ts';
import { openVirtualGpu } from './virtual-gpu/gpu.ts';
import { schedules } from './virtual-gpu/run_kernel.ts';

const gpu = openVirtualGpu({ capability: [9, 0], multiprocessors: 1 });
const device = cudaDevice(gpu);
const reference = openDevice('reference');

/** Results and gradients that are not the reference's. */
function problem(op: string, sample: AnySample, dtype: FloatDType): string | undefined {
  const errors = gpuErrors(device, reference, registry.get(op) as AnyRecord, sample, dtype);
  const bad = errors.filter(({ error, bound }) => !(error <= bound));
  return bad.length
    ? bad.map(({ name, error }) => `${name} ${error.toExponential(1)}`).join(', ')
    : undefined;
}

interface Product {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly activation?: string;
  readonly extras?: readonly ('bias' | 'residual')[];
  readonly splits?: number;
}

/** Has a product use a tile, where its kind comes in it. */
function force(
  tile: TileName,
  splits: number,
  kind: ProductKind,
  [m, n, steps, slabs = 1]: readonly number[],
): void {
  if (tilesOf[kind].includes(tile)) overrides.set(keyOf({ kind, m, n, steps, slabs }), { tile, splits });
}

/** A linear layer, each of whose products uses the tile. */
function linearCase(tile: TileName, p: Product): AnySample {
  const { m, n, k, activation = 'none', extras = [], splits = 1 } = p;
  const gated = activation === 'geglu';
  const h = gated ? 2 * n : n;
  overrides.clear();
  const steps = (depth: number) => Math.ceil(depth / 64);
  force(tile, 1, 'geglu', [m, n, steps(k)]);
  force(tile, splits, 'nt', [m, h, steps(k)]);
  force(tile, splits, 'nn', [m, k, steps(h)]);
  force(tile, splits, 'tn', [h, k, steps(m)]);
  return {
    inputs: {
      ...{ x: [m, k], weight: [h, k] },
      ...(extras.includes('bias') ? { bias: [h] } : {}),
      ...(extras.includes('residual') ? { residual: [m, n] } : {}),
    },
    attrs: { activation },
  };
}

type Padding = readonly [top: number, left: number, bottom: number, right: number];
interface Convolution {
  readonly x: readonly [n: number, h: number, w: number, c: number];
  readonly o: number;
  readonly side: number;
  readonly stride: number;
  readonly padding: Padding;
  readonly extras?: readonly ('bias' | 'shift' | 'residual')[];
  readonly splits?: number;
}

/** A convolution, each of whose products uses the tile. */
function convolutionCase(tile: TileName, p: Convolution): AnySample {
  const [n, h, w, c] = p.x;
  const { o, side, stride, padding, extras = [], splits = 1 } = p;
  const [oh, ow] = [
    Math.floor((h + padding[0] + padding[2] - side) / stride) + 1,
    Math.floor((w + padding[1] + padding[3] - side) / stride) + 1,
  ];
  overrides.clear();
  const taps = side * side;
  force(tile, splits, 'forward', [n * oh * ow, o, taps * Math.ceil(c / 64)]);
  force(tile, splits, 'backward_x', [n * h * w, c, taps * Math.ceil(o / 64)]);
  force(tile, splits, 'backward_weight', [o, c, Math.ceil((n * oh * ow) / 64), taps]);
  const optional = { bias: [o], shift: [n, o], residual: [n, oh, ow, o] };
  const chosen = extras.map((name) => [name, optional[name]] as const);
  return {
    inputs: { x: p.x, weight: [o, side, side, c], ...Object.fromEntries(chosen) },
    attrs: { stride, padding },
  };
}

const images: readonly Convolution[] = [
  {
    x: [2, 9, 11, 72],
    o: 80,
    side: 3,
    stride: 1,
    padding: [1, 1, 1, 1],
    extras: ['bias', 'shift', 'residual'],
  },
  { x: [3, 13, 12, 40], o: 136, side: 3, stride: 2, padding: [0, 0, 1, 1], extras: ['bias'], splits: 2 },
  { x: [1, 10, 13, 200], o: 72, side: 1, stride: 1, padding: [0, 0, 0, 0], extras: ['shift'] },
];
const imageTiles: readonly TileName[] = ['256', '160', '160_pingpong', '128_pingpong'];

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

  test(`convolutions, ${schedule.async} copies, ${schedule.order} order`, (t) => {
    gpu.setSchedule(schedule);
    imageTiles.forEach((tile, i) => {
      const image = images[(turn + i) % 3];
      const dtype = (turn + i) % 2 ? 'float16' : 'bfloat16';
      const found = problem('conv2d', convolutionCase(tile, image), dtype);
      t.equal(found, undefined, `${tile} ${dtype} ${JSON.stringify(image)}`);
    });
    overrides.clear();
    t.end();
  });
});
