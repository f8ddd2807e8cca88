// A device: a driver, its memory pool, and how an op record runs on it. `cpu` launches the native kernels, `cuda:N` PTX on
// the N-th NVIDIA GPU; `reference` runs the record's own loops in TypeScript and needs no compiler.
import type { DType } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { eagerStep, type Observe, recordedStep, type Step } from './capture.ts';
import { findLibrary } from './cpu/build.ts';
import { openCpuDriver } from './cpu/driver.ts';
import type { GpuApi } from './cuda/api.ts';
import { openCudaDriver } from './cuda/device.ts';
import { CudaError } from './cuda/errors.ts';
import { openCudaLibrary } from './cuda/libcuda.ts';
import type { Driver } from './driver.ts';
import { MemoryPool, type Reserve } from './memory.ts';
import type { Argument, Call, Launch, OpRecord, Tensors } from './op.ts';
import { referenceDevice } from './reference.ts';
import type { Tensor } from './tensor.ts';
import { Together } from './together.ts';

export type DeviceName = 'cpu' | 'reference' | 'stand-in' | `cuda:${number}`;
export type Direction = 'forward' | 'backward';

export interface Device {
  readonly name: DeviceName;
  readonly driver: Driver;
  readonly memory: MemoryPool;
  /** Runs one direction of an op over tensors that are all allocated. */
  execute<A>(record: OpRecord<A>, direction: Direction, tensors: Tensors, attrs: A): void;
  /** Runs the forward of independent calls, in fewer launches where it can. */
  executeAll(calls: readonly Call[]): void;
  /** Runs `fn`, and launches its ops together where none needs another's result. When this returns, all are launched. */
  together<R>(fn: () => R): R;
  /** sum = a + b, for gradients that reach a tensor twice; sum may be one of them. */
  add(sum: Tensor, a: Tensor, b: Tensor): void;
  /**
   * `fn` as a step that runs many times over the same tensors, recorded where the device can do that. All tensors in it are made
   * by ops. Steps that take turns may share memory.
   */
  step(fn: () => Tensor, shared?: Reserve): Step;
}

const opened = new Map<DeviceName, Device>();

const gpuPattern = /^cuda(?::(\d+))?$/;

/** The names in a list of devices: one of whatever kind, or several GPUs. @throws UserError for any other list */
export function deviceNames(list: string): string[] {
  const names = list.split(',');
  if (names.length === 1) return names;
  const gpus = names.map((name) => gpuPattern.exec(name));
  if (gpus.includes(null))
    throw new UserError(`"${list}": only GPUs work together; name them as in cuda:0,cuda:1`);
  const ordinals = gpus.map((gpu) => Number(gpu?.[1] ?? 0));
  if (new Set(ordinals).size < ordinals.length) throw new UserError(`"${list}" names a GPU twice`);
  return ordinals.map((ordinal) => `cuda:${ordinal}`);
}

const unknownDevice = (name: unknown): UserError =>
  new UserError(`unknown device "${name}"; the devices are auto, cpu, cuda, cuda:N and reference`);

/** Opens a device, or returns the one that is open; `auto` is the best that works, and warns of a better one that does not. */
export function openDevice(name: string, warn: (line: string) => void = console.warn): Device {
  if (typeof name !== 'string') throw unknownDevice(name);
  const gpu = gpuPattern.exec(name);
  if (gpu) {
    const ordinal = Number(gpu[1] ?? 0);
    return once(`cuda:${ordinal}`, () => cudaDevice(openCudaLibrary(), ordinal));
  }
  if (name.includes(','))
    throw new UserError(`"${name}": this takes one device; only training takes several GPUs`);
  if (name !== 'auto' && name !== 'cpu' && name !== 'reference') throw unknownDevice(name);
  if (name === 'reference') return once('reference', () => referenceDevice());
  const first = name === 'auto' && firstGpu(warn);
  if (first) return first;
  const library = findLibrary(warn);
  if ('path' in library) return once('cpu', () => nativeDevice(library.path));
  if (name === 'cpu')
    throw new UserError(`the cpu device has no kernel library: ${library.reason}; or use --device reference`);
  if (!opened.has('reference')) warn(`running on the slow reference device: ${library.reason}`);
  return once('reference', () => referenceDevice());
}

let noGpu = false;

/** cuda:0 where it can be used. Why a GPU cannot be used is told, but not that there is no driver or no GPU. */
function firstGpu(warn: (line: string) => void): Device | undefined {
  if (noGpu) return undefined;
  try {
    return once('cuda:0', () => cudaDevice(openCudaLibrary()));
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    noGpu = true;
    if (error instanceof CudaError && error.result !== 'CUDA_ERROR_NO_DEVICE')
      warn(`running on the CPU: ${error.message}`);
    return undefined;
  }
}

function once(name: DeviceName, open: () => Device): Device {
  return opened.get(name) ?? adopt(open());
}

/** Makes a device that the caller has opened the one that openDevice() gives under its name. */
export function adopt(device: Device): Device {
  opened.set(device.name, device);
  return device;
}

/** The native device over a library, for this machine's best instruction set or for `arch` (avx512, avx2, portable). */
export function nativeDevice(library: string, arch?: string): Device {
  const driver = openCpuDriver(library, arch);
  return kernelDevice('cpu', driver, new MemoryPool(driver));
}

/** The GPU `ordinal` behind a driver API: libcuda's, or the virtual GPU's in tests. */
export function cudaDevice(api: GpuApi, ordinal = 0): Device {
  const driver = openCudaDriver(api, ordinal);
  return kernelDevice(`cuda:${ordinal}`, driver, driver.memory);
}

/** A device that launches kernels by symbol. */
function kernelDevice(name: DeviceName, driver: Driver, memory: MemoryPool): Device {
  const launches = new Together(driver, () => memory.settle());
  memory.awaits = launches.awaits;
  let note: ((t: Tensor) => void) | undefined;
  const observe: Observe = (see, fn) => {
    note = see;
    try {
      fn();
    } finally {
      note = undefined;
    }
  };
  return {
    name,
    driver,
    memory,
    step(fn, shared) {
      return driver.capture ? recordedStep(this, observe, fn, shared) : eagerStep(fn);
    },
    execute(record, direction, tensors, attrs) {
      if (note) for (const t of Object.values(tensors)) note(t);
      const dtype = typeOf(record, tensors);
      const launch: Launch = (symbol, args) => launches.launch(`${symbol}_${dtype}`, args.map(address));
      const run = direction === 'forward' ? record.forward : record.backward;
      run?.(tensors, attrs, launch);
    },
    executeAll(calls) {
      const bySymbol = new Map<string, (bigint | number)[][]>();
      for (const { record, tensors, attrs } of calls) {
        const dtype = typeOf(record, tensors);
        record.forward(tensors, attrs, (symbol, args) => {
          const name = `${symbol}_${dtype}`;
          const list = bySymbol.get(name);
          if (list) list.push(args.map(address));
          else bySymbol.set(name, [args.map(address)]);
        });
      }
      for (const [symbol, list] of bySymbol) launches.launchAll(symbol, list);
    },
    together: (fn) => launches.gather(fn),
    add(sum, a, b) {
      // Not noted: a handle more, and the next sum would not be made in place, as it was in the run before a recording.
      const addresses = [sum, a, b].map(({ block }) => block.address);
      launches.launch(`add_forward_${sum.dtype}`, [...addresses, sum.size]);
    },
  };
}

const address = (argument: Argument): bigint | number =>
  argument === undefined ? 0n : typeof argument === 'number' ? argument : argument.block.address;

/** The type in a kernel's name: the main input's, where a record names no other (mean, rstd and losses are float32 beside it). */
function typeOf({ storage }: { storage?: string }, t: Tensors): DType {
  return (storage ? t[storage] : (t.x ?? t.q ?? t.a ?? t.x0 ?? t.prediction ?? t.weight ?? t.dy)).dtype;
}
