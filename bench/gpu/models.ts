// Whole models on a GPU: the UNet's step under guidance as the host launches it and replayed from a graph, the VAE's decoder, the
// text encoders, a whole picture, and updates of training. Random weights: only their size and spread matter here.
import { join } from 'node:path';
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { unload } from '../../engine/module.ts';
import { profiled, standInDevice } from '../../engine/profile.ts';
import { unscoped } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import type { FloatDType } from '../../io/dtype.ts';
import { packageRoot } from '../../io/package_root.ts';
import type { ModelSource } from '../../models/checkpoint/checkpoint.ts';
import { type ModelPreset, presets } from '../../models/formats/presets.ts';
import { randomModel } from '../../models/formats/random_weights.ts';
import { decode, denoise, loadPipeline, type Pipeline } from '../../models/pipeline.ts';
import { TorchGenerator } from '../../models/random/torch_random.ts';
import { ContextCache } from '../../models/unet/context_cache.ts';
import { feedForwardToFp8 } from '../../models/unet/fp8.ts';
import { keepInQ8 } from '../../models/unet/q8.ts';
import { type UNet, unet } from '../../models/unet/unet.ts';
import { fillRandom } from '../pool_weights.ts';
import { buildSubject, type SubjectName, unetInputs } from '../subjects.ts';
import { median } from '../timing.ts';
import { buildUpdate } from '../update.ts';
import type { BenchCase, Timing } from './gpu.ts';
import type { Workshop } from './kernels.ts';
import type { BenchSection, Scale } from './shapes.ts';
import type { Timer } from './timer.ts';

type Shop = () => Workshop;

/** Runs of a whole model before those that are timed: two, of which the second is recorded, and a replay. */
const WARM = 3;
const RUNS = 12;
/** Where a run only proves the program, as few as do it. */
const runsOf = ({ smoke }: Scale, { warm = WARM, runs = RUNS } = {}) =>
  smoke ? { warm, runs: 1 } : { warm: WARM, runs };

interface Timed {
  timing: Timing;
  more: Record<string, number>;
}

/** Device time between events, the host's own time for the same runs, and a run's share of the wall clock. */
function timed(
  timer: Timer,
  device: Device,
  { warm, runs }: ReturnType<typeof runsOf>,
  work: () => void,
): Timed {
  device.memory.peak = device.memory.live;
  for (let i = 0; i < warm; i++) work();
  timer.sync();
  const walls: number[] = [];
  const started = performance.now();
  const timing = timer.events(runs, () => {
    const began = performance.now();
    work();
    walls.push(performance.now() - began);
  });
  const more = {
    host_ms: median(walls),
    wall_ms: (performance.now() - started) / runs,
    peak_gib: device.memory.peak / 2 ** 30,
  };
  return { timing, more };
}

/** Operations of the matrix products, convolutions and attention of one pass, walked on a device that computes nothing. */
function passFlops(name: SubjectName, { preset, side }: Scale, batch: number): number {
  let flops = 0;
  const device = profiled(standInDevice(), ({ record, tensors, attrs }) => {
    flops += record.flops?.(tensors, attrs) ?? 0;
  });
  const model = buildSubject(name, presets[preset], { width: side, height: side, batch }, device, 'bfloat16');
  model.run();
  model.release();
  return flops;
}

function subject(shop: Shop, name: SubjectName, batch: number, dtype: FloatDType, scale: Scale): BenchCase {
  const label = `${name} batch ${batch} ${dtype}, launched`;
  return {
    label,
    run() {
      const { gpu, timer } = shop();
      const { device } = gpu;
      const sizes = { width: scale.side, height: scale.side, batch };
      const flops = passFlops(name, scale, batch);
      const model = buildSubject(name, presets[scale.preset], sizes, device, dtype);
      const { timing, more } = timed(timer, device, runsOf(scale, { warm: 1 }), () => model.run());
      model.release();
      device.memory.trim();
      return { name: label, key: { subject: name, how: 'eager', batch }, timing, flops, more };
    },
  };
}

interface Replayed {
  /** As sampling has it, with the image's part cached. */
  cached?: boolean;
  /** What the shop has. */
  pdl?: boolean;
  /** Matrices as Q8_0, or the feed-forward layers' products in fp8. */
  weights?: 'q8' | 'fp8';
}

function randomUNet(preset: ModelPreset, device: Device, weights: Replayed['weights']): UNet {
  const module = unet(preset.unet);
  if (weights === 'q8') keepInQ8(module);
  fillRandom(module, device, 'bfloat16');
  if (weights === 'fp8') feedForwardToFp8(module);
  return module;
}

/** One step of the base UNet on two rows, from a graph. */
function replayed(
  shop: Shop,
  scale: Scale,
  { cached = false, pdl = true, weights }: Replayed = {},
): BenchCase {
  const marks = [cached && 'prompt and times cached', !pdl && 'without PDL', weights];
  const label = ['unet batch 2 bfloat16, replayed', ...marks.filter((mark) => mark)].join(', ');
  return {
    label,
    run() {
      const { gpu, timer } = shop();
      const { device } = gpu;
      const preset: ModelPreset = presets[scale.preset];
      const module = randomUNet(preset, device, weights);
      const sizes = { width: scale.side, height: scale.side, batch: 2 };
      const { sample, times, conditioning, release } = unetInputs(preset, sizes, device, 'bfloat16');
      const cache = cached ? new ContextCache() : undefined;
      const first = unscoped(() => tensor([0], [1], { device, dtype: 'int32' }));
      const when = cached ? { times: times.reshape(1, 2), step: first } : times;
      const step = device.step(() => noGrad(() => module(sample, when, { ...conditioning, cache })));
      let output: Tensor | undefined;
      const work = () =>
        step.run((y) => {
          output = y;
        });
      const { timing, more } = timed(timer, device, runsOf(scale), work);
      const finite = (output as Tensor).floats().every(Number.isFinite);
      step.release();
      cache?.release();
      unload(module);
      first.release();
      release();
      device.memory.trim();
      const kind = { ...(cached && { cached }), ...(pdl ? {} : { pdl }), ...(weights && { weights }) };
      const key = { subject: 'unet', how: 'graph', batch: 2, ...kind };
      const flops = cached ? undefined : passFlops('unet', scale, 2);
      const problem = finite ? {} : { problem: 'the output is not finite' };
      return { name: label, key, timing, flops, more, ...problem };
    },
  };
}

/** With the VAE in the type of the UNet, as a pipeline has it, or in float32. */
function picture(shop: Shop, scale: Scale, vaeDtype: FloatDType): BenchCase {
  const steps = scale.smoke ? 2 : 30;
  const label = `image, ${steps} steps, guidance 5, VAE in ${vaeDtype}`;
  return {
    label,
    run() {
      const { gpu, timer } = shop();
      const { device } = gpu;
      const pipeline = randomPipeline(presets[scale.preset], device, vaeDtype);
      const draw = (count: number) => {
        const began = performance.now();
        const loop = denoise(pipeline, {
          prompt: ['a red fox in the snow'],
          ...{ height: scale.side, width: scale.side, num_inference_steps: count, guidance_scale: 5 },
          generators: [new TorchGenerator(1)],
        });
        let turn = loop.next();
        while (!turn.done) turn = loop.next();
        timer.sync();
        const denoised = performance.now();
        const pictures = decode(pipeline, turn.value.latents);
        const ended = performance.now();
        return {
          all: ended - began,
          decoding: ended - denoised,
          finite: pictures.every(({ finite }) => finite),
        };
      };
      const first = draw(steps);
      const all = scale.smoke ? [first] : Array.from({ length: 5 }, () => draw(steps));
      pipeline.release();
      device.memory.trim();
      const us = all.map((each) => each.all * 1000).sort((a, b) => a - b);
      const timing = { us: median(us), p10: us[0], p90: us[us.length - 1], samples: us.length, drift_pct: 0 };
      const more = {
        first_ms: first.all,
        vae_ms: median(all.map(({ decoding }) => decoding)),
        peak_gib: device.memory.peak / 2 ** 30,
      };
      const problem = all.every(({ finite }) => finite) ? {} : { problem: 'the picture is not finite' };
      return { name: `${label}, wall clock`, key: { subject: 'image', steps }, timing, more, ...problem };
    },
  };
}

/** A pipeline of this preset, its weights from the benchmarks' pool: drawing 3.5 billion numbers would take minutes. */
function randomPipeline(preset: ModelPreset, device: Device, vaeDtype: FloatDType): Pipeline {
  const source: ModelSource = {
    ...randomModel(preset, { seed: 0, tokenizers: join(packageRoot, 'assets', 'emoji') }),
    load: (_, module, on, dtype) => fillRandom(module, on, dtype),
  };
  return loadPipeline(source, { device, dtype: 'bfloat16', vaeDtype });
}

function training(
  shop: Shop,
  scale: Scale,
  batch: number,
  { checkpointing = false, loraRank }: { checkpointing?: boolean; loraRank?: number },
): BenchCase {
  const trained = loraRank ? `, LoRA of rank ${loraRank}` : '';
  const label = `train batch ${batch} bfloat16 AdamW${trained}, ${checkpointing ? 'checkpointed' : 'no checkpointing'}`;
  return {
    label,
    run() {
      const { gpu, timer } = shop();
      const { device } = gpu;
      const preset = presets[scale.preset];
      const sizes = { width: scale.side, height: scale.side, batch };
      const options = { optimizer: 'adamw', checkpointing, loraRank } as const;
      const update = buildUpdate(preset, sizes, device, 'bfloat16', options);
      const { timing, more } = timed(timer, device, runsOf(scale, { warm: 2, runs: 6 }), () => update.run());
      update.release();
      device.memory.trim();
      // Forward and two products backward, one where only adapters train; what checkpointing computes again is not counted.
      const flops = (loraRank ? 2 : 3) * passFlops('unet', scale, batch);
      const images_per_s = (batch * 1e6) / timing.us;
      return {
        name: label,
        key: { subject: 'train', batch, ckpt: checkpointing, ...(loraRank && { lora: loraRank }) },
        timing,
        flops,
        more: { ...more, images_per_s },
      };
    },
  };
}

/** `plain` is a shop without programmatic dependent launch, where the UNet's step is to be timed there too. */
export function modelSections(shop: Shop, scale: Scale, plain?: Shop): BenchSection[] {
  const batches = scale.smoke ? [1] : [1, 4, 8];
  return [
    {
      name: 'unet',
      cases: () => [
        replayed(shop, scale),
        replayed(shop, scale, { cached: true }),
        ...(plain ? [replayed(plain, scale, { cached: true, pdl: false })] : []),
        replayed(shop, scale, { cached: true, weights: 'fp8' }),
        replayed(shop, scale, { cached: true, weights: 'q8' }),
        subject(shop, 'unet', 2, 'bfloat16', scale),
      ],
    },
    {
      name: 'vae',
      cases: () => (['float32', 'bfloat16'] as const).map((dtype) => subject(shop, 'vae', 1, dtype, scale)),
    },
    { name: 'text', cases: () => [subject(shop, 'text', 2, 'bfloat16', scale)] },
    {
      name: 'image',
      cases: () => (['float32', 'bfloat16'] as const).map((dtype) => picture(shop, scale, dtype)),
    },
    {
      name: 'train',
      cases: () => [
        ...batches.map((batch) => training(shop, scale, batch, { checkpointing: true })),
        ...batches.map((batch) => training(shop, scale, batch, {})),
        training(shop, scale, 1, { loraRank: 16 }),
      ],
    },
  ];
}
