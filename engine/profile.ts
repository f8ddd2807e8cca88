// Watching a device at work. profiled() is the same device with a stopwatch around each op; a stand-in device allocates
// and computes nothing, so a model run on it tells every op, shape and byte that the real run would need.
import { eagerStep } from './capture.ts';
import type { CudaDriver } from './cuda/device.ts';
import { anyHopper, type StandInGpu, standInApi } from './cuda/stand_in.ts';
import { cudaDevice, type Device, type Direction } from './device.ts';
import type { Block } from './driver.ts';
import { MemoryPool } from './memory.ts';
import type { AnyRecord, Tensors } from './op.ts';

/** One op as it ran. `tensors` holds inputs and outputs by name; only their shapes and types outlive the call. */
export interface OpCall {
  record: AnyRecord;
  direction: Direction;
  tensors: Tensors;
  attrs: unknown;
  seconds: number;
}

/**
 * `device` that tells `note` of every op it has run. Make all tensors on the returned device. A device that queues its work is
 * waited for after each op, which takes its time; `isOn` can switch the watching off.
 */
export const profiled = (device: Device, note: (call: OpCall) => void, isOn = () => true): Device => ({
  ...device,
  step: eagerStep,
  together: (fn) => (isOn() ? fn() : device.together(fn)),
  execute(record, direction, tensors, attrs) {
    if (!isOn()) return device.execute(record, direction, tensors, attrs);
    device.driver.synchronize?.();
    const began = performance.now();
    device.execute(record, direction, tensors, attrs);
    device.driver.synchronize?.();
    note({ record, direction, tensors, attrs, seconds: (performance.now() - began) / 1000 });
  },
  executeAll(calls) {
    if (!isOn()) return device.executeAll(calls);
    for (const { record, tensors, attrs } of calls) this.execute(record, 'forward', tensors, attrs);
  },
});

/** A device without memory or arithmetic: `memory.peak` is what the run would take, and every download reads zeros. */
export function standInDevice(): Device {
  const driver = {
    allocate: (bytes: number) => ({ bytes, address: 0n }),
    free() {},
    upload() {},
    download: (_block: Block, _offset: number, target: Uint8Array) => void target.fill(0),
    clear() {},
    launch() {},
  };
  return {
    name: 'stand-in',
    driver,
    memory: new MemoryPool(driver),
    step: eagerStep,
    together: (fn) => fn(),
    execute() {},
    executeAll() {},
    add() {},
  };
}

/** The cuda device on a GPU that counts memory alone: as the stand-in device, and with the workspaces of a GPU's plans. */
export const standInCuda = (gpu: StandInGpu = anyHopper): Device => ({
  ...cudaDevice(standInApi(gpu)),
  name: 'stand-in',
});

/** The stand-in that plans as `device` does. */
export function standInFor({ driver }: Device): Device {
  const { capability, multiprocessors } = driver as Partial<CudaDriver>;
  if (!capability || !multiprocessors) return standInDevice();
  const generation = [Math.floor(capability / 10), capability % 10] as const;
  return standInCuda({ ...anyHopper, capability: generation, multiprocessors });
}
