// One model's forward pass: median time, rate, memory, and which ops the time went to.
import type { Device } from '../engine/device.ts';
import { type OpCall, profiled } from '../engine/profile.ts';
import type { FloatDType } from '../io/dtype.ts';
import { presets } from '../models/presets.ts';
import { buildSubject, type Sizes, type SubjectName } from './subjects.ts';
import { stopwatch, type Timing, timingOf } from './timing.ts';

export interface OpShare {
  op: string;
  calls: number;
  /** Per forward pass, and as a part of it. */
  seconds: number;
  share: number;
}

export interface ForwardReport extends Sizes {
  subject: SubjectName;
  preset: string;
  dtype: FloatDType;
  device: string;
  parameters: number;
  seconds: Timing;
  /** Of the matrix products, convolutions and attention of one pass. */
  flops: number;
  tflops_per_second: number;
  /** Bytes of tensors at most, and of the whole process. */
  peak_bytes: number;
  peak_process_bytes: number;
  ops: OpShare[];
}

export interface ForwardOptions extends Sizes {
  preset: string;
  dtype: FloatDType;
  runs: number;
  onRun?: (run: number) => void;
}

/** Runs `subject` once to warm up and `runs` times for the record. */
export function benchForward(subject: SubjectName, options: ForwardOptions, device: Device): ForwardReport {
  const { preset, width, height, batch, dtype, runs, onRun } = options;
  let calls: OpCall[] = [];
  const watched = profiled(device, (call) => calls.push({ ...call, tensors: {} }));
  let flops = 0;
  const counted = profiled(watched, ({ record, tensors, attrs }) => {
    flops += record.flops?.(tensors, attrs) ?? 0;
  });
  const sizes = { width, height, batch };
  const model = buildSubject(subject, presets[preset], sizes, counted, dtype);
  model.run();
  onRun?.(0);
  flops = 0;
  calls = [];
  const seconds: number[] = [];
  for (let run = 1; run <= runs; run++) {
    seconds.push(stopwatch(() => model.run()));
    onRun?.(run);
  }
  model.release();
  device.memory.trim();
  const timing = timingOf(seconds);
  const total = seconds.reduce((sum, s) => sum + s, 0);
  return {
    subject,
    preset,
    ...sizes,
    dtype,
    device: device.name,
    parameters: model.parameters,
    seconds: timing,
    flops: flops / runs,
    tflops_per_second: flops / runs / timing.median / 1e12,
    peak_bytes: device.memory.peak,
    peak_process_bytes: process.resourceUsage().maxRSS * 1024,
    ops: shares(calls, total, runs),
  };
}

/** By op, the slowest first; what no op accounts for comes last. */
function shares(calls: readonly OpCall[], total: number, runs: number): OpShare[] {
  const found = new Map<string, OpShare>();
  for (const { record, seconds } of calls) {
    const entry = found.get(record.name) ?? { op: record.name, calls: 0, seconds: 0, share: 0 };
    found.set(record.name, entry);
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
