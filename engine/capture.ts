// A step that runs many times over the same tensors, such as a denoising step. Where the device can record launches (a CUDA
// graph), the first run is eager: it loads kernels and fills caches. So is the second, which shows how much memory the step
// takes; the step is then recorded in memory set aside for it, while the device still works on what was launched. All later runs
// are replays. Inputs are changed by uploads between runs. When memory runs out, recordings give theirs up, and are made again
// later if the last one had paid.
import type { Device } from './device.ts';
import type { Replay } from './driver.ts';
import type { Reserve } from './memory.ts';
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
  readonly result: Tensor;
  /** Handles on every tensor from outside that the launches use: none may be freed while they can run. */
  readonly inputs: readonly Tensor[];
  replays: number;
}

/** Calls `note` with the tensors of every op in `fn`. */
export type Observe = (note: (t: Tensor) => void, fn: () => void) => void;

/** Replays after which a recording has surely paid: making it takes the host as long as two or three runs. */
const PAYS = 8;

/** `fn` as a step whose launches are recorded, in memory of its own or in what it shares with other steps. */
export function recordedStep(device: Device, observe: Observe, fn: () => Tensor, shared?: Reserve): Step {
  const reserve = shared ?? device.memory.openReserve();
  let recorded: Recorded | undefined;
  let state: 'new' | 'warm' | 'replayed' | 'eager' | 'released' = 'new';
  const drop = () => {
    if (!recorded) return;
    const dropped = recorded;
    recorded = undefined;
    state = dropped.replays < PAYS ? 'eager' : 'warm';
    release(device, dropped);
  };
  /** Only the step borrows: what `read` makes may outlive it, and the next recording would write over it. */
  const runEagerly = <R>(read: (y: Tensor) => R): R => scope(() => read(reserve.borrow(() => scope(fn))));
  /** The second run. */
  const runAndRecord = <R>(read: (y: Tensor) => R): R =>
    scope(() => {
      const { result: y, demand } = reserve.borrow(() => device.memory.metered(() => scope(fn)));
      try {
        recorded = reserve.record(demand, drop, () => record(device, observe, fn));
        state = 'replayed';
      } catch (error) {
        if (!(error instanceof MemoryError)) throw error;
        // A recording holds its memory for good. Where there is not enough, the step stays eager.
        state = 'eager';
        if (!shared) reserve.release();
      }
      return read(y);
    });
  return {
    run(read) {
      if (state === 'released') throw new Error('a step was run after its release');
      if (state === 'new') {
        state = 'warm';
        return runEagerly(read);
      }
      if (state === 'warm') return runAndRecord(read);
      const current = recorded;
      if (current && reserve.use(() => launched(current)))
        return reserve.use(() => scope(() => read(current.result)));
      drop();
      return runEagerly(read);
    },
    release() {
      drop();
      state = 'released';
      if (!shared) reserve.release();
    },
  };
}

function release({ driver }: Device, { replay, result, inputs }: Recorded): void {
  try {
    driver.synchronize?.(); // it may still be running
  } catch {
    // The device is lost: nothing runs there, and whoever lost it has told.
  }
  replay.release();
  for (const t of [result, ...inputs]) t.release();
}

/** Replays it, where there is memory for it. */
function launched(recorded: Recorded): boolean {
  try {
    recorded.replay.launch();
    recorded.replays++;
    return true;
  } catch (error) {
    if (error instanceof MemoryError) return false;
    throw error;
  }
}

function record(device: Device, observe: Observe, fn: () => Tensor): Recorded {
  const { driver, memory } = device;
  const inputs = new Map<unknown, Tensor>();
  const note = (t: Tensor) => {
    if (!memory.isReserved(t.block) && !inputs.has(t.block)) inputs.set(t.block, keep(t.handle()));
  };
  let result: Tensor | undefined;
  try {
    const replay = driver.capture?.(() =>
      observe(note, () => {
        result = unscoped(() => scope(fn));
      }),
    );
    return {
      replay: replay as Replay,
      result: result as unknown as Tensor,
      inputs: [...inputs.values()],
      replays: 0,
    };
  } catch (error) {
    result?.release();
    for (const input of inputs.values()) input.release();
    throw error;
  }
}
