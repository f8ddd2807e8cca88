// `--tune`: each product of the UNet's linear layers by every tile and split, alone and in pairs, that its plan could choose.
// The fastest go into a table by the plan's own key, which `--choices` hands back to the plans in a later run.
import {
  type Choice,
  candidates,
  hopperTakes,
  keyOf,
  overrides,
  type ProductKind,
  type ProductSize,
} from '../../engine/cuda/plan_sm90.ts';
import { scope } from '../../engine/scope.ts';
import { UserError } from '../../io/errors.ts';
import { opCases } from '../ops.ts';
import type { BenchCase, Measure } from './gpu.ts';
import type { inType, Workshop } from './kernels.ts';
import type { BenchSection, Scale } from './shapes.ts';

/** A measured choice beside what the model of the plan would choose. */
export interface Tuned {
  key: string;
  choice: Choice;
  us: number;
  planned_us: number;
}

export type TunedMeasure = Measure & { tuned?: Tuned };

const STEP = 64;
const halves = { hopper: true, elementBytes: 2 } as const;
/** Pixels along a side at which the tiny model's layers have rows enough for two tiles, so that pairs are tried. */
const SMOKE_SIDE = 192;

/** The products of a linear layer [m, k] x [n, k]: forward, and with the gradients of x and of the weight. */
function productsOf(m: number, n: number, k: number, gated: boolean): ProductSize[] {
  const size = (kind: ProductKind, a: number, b: number, along: number): ProductSize => ({
    kind,
    ...{ m: a, n: b, steps: Math.ceil(along / STEP), slabs: 1 },
  });
  const forward = gated ? size('geglu', m, n / 2, k) : size('nt', m, n, k);
  return [forward, size('nn', m, k, n), size('tn', n, k, m)];
}

/** Whether a plan would look a product up: its operands have rows that TMA can walk. */
const isPlanned = ({ m, n }: ProductSize, layer: readonly number[]): boolean =>
  hopperTakes(m, n, halves) && layer.every((length) => length % 8 === 0);

/** Times one product by every candidate. */
function tune(shop: () => Workshop, size: ProductSize, launch: (shop: Workshop) => TuneRun): BenchCase {
  const label = keyOf(size);
  return {
    label,
    run(): TunedMeasure {
      const opened = shop();
      const { timer } = opened;
      const { run, release } = launch(opened);
      const timeOf = (choice: Choice | undefined) => {
        if (choice) overrides.set(label, choice);
        else overrides.delete(label);
        return timer.time(1, run, 10);
      };
      const planned = timeOf(undefined);
      const all = candidates(size, size.kind !== 'geglu').map((choice) => ({
        choice,
        timing: timeOf(choice),
      }));
      overrides.delete(label);
      release();
      const [best] = all.sort((a, b) => a.timing.us - b.timing.us);
      const tuned = { key: label, choice: best.choice, us: best.timing.us, planned_us: planned.us };
      const { tile, splits, paired } = best.choice;
      const name = `${label}: tile ${tile}${paired ? ' in pairs' : ''}, ${splits} splits; as planned ${planned.us.toFixed(1)} us`;
      const flops = 2 * size.m * size.n * size.steps * STEP * (size.kind === 'geglu' ? 2 : 1);
      return { name, key: { product: label }, timing: best.timing, flops, tuned };
    },
  };
}

interface TuneRun {
  run(): void;
  release(): void;
}

export function tuneSection(shop: () => Workshop, { preset, side, smoke }: Scale): BenchSection {
  return {
    name: 'tune',
    cases() {
      const [width, height] = smoke ? [SMOKE_SIDE, SMOKE_SIDE] : [side, side];
      const sizes = { width, height, batch: 2 };
      const layers = opCases(preset, sizes, 'bfloat16', ['unet']).filter(
        ({ record }) => record.name === 'linear',
      );
      const found = new Map<string, BenchCase>();
      for (const layer of layers) {
        const { x, weight } = layer.inputs;
        const [rows, k] = weight.shape;
        const m = x.shape.reduce((a, b) => a * b, 1) / k;
        const gated = (layer.attrs as { activation: string }).activation === 'geglu';
        productsOf(m, rows, k, gated).forEach((size, i) => {
          const key = keyOf(size);
          if (!found.has(key) && isPlanned(size, [rows, k]))
            found.set(
              key,
              tune(shop, size, (opened) => linearRun(opened, layer, i)),
            );
        });
      }
      const cases = [...found.values()];
      const kindOf = ({ label }: BenchCase) => label.split(' ')[0];
      return smoke
        ? cases.filter((each, i) => cases.findIndex((other) => kindOf(other) === kindOf(each)) === i)
        : cases;
    },
  };
}

/** Product 0 of a layer is its forward, 1 the gradient of x, 2 that of the weight. */
function linearRun({ gpu, buffers }: Workshop, layer: ReturnType<typeof inType>, product: number): TuneRun {
  const { device } = gpu;
  if (Number((device.driver as { capability?: number }).capability) !== 90)
    throw new UserError('tiles are chosen by measurement for compute capability 9.0 alone');
  const { record, inputs, attrs } = layer;
  const made = Object.fromEntries(
    Object.entries(inputs).map(([name, spec]) => [name, buffers.random(spec, name === 'weight' ? 0.02 : 1)]),
  );
  for (const [name, spec] of Object.entries(record.outputs(made, attrs))) made[name] = buffers.empty(spec);
  if (product > 0) {
    made.dy = buffers.random(made.y);
    const name = product === 1 ? 'x' : 'weight';
    made[`d${name}`] = buffers.empty(inputs[name]);
  }
  return {
    run: () => scope(() => device.execute(record, product ? 'backward' : 'forward', made, attrs)),
    release() {
      for (const t of Object.values(made)) t.release();
      device.memory.trim();
    },
  };
}

/** The table of a tuning run, and back. */
export const choicesOf = (tuned: readonly Tuned[]): Record<string, Choice> =>
  Object.fromEntries(tuned.map(({ key, choice }) => [key, choice]));

export function useChoices(table: Readonly<Record<string, Choice>>): void {
  for (const [key, choice] of Object.entries(table)) overrides.set(key, choice);
}
