// An op is one record: its shape rule, its forward and backward launches, and the plain loops that define it. The
// reference loops are at once the definition, the fallback device and the oracle that tests hold every kernel against.
// apply() is the only way an op runs, but for the steps of optimizers (update()): it allocates, executes, and notes on the tape
// what backward will need.
import type { DType } from '../io/dtype.ts';
import type { Device } from './device.ts';
import { isRecording, Node } from './grad.ts';
import { empty, ShapeError, type Tensor } from './tensor.ts';

export type Tensors = Record<string, Tensor>;
export type Inputs = Record<string, Tensor | undefined>;
/** Reference loops see plain arrays: Float32Array on the device, Float64Array in finite-difference tests. */
export type Numbers = Float32Array | Float64Array;
export interface RefTensor {
  shape: readonly number[];
  /** What it is stored in: optimizers round bfloat16 at random. Unknown where numbers are never stored. */
  dtype?: DType;
  data: Numbers;
}
/** By name: inputs, outputs, `dy`, and `d<input>` where that gradient is wanted (undefined otherwise). */
export type RefTensors = Record<string, RefTensor>;
export type Argument = Tensor | number | undefined;
/** Appends the storage dtype to `symbol` and runs it; undefined passes null. */
export type Launch = (symbol: string, args: readonly Argument[]) => void;
export interface Spec {
  shape: readonly number[];
  dtype: DType;
}

export interface Sample<A> {
  /** Input shapes; an absent optional input is left out. `ints` names an int32 input and its exclusive upper bound. */
  inputs: Record<string, readonly number[]>;
  attrs: A;
  ints?: Record<string, number>;
  /** Inputs that have this type whatever type is tested. */
  dtypes?: Record<string, DType>;
  /** Inputs that hold no negative numbers. */
  nonnegative?: readonly string[];
  /** Inputs whose gradient is not asked for. */
  frozen?: readonly string[];
}

export interface OpRecord<A> {
  readonly name: string;
  /** Shapes and types of the outputs, `y` first: the only one that carries a gradient. Throws ShapeError. */
  outputs(inputs: Tensors, attrs: A): Record<string, Spec>;
  /** Inputs and outputs that backward reads, besides `dy`. */
  readonly saves: readonly string[];
  /** Inputs that are added to the result as they are: their gradient is dy, which backward does not copy. */
  readonly passes?: readonly string[];
  /** The tensor whose dtype names the kernel, where it is not the main input. */
  readonly storage?: string;
  /** Floating-point operations of forward, a multiply-add counted as two; only the matrix families count theirs. */
  flops?(t: Tensors, attrs: A): number;
  /** Inputs that forward changes in place: a step of an optimizer. Such an op runs by update() and has no gradient. */
  readonly updates?: readonly string[];
  forward(t: Tensors, attrs: A, launch: Launch): void;
  /** Fills every `d<input>` that is present, those of `passes` apart. Absent where an op has no gradient. */
  backward?(t: Tensors, attrs: A, launch: Launch): void;
  readonly reference: {
    forward(t: RefTensors, attrs: A): void;
    backward?(t: RefTensors, attrs: A): void;
  };
  readonly samples: readonly Sample<A>[];
}

// biome-ignore lint/suspicious/noExplicitAny: attributes differ from record to record; whoever loops passes each its own samples'.
export type AnyRecord = OpRecord<any>;

/** Whether backward computes this input's gradient. */
export const isComputed = ({ passes }: Pick<OpRecord<unknown>, 'passes'>, input: string): boolean =>
  !passes?.includes(input);

/** An op's forward over tensors that are all there. */
export interface Call {
  readonly record: AnyRecord;
  readonly tensors: Tensors;
  readonly attrs: unknown;
}

/** Every op, by name: tests and benchmarks loop over it. */
export const registry = new Map<string, AnyRecord>();

export function defineOp<A>(record: OpRecord<A>): OpRecord<A> {
  if (registry.has(record.name)) throw new Error(`op ${record.name} is defined twice`);
  registry.set(record.name, record);
  return record;
}

/** Runs an op on its inputs' device and returns its first output. */
export function apply<A>(record: OpRecord<A>, inputs: Inputs, attrs: A): Tensor {
  const [present, device] = presentOn(record.name, inputs);
  const specs = record.outputs(present, attrs);
  const outputs: Tensors = {};
  const tensors = { ...present };
  for (const name in specs) {
    const { shape, dtype } = specs[name];
    tensors[name] = outputs[name] = empty(shape, { device, dtype });
  }
  device.execute(record, 'forward', tensors, attrs);
  if (isRecording() && anyOnTape(present)) outputs.y.node = Node.ofOp(record, present, outputs, attrs);
  return outputs.y;
}

function anyOnTape(tensors: Tensors): boolean {
  for (const name in tensors) if (tensors[name].node) return true;
  return false;
}

/** One call of an op that changes its `updates` in place and has no outputs. */
export interface Update {
  readonly record: AnyRecord;
  readonly inputs: Inputs;
  readonly attrs: unknown;
}

export const updateOf = <A>(record: OpRecord<A>, inputs: Inputs, attrs: A): Update => ({
  record,
  inputs,
  attrs,
});

/** Runs updates that are independent of each other: no two change the same elements. A device may run many in one launch. */
export function update(updates: readonly Update[]): void {
  const byDevice = new Map<Device, Call[]>();
  for (const { record, inputs, attrs } of updates) {
    const [tensors, device] = presentOn(record.name, inputs);
    record.outputs(tensors, attrs);
    const calls = byDevice.get(device) ?? [];
    byDevice.set(device, calls);
    calls.push({ record, tensors, attrs });
  }
  for (const [device, calls] of byDevice) device.executeAll(calls);
}

/** The inputs that are there, and the one device that holds them all. */
function presentOn(op: string, inputs: Inputs): [Tensors, Device] {
  const present: Tensors = {};
  let device: Device | undefined;
  for (const name in inputs) {
    const t = inputs[name];
    if (!t) continue;
    present[name] = t;
    device ??= t.device;
    if (t.device !== device) throw new ShapeError(`${op}: inputs are on ${device.name} and ${t.device.name}`);
  }
  if (!device) throw new ShapeError(`${op} was given no tensor`);
  return [present, device];
}

/** Shared check: all named inputs hold one floating-point type, which is returned. */
export function sameFloat(op: string, inputs: Tensors, ...names: string[]): DType {
  const dtype = inputs[names[0]].dtype;
  for (const name of names) {
    const input = inputs[name];
    if (input && input.dtype !== dtype) {
      throw new ShapeError(`${op}: ${names[0]} is ${dtype}, ${name} is ${input.dtype}; cast one of them`);
    }
  }
  return dtype;
}
