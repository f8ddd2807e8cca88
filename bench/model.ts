// One model's forward pass, or one update of its training: median time, rate, memory, and which ops the time went to.
import type { Device } from '../engine/device.ts';
import type { Tensors } from '../engine/op.ts';
import { type OpCall, profiled } from '../engine/profile.ts';
import type { FloatDType } from '../io/dtype.ts';
import { presets } from '../models/formats/presets.ts';
import { buildSubject, type Sizes, type SubjectName } from './subjects.ts';
import { stopwatch, type Timing, timingOf } from './timing.ts';
import { buildUpdate } from './update.ts';

export interface OpShare {
  op: string;
  calls: number;
  /** Per pass or update, and as a part of it. */
  seconds: number;
  share: number;
}

export interface ModelReport extends Sizes {
  subject: SubjectName | 'train';
  /** Of adapters, where they are what is trained. */
  lora_rank?: number;
  /** Whether the UNet's matrices are in 8-bit integers. */
  q8?: boolean;
  preset: string;
  dtype: FloatDType;
  device: string;
  /** Of the model; of a training run, those that are trained. */
  parameters: number;
  seconds: Timing;
  /** Of the matrix products, convolutions and attention of one pass or update, recomputed ones included. */
  flops: number;
  tflops_per_second: number;
  /** Bytes of tensors at most, and of the whole process. */
  peak_bytes: number;
  peak_process_bytes: number;
  ops: OpShare[];
}

export interface ModelOptions extends Sizes {
  preset: string;
  dtype: FloatDType;
  runs: number;
  loraRank?: number;
  q8?: boolean;
  onRun?: (run: number) => void;
}

/** Runs `subject` once to warm up and `runs` times for the record. */
export function benchModel(
  subject: SubjectName | 'train',
  options: ModelOptions,
  device: Device,
): ModelReport {
  const { preset, width, height, batch, dtype, runs, loraRank, q8, onRun } = options;
  // A device that queues its work is watched in a run of its own: waiting for each op would slow the timed ones.
  const apart = device.driver.synchronize !== undefined;
  let watching = !apart;
  let calls: OpCall[] = [];
  let flops = 0;
  const note = (call: OpCall) => {
    const { record, direction, tensors, attrs } = call;
    calls.push({ ...call, tensors: {} });
    if (record.flops)
      flops += record.flops(tensors, attrs) * (direction === 'backward' ? gradients(tensors) : 1);
  };
  const counted = profiled(device, note, () => watching);
  const sizes = { width, height, batch };
  const model =
    subject === 'train'
      ? buildUpdate(presets[preset], sizes, counted, dtype, { loraRank })
      : buildSubject(subject, presets[preset], { ...sizes, q8 }, counted, dtype);
  model.run();
  onRun?.(0);
  flops = 0;
  calls = [];
  const seconds: number[] = [];
  for (let run = 1; run <= runs; run++) {
    seconds.push(stopwatch(() => model.run(), device));
    onRun?.(run);
  }
  watching = true;
  const watched = apart ? [stopwatch(() => model.run(), device)] : seconds;
  model.release();
  device.memory.trim();
  const timing = timingOf(seconds);
  const total = watched.reduce((sum, s) => sum + s, 0);
  const each = flops / watched.length;
  return {
    subject,
    lora_rank: loraRank,
    q8,
    preset,
    ...sizes,
    dtype,
    device: device.name,
    parameters: model.parameters,
    seconds: timing,
    flops: each,
    tflops_per_second: each / timing.median / 1e12,
    peak_bytes: device.memory.peak,
    peak_process_bytes: process.resourceUsage().maxRSS * 1024,
    ops: shares(calls, total, watched.length),
  };
}

/** Forward's operations that a backward costs: one share for each operand's gradient; attention's three are two and a half. */
const gradients = (t: Tensors): number =>
  t.dq || t.dk || t.dv ? 2.5 : [t.dx, t.dweight, t.da, t.db].filter(Boolean).length;

/** By op, the slowest first; what no op accounts for comes last. */
function shares(calls: readonly OpCall[], total: number, runs: number): OpShare[] {
  const found = new Map<string, OpShare>();
  for (const { record, direction, seconds } of calls) {
    const op = direction === 'forward' ? record.name : `${record.name} backward`;
    const entry = found.get(op) ?? { op, calls: 0, seconds: 0, share: 0 };
    found.set(op, entry);
    entry.calls++;
    entry.seconds += seconds;
  }
  const ops = [...found.values()].sort((a, b) => b.seconds - a.seconds);
  const rest = total - ops.reduce((sum, { seconds }) => sum + seconds, 0);
  return [...ops, { op: 'outside ops', calls: 0, seconds: rest, share: 0 }].map((entry) => ({
    op: entry.op,
    calls: entry.calls / runs,
    seconds: entry.seconds / runs,
    share: entry.seconds / total,
  }));
}
