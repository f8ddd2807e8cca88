// The kernels that are timed, as sections: every matrix product, convolution, attention and norm of one UNet pass under
// guidance (batch 2), at the shapes that the model itself asks for, forward and backward; the VAE decoder's convolutions; a
// large square product; optimizer steps; copies. Keys are what a peer's measurement of the same call is found by.
import type { CudaDriver } from '../../engine/cuda/device.ts';
import type { Direction } from '../../engine/device.ts';
import { type OpRecord, registry, type Spec } from '../../engine/op.ts';
import { blocksOf } from '../../engine/ops/adamw_8bit.ts';
import { sizeOf } from '../../engine/tensor.ts';
import { bytesPerElement, type FloatDType } from '../../io/dtype.ts';
import { presets } from '../../models/formats/presets.ts';
import { type OpCase, opCases } from '../ops.ts';
import { updateCases } from '../update.ts';
import type { BenchCase, Key, Measure } from './gpu.ts';
import { inType, kernelCase, nameOf, type Workshop } from './kernels.ts';
import type { Section } from './sections.ts';

export interface Scale {
  readonly preset: string;
  /** Pixels along a side. */
  readonly side: number;
  /** Tiny shapes and few samples, to prove the program. */
  readonly smoke: boolean;
}

type Shop = () => Workshop;
export type BenchSection = Section<Measure>;

const DTYPE: FloatDType = 'bfloat16';
export const SQUARE = 8192;

interface LinearAttrs {
  activation?: string;
}
interface ConvAttrs {
  stride: number;
}
interface AttentionAttrs {
  heads: number;
}
interface NormAttrs {
  silu?: boolean;
}

/** The peer's names for the numbers that tell a call from others of its kind; its images come with the skip connection joined. */
function keyOf({ record, inputs, attrs }: OpCase, direction: Direction): Key {
  const shape = (name: string): readonly number[] => inputs[name]?.shape ?? [];
  const variant = direction === 'forward' ? 'fwd' : 'bwd';
  const rows = (x: readonly number[]) => sizeOf(x.slice(0, -1));
  if (record.name === 'linear' || record.name === 'linear_activated') {
    const [n, k] = shape('weight');
    const { activation = 'none' } = attrs as LinearAttrs;
    return { m: rows(shape('x')), n, k, bias: 'bias' in inputs, activation, variant };
  }
  if (record.name === 'conv2d') {
    const [b, h, w] = shape('x');
    const [cout, k, , c] = shape('weight');
    return { b, c, h, w, cout, k, stride: (attrs as ConvAttrs).stride, variant };
  }
  if (record.name === 'attention') {
    const [[b, lq, inner], [, lk]] = [shape('q'), shape('k')];
    const h = (attrs as AttentionAttrs).heads;
    return { b, h, lq, lk, d: inner / h, variant };
  }
  const x = shape('x');
  if (record.name === 'layer_norm' || record.name === 'geglu')
    return { m: rows(x), c: x.at(-1) as number, variant };
  const tokens = sizeOf(x.slice(1, -1));
  return { b: x[0], c: shape('weight')[0], tokens, silu: (attrs as NormAttrs).silu === true, variant };
}

const sectionOf: Record<string, string> = {
  linear: 'gemm',
  linear_activated: 'geglu',
  geglu: 'geglu',
  conv2d: 'conv',
  attention: 'attention',
  group_norm: 'norm',
  layer_norm: 'ln',
};

/** Sections of one UNet pass. */
function passSections(shop: Shop, { preset, side, smoke }: Scale): BenchSection[] {
  const sizes = { width: side, height: side, batch: 2 };
  const forward = once(() => opCases(preset, sizes, DTYPE, ['unet']));
  const trained = once(() => updateCases(presets[preset], sizes, DTYPE));
  const picked = (section: string, direction: Direction): OpCase[] => {
    const all = direction === 'forward' ? forward() : trained();
    const found = all.filter(({ record }) => sectionOf[record.name] === section);
    return smoke ? found.slice(0, 2) : found;
  };
  const cases = (section: string, direction: Direction): BenchCase[] =>
    picked(section, direction).map((op) =>
      kernelCase(shop, { op, direction, name: nameOf(op, direction), key: keyOf(op, direction) }),
    );
  const extra = (section: string): BenchCase[] =>
    section === 'gemm'
      ? [
          ...picked('gemm', 'forward').flatMap((call) => withoutResidual(shop, call)),
          squareCase(shop, smoke ? 64 : SQUARE),
        ]
      : section === 'conv'
        ? vaeCases(shop, 'conv2d', { preset, side, smoke })
        : section === 'norm'
          ? vaeCases(shop, 'group_norm', { preset, side, smoke })
          : [];
  const names = [...new Set(Object.values(sectionOf))];
  return [
    ...names.map((name) => ({ name, cases: () => [...cases(name, 'forward'), ...extra(name)] })),
    ...names.map((name) => ({ name: `${name} backward`, cases: () => cases(name, 'backward') })),
  ];
}

function once<T>(make: () => T): () => T {
  let made: T | undefined;
  return () => (made ??= make());
}

const op = (name: string) => registry.get(name) as OpRecord<unknown>;

/** A large product of no model, by which main loops are compared. */
export function square(side: number): OpCase {
  const shape = [side, side];
  const inputs = { x: { shape, dtype: DTYPE }, weight: { shape, dtype: DTYPE } };
  return { record: op('linear'), inputs, attrs: {}, count: 0, flops: 2 * side ** 3, bytes: 0 };
}

function squareCase(shop: Shop, side: number): BenchCase {
  const call = square(side);
  const [name, key] = [nameOf(call, 'forward'), keyOf(call, 'forward')];
  return kernelCase(shop, { op: call, direction: 'forward', name, key });
}

/** What a peer times beside a layer that adds a residual: the product and its bias alone. */
function withoutResidual(shop: Shop, call: OpCase): BenchCase[] {
  const { residual, ...inputs } = call.inputs;
  if (!residual) return [];
  const op = { ...call, inputs, count: 0 };
  return [
    kernelCase(shop, { op, direction: 'forward', name: nameOf(op, 'forward'), key: keyOf(op, 'forward') }),
  ];
}

/** An op's calls for one picture; the decoder runs in float32 by default, but they are timed as a peer times them. */
function vaeCases(shop: Shop, name: string, { preset, side, smoke }: Scale): BenchCase[] {
  const all = opCases(preset, { width: side, height: side, batch: 1 }, DTYPE, ['vae']).filter(
    ({ record }) => record.name === name,
  );
  return (smoke ? all.slice(0, 1) : all).map((each) => {
    const call = { ...inType(each, DTYPE), count: 0 };
    const key = keyOf(call, 'forward');
    return kernelCase(shop, { op: call, direction: 'forward', name: `vae ${nameOf(call, 'forward')}`, key });
  });
}

type Moments = 'float32' | 'bfloat16' | 'uint8';

/** What a step of AdamW over flat parameters reads and writes. */
function adamwInputs(count: number, dtype: FloatDType, moments: Moments): Record<string, Spec> {
  const shape = [count];
  const given = { weight: { shape, dtype }, gradient: { shape, dtype } };
  const moment = { shape, dtype: moments };
  if (moments !== 'uint8') return { ...given, exp_avg: moment, exp_avg_sq: moment };
  const largest = { shape: [blocksOf(count)], dtype: 'float32' } as const;
  return { ...given, state1: moment, state2: moment, absmax1: largest, absmax2: largest };
}

/** AdamW over flat parameters, its moments in floats or a byte each. */
function adamw(shop: Shop, count: number, dtype: FloatDType, moments: Moments): BenchCase {
  const inputs = adamwInputs(count, dtype, moments);
  const label = `adamw ${(count / 1e6).toFixed(0)}M ${dtype}, moments in ${moments}`;
  return {
    label,
    run() {
      const { gpu, timer, buffers } = shop();
      const tensors = Object.fromEntries(
        Object.entries(inputs).map(([name, spec]) => [
          name,
          // Bytes name one of 256 values.
          buffers.random(
            spec,
            spec.dtype === 'uint8' ? 60 : name === 'weight' ? 1 : 1e-2,
            name === 'weight' || name === 'gradient' || name === 'exp_avg',
          ),
        ]),
      );
      const attrs = {
        lr: 1e-5,
        weightDecay: 1e-2,
        gradientScale: 1,
        betas: [0.9, 0.999],
        eps: 1e-8,
        step: 10,
        rounding: moments === 'bfloat16' ? { seedLow: 1, seedHigh: 2, stream: 3 } : undefined,
      };
      const record = op(moments === 'uint8' ? 'adamw_8bit' : 'adamw');
      // Each step brings its table of parameters to the device, which no graph holds.
      const step = () => gpu.device.execute(record, 'forward', tensors, attrs);
      step();
      const timing = timer.events(50, step);
      for (const t of Object.values(tensors)) t.release();
      gpu.device.memory.trim();
      // Weight and moments are read and written, the gradient read.
      const bytes = count * (3 * bytesPerElement[dtype] + 4 * bytesPerElement[moments]);
      return { name: label, key: { params: count, dtype }, timing, bytes };
    },
  };
}

/** Device memory copied by the driver, read and written; and what one more launch costs. */
function copies(shop: Shop, { smoke }: Scale): BenchCase[] {
  const copy = (mib: number): BenchCase => ({
    label: `copy ${mib} MiB`,
    run() {
      const { gpu, timer, buffers } = shop();
      const { stream } = gpu.device.driver as CudaDriver;
      const size = mib * 2 ** 20;
      const spec = { shape: [size / 4], dtype: 'float32' } as const;
      const sets = Array.from({ length: timer.setsFor(2 * size) }, () => [
        buffers.random(spec),
        buffers.empty(spec),
      ]);
      const timing = timer.time(sets.length, (set) => {
        const [from, to] = sets[set].map((t) => t.block.address);
        gpu.api.cuMemcpyDtoDAsync(to, from, size, stream);
      });
      for (const t of sets.flat()) t.release();
      gpu.device.memory.trim();
      return { name: `copy ${mib} MiB`, key: { mib }, timing, bytes: 2 * size };
    },
  });
  const elementwise = (name: string, count: number): BenchCase => ({
    label: `${name}, ${count} elements`,
    run() {
      const { gpu, timer, buffers } = shop();
      const spec = { shape: [count], dtype: DTYPE };
      const sets = Array.from({ length: timer.setsFor(4 * count) }, () => {
        const x = buffers.random(spec);
        return { x, y: buffers.empty(spec) };
      });
      const record = op('silu');
      const timing = timer.time(sets.length, (set) => gpu.device.execute(record, 'forward', sets[set], {}));
      for (const { x, y } of sets) {
        x.release();
        y.release();
      }
      gpu.device.memory.trim();
      return { name: `${name}, ${count} elements`, key: { count }, timing, bytes: 4 * count };
    },
  });
  const sizes = smoke ? [1] : [64, 512, 4096];
  return [...sizes.map(copy), elementwise('silu', smoke ? 4096 : 2 ** 27), elementwise('launch of silu', 64)];
}

export const kernelSections = (shop: Shop, scale: Scale): BenchSection[] => [
  { name: 'copy', cases: () => copies(shop, scale) },
  ...passSections(shop, scale),
  {
    name: 'adamw',
    cases: () =>
      (
        [
          ['bfloat16', 'bfloat16'],
          ['bfloat16', 'float32'],
          ['bfloat16', 'uint8'],
          ['float32', 'float32'],
          ['float32', 'uint8'],
        ] as const
      ).flatMap(([dtype, moments]) =>
        (scale.smoke ? [5000] : [1e8, 5e8, 1e9]).map((count) => adamw(shop, count, dtype, moments)),
      ),
  },
];
