// `--tune`: each product of the UNet, forward and backward, by every tile and split, alone and in pairs, that its plan could
// choose. The fastest go into a table by the plan's own key, which `--choices` hands back to the plans in a later run. Which
// products there are the plans tell themselves: every launch is planned once on a GPU that only counts.
import type { CudaDriver } from '../../engine/cuda/device.ts';
import {
  type Choice,
  candidates,
  cycles,
  keyOf,
  type Lookup,
  lookupsOf,
  overrides,
} from '../../engine/cuda/plan_sm90.ts';
import type { Device, Direction } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import type { Launch, OpRecord, Spec, Tensors } from '../../engine/op.ts';
import { standInCuda } from '../../engine/profile.ts';
import { scope } from '../../engine/scope.ts';
import { empty } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import { type ModelPreset, presets } from '../../models/formats/presets.ts';
import { ContextCache } from '../../models/unet/context_cache.ts';
import { unet } from '../../models/unet/unet.ts';
import { casesOf, type OpCase } from '../ops.ts';
import { fillRandom } from '../pool_weights.ts';
import { unetInputs } from '../subjects.ts';
import { updateCases } from '../update.ts';
import type { BenchCase, Measure } from './gpu.ts';
import { prepare, release, type Workshop } from './kernels.ts';
import { type BenchSection, type Scale, SQUARE, square } from './shapes.ts';

/** A measured choice beside what the model of the plan would choose. */
export interface Tuned {
  key: string;
  choice: Choice;
  us: number;
  planned_us: number;
  /** What each candidate took: the numbers that the model is fitted to. */
  all: { choice: Choice; us: number }[];
}

export type TunedMeasure = Measure & { tuned?: Tuned };

interface Calls {
  readonly op: OpCase;
  readonly direction: Direction;
  /** So many calls of one x, which are one launch. */
  readonly together?: number;
}

/** A launch whose plan looks up a tile: the `index`-th of an op's direction. */
interface Product extends Lookup, Calls {
  readonly index: number;
}

const DTYPE = 'bfloat16';
/** The tiny model at a width and a size where each kind has a product with two tiles of rows, so that pairs are tried. */
const smokeModel: ModelPreset = {
  ...presets.tiny,
  unet: { ...presets.tiny.unet, block_out_channels: [16, 24, 160] },
};
const SMOKE_SIDE = 192;

/** Rows of a step under guidance, and of a pass of training. */
const SAMPLED = 2;
const TRAINED = 8;
/** Candidates that the model takes for so many times slower than its best are not timed, nor splits than the tile's best. */
const SLOWER = { best: 2, split: 1.05 };

const sizesOf = (side: number, batch: number) => ({ width: side, height: side, batch });

/** The UNet's calls as sampling makes them, with the image's part cached. */
const sampledCalls = (model: ModelPreset, side: number): OpCase[] =>
  casesOf((device) => {
    const module = unet(model.unet);
    fillRandom(module, device, DTYPE);
    const { sample, times, conditioning } = unetInputs(model, sizesOf(side, SAMPLED), device, DTYPE);
    noGrad(() => scope(() => void module(sample, times, { ...conditioning, cache: new ContextCache() })));
  });

/** Tensors for each of the calls that are made together. */
function tensorsOf(shop: Parameters<typeof prepare>[0], { op, direction, together = 1 }: Calls): Tensors[] {
  const first = prepare(shop, { op, direction });
  const others = Array.from({ length: together - 1 }, () => {
    const own = prepare(shop, { op, direction });
    own.x.release();
    return { ...own, x: first.x };
  });
  return [first, ...others];
}

/** An op's launches, each to be run alone over what a run of them all has left in the tensors. */
function launchesOf(
  device: Device,
  { op: { record, attrs }, direction, together }: Calls,
  sets: readonly Tensors[],
): (() => void)[] {
  const [tensors] = sets;
  const each = () => sets.forEach((own) => void device.execute(record, direction, own, attrs));
  if (together) return [() => device.together(each)];
  const calls: Parameters<Launch>[] = [];
  const noted: OpRecord<unknown> = {
    ...record,
    [direction](t: Tensors, own: unknown, launch: Launch) {
      record[direction]?.(t, own, (...call) => {
        calls.push(call);
        launch(...call);
      });
    },
  };
  device.execute(noted, direction, tensors, attrs);
  return calls.map((call) => {
    const alone: OpRecord<unknown> = { ...record, forward: (_t, _attrs, launch) => launch(...call) };
    return () => device.execute(alone, 'forward', tensors, attrs);
  });
}

/** Every product that plans for Hopper look up in the calls of sampling and of training `batch` images, by key. */
function productsOf(model: ModelPreset, side: number, batch: number): Map<string, Product> {
  const device = standInCuda();
  const made = ({ shape, dtype }: Spec) => empty(shape, { device, dtype });
  const shop = { gpu: { device }, buffers: { random: made, empty: made } };
  const found = new Map<string, Product>();
  const note = (op: OpCase, direction: Direction, together?: number) =>
    scope(() => {
      const calls = { op, direction, together };
      launchesOf(device, calls, tensorsOf(shop, calls)).forEach((launch, index) => {
        for (const lookup of lookupsOf(launch)) {
          const key = keyOf(lookup.size);
          if (!found.has(key)) found.set(key, { ...lookup, ...calls, index });
        }
      });
    });
  const isProduct = ({ record }: OpCase) => record.flops !== undefined;
  const together = (op: OpCase) => {
    if (isProjection(op)) note(op, 'forward', isSquare(op) ? 3 : 2);
  };
  note(square(SQUARE), 'forward');
  for (const op of sampledCalls(model, side).filter(isProduct)) {
    note(op, 'forward');
    together(op);
  }
  for (const op of updateCases(model, sizesOf(side, batch), DTYPE).filter(isProduct)) {
    note(op, 'forward');
    note(op, 'backward');
    together(op);
  }
  return found;
}

/** Attention's linear layers, which alone have no bias: q, k and v of one x, or k and v of the text. */
const isProjection = ({ record, inputs }: OpCase): boolean =>
  record.name === 'linear' && !inputs.bias && !inputs.residual;
const isSquare = ({ inputs: { weight } }: OpCase): boolean => weight.shape[0] === weight.shape[1];

/** The smallest product of each kind that may run in pairs. */
function smallest(products: ReadonlyMap<string, Product>): Map<string, Product> {
  const flops = ({ size: { m, n, steps, slabs } }: Product) => m * n * steps * slabs;
  const inPairs = [...products].filter(([, { size }]) =>
    candidates(size, false).some(({ paired }) => paired),
  );
  const sorted = inPairs.sort(([, a], [, b]) => flops(b) - flops(a));
  return new Map(new Map(sorted.map((entry) => [entry[1].size.kind, entry])).values());
}

/** Choices that the model does not take for much too slow. */
function likely({ size, canSplit }: Lookup, multiprocessors: number): Choice[] {
  const all = candidates(size, canSplit).map((choice) => {
    return { choice, time: cycles(size, choice, multiprocessors) };
  });
  const best = Math.min(...all.map(({ time }) => time));
  const bestOf = ({ tile, paired }: Choice) =>
    Math.min(
      ...all.filter(({ choice }) => choice.tile === tile && choice.paired === paired).map(({ time }) => time),
    );
  return all
    .filter(({ choice, time }) => time <= SLOWER.best * best && time <= SLOWER.split * bestOf(choice))
    .map(({ choice }) => choice);
}

/** Times one product by every likely candidate. */
function tune(shop: Workshop, key: string, product: Product): TunedMeasure {
  const { gpu, timer } = shop;
  const { op } = product;
  const { multiprocessors } = gpu.device.driver as CudaDriver;
  if ((gpu.device.driver as CudaDriver).capability !== 90)
    throw new UserError('tiles are chosen by measurement for compute capability 9.0 alone');
  const sets = tensorsOf(shop, product);
  const [planned, all] = scope(() => {
    const run = launchesOf(gpu.device, product, sets)[product.index];
    const time = () => timer.time(1, run, { samples: 10, restMs: 20 });
    overrides.delete(key);
    const planned = time();
    const all = likely(product, multiprocessors).map((choice) => {
      overrides.set(key, choice);
      return { choice, timing: time() };
    });
    overrides.delete(key);
    return [planned, all] as const;
  });
  for (const tensors of sets) release(tensors);
  gpu.device.memory.trim();
  const [{ choice, timing }] = all.sort((a, b) => a.timing.us - b.timing.us);
  const times = all.map((each) => ({ choice: each.choice, us: each.timing.us }));
  const tuned = { key, choice, us: timing.us, planned_us: planned.us, all: times };
  const { tile, splits, paired } = choice;
  const name = `${key}: tile ${tile}${paired ? ' in pairs' : ''}, ${splits} splits; as planned ${planned.us.toFixed(1)} us`;
  return {
    name,
    key: { product: key },
    timing,
    flops: op.flops * (product.together ?? 1),
    tuned,
  };
}

export function tuneSection(shop: () => Workshop, { preset, side, smoke }: Scale): BenchSection {
  return {
    name: 'tune',
    cases() {
      const products = smoke
        ? smallest(productsOf(smokeModel, SMOKE_SIDE, SAMPLED))
        : productsOf(presets[preset], side, TRAINED);
      return [...products].map(
        ([label, product]): BenchCase => ({
          label,
          run: () => tune(shop(), label, product),
        }),
      );
    },
  };
}

/** The table of a tuning run, and back. */
export const choicesOf = (tuned: readonly Tuned[]): Record<string, Choice> =>
  Object.fromEntries(tuned.map(({ key, choice }) => [key, choice]));

export function useChoices(table: Readonly<Record<string, Choice>>): void {
  for (const [key, choice] of Object.entries(table)) overrides.set(key, choice);
}
