// A step that runs many times over the same tensors, such as one of denoising. Where the device can record its launches
// (a CUDA graph), the first run is eager, and loads kernels and fills caches; so is the second, which shows how much memory
// the step takes, and is recorded on memory set aside for it while the device is still at work on what was launched. All later
// ones are replays. Inputs are changed by uploading into them between runs.
import type { Device } from './device.ts';
import type { Demand, Replay, Reserve } from './memory.ts';
import { MemoryError } from './memory.ts';
import { keep, scope, unscoped } from './scope.ts';
import type { Tensor } from './tensor.ts';

export interface Step {
  /** Runs the step and hands its output to `read`; the tensor is void after that. */
  run<R>(read: (y: Tensor) => R): R;
  release(): void;
}

/** The function itself, again each time. */
export const eagerStep = (fn: () => Tensor): Step => ({
  run: (read) => scope(() => read(fn())),
  release() {},
});

interface Recorded {
  readonly replay: Replay;
  readonly memory: Reserve<Tensor>;
  /** Handles on every tensor from outside that the launches read: none may be freed while they can run. */
  readonly inputs: readonly Tensor[];
}

/** Calls `note` with the tensors of every op in `fn`. */
export type Observe = (note: (t: Tensor) => void, fn: () => void) => void;

/** `fn` as a step whose launches are recorded. */
export function recordedStep(device: Device, observe: Observe, fn: () => Tensor): Step {
  const eager = eagerStep(fn);
  let recorded: Recorded | undefined;
  let state: 'new' | 'warm' | 'replayed' | 'eager' | 'released' = 'new';
  /** The second run. */
  const runAndRecord = <R>(read: (y: Tensor) => R): R =>
    scope(() => {
      const { result: y, demand } = device.memory.metered(() => scope(fn));
      try {
        recorded = record(device, observe, fn, demand);
        state = 'replayed';
      } catch (error) {
        if (!(error instanceof MemoryError)) throw error;
        // A replay keeps its memory from others. Where that does not fit, the step goes on as it began.
        state = 'eager';
      }
      return read(y);
    });
  return {
    run(read) {
      if (state === 'released') throw new Error('a step was run after its release');
      if (state === 'new') {
        state = 'warm';
        return eager.run(read);
      }
      if (state === 'warm') return runAndRecord(read);
      if (!recorded) return eager.run(read);
      recorded.replay.launch();
      return read(recorded.memory.result);
    },
    release() {
      state = 'released';
      if (!recorded) return;
      recorded.replay.release();
      recorded.memory.result.release();
      recorded.memory.release();
      for (const input of recorded.inputs) input.release();
      recorded = undefined;
    },
  };
}

function record(device: Device, observe: Observe, fn: () => Tensor, demand: Demand): Recorded {
  const { driver, memory } = device;
  const inputs = new Map<unknown, Tensor>();
  const note = (t: Tensor) => {
    if (!memory.isReserved(t.block) && !inputs.has(t.block)) inputs.set(t.block, keep(t.handle()));
  };
  let replay: Replay | undefined;
  try {
    const reserve = memory.reserve(demand, () => {
      let y: Tensor | undefined;
      try {
        replay = driver.capture?.(() =>
          observe(note, () => {
            y = unscoped(() => scope(fn));
          }),
        );
        return y as Tensor;
      } catch (error) {
        y?.release();
        throw error;
      }
    });
    return { replay: replay as Replay, memory: reserve, inputs: [...inputs.values()] };
  } catch (error) {
    for (const input of inputs.values()) input.release();
    throw error;
  }
}
