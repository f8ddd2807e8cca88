// How a call of a kernel symbol becomes work in the stream: its plan makes launches of it, which are remembered for when the call
// comes again (plan_memo.ts); the PTX they need is loaded when first asked for. Blocks that a plan uses between its launches go
// back to the pool at once, because whoever takes them next runs later in the same stream.
import type { Block, Driver } from '../driver.ts';
import type { GpuApi } from './api.ts';
import type { Queue } from './device.ts';
import { KernelTable, type ReadyLaunch } from './kernel_table.ts';
import type { KernelLaunch, LaunchArguments, PlanContext } from './plan.ts';
import { PlanMemo, type Remembered } from './plan_memo.ts';
import { planned, plannedTogether } from './plans.ts';

type Planner = (op: string, context: PlanContext) => Iterable<KernelLaunch>;

/** Calls together that are worth remembering. */
const FEW = 8;

export interface Launcher extends Required<Pick<Driver, 'launch' | 'launchAll'>> {
  /** The kernel that was queued last. */
  last(): string | undefined;
}

export function openLauncher(
  api: GpuApi,
  gpu: Pick<PlanContext, 'multiprocessors' | 'sharedBytes' | 'hopper'>,
  { memory, stream, upload }: Pick<Queue, 'memory' | 'stream' | 'upload'>,
): Launcher {
  const kernels = new KernelTable(api);
  const memo = new PlanMemo();
  let last: string | undefined;

  /** Queues a symbol's launches for these calls, which are planned if they were not before. */
  function remembered(symbol: string, calls: readonly LaunchArguments[], plan: Planner): void {
    if (queueAgain(memo.find(symbol, calls))) return;
    const made = run(symbol, plan);
    if (made) memo.keep(symbol, calls, made);
  }
  function queue(launch: ReadyLaunch): void {
    kernels.queue(launch, stream);
    last = launch.name;
  }
  /** Queues a call's launches as they were made before, if their workspaces lie where they lay in one of these. */
  function queueAgain(known: readonly Remembered[]): boolean {
    if (known.length === 0) return false;
    const taken: Block[] = [];
    try {
      for (const { bytes } of known[0].workspaces) taken.push(memory.take(bytes));
      const same = known.find(({ workspaces }) => workspaces.every((w, i) => w.address === taken[i].address));
      for (const launch of same?.launches ?? []) queue(launch);
      return same !== undefined;
    } finally {
      for (const block of taken) memory.give(block);
    }
  }
  /**
   * Makes a symbol's launches and queues them; their workspaces go back to the pool.
   * @returns what can be queued again; undefined where bytes were uploaded for it
   */
  function run(symbol: string, plan: Planner): Remembered | undefined {
    const [op, dtype] = splitSymbol(symbol);
    const used: Block[] = [];
    const workspaces: { bytes: number; address: bigint }[] = [];
    const launches: ReadyLaunch[] = [];
    let uploaded = false;
    const workspace = (bytes: number): Block => {
      const taken = memory.take(bytes);
      used.push(taken);
      workspaces.push({ bytes, address: taken.address });
      return taken;
    };
    const context: PlanContext = {
      dtype: dtype as PlanContext['dtype'],
      elementBytes: dtype === 'float32' ? 4 : 2,
      ...gpu,
      tiledMap: (map) => api.cuTensorMapEncodeTiled(map),
      im2colMap: (map) => api.cuTensorMapEncodeIm2col(map),
      workspace: (bytes) => workspace(bytes).address,
      upload(bytes) {
        const block = workspace(bytes.byteLength);
        upload(block, 0, bytes);
        uploaded = true;
        return block.address;
      },
    };
    try {
      for (const launch of plan(op, context)) {
        const ready = kernels.ready(launch, dtype);
        queue(ready);
        launches.push(ready);
      }
    } finally {
      for (const taken of used) memory.give(taken);
    }
    return uploaded ? undefined : { launches, workspaces };
  }
  return {
    last: () => last,
    launch: (symbol, args) => remembered(symbol, [args], (op, context) => planned(op, args, context)),
    launchAll(symbol, calls) {
      const plan: Planner = (op, context) => plannedTogether(op, calls, context);
      // Updates of all weights bring a table to the device, which is another each time.
      if (calls.length > FEW) run(symbol, plan);
      else remembered(symbol, calls, plan);
    },
  };
}

/** `silu_forward_bfloat16` as `silu_forward` and `bfloat16`. */
function splitSymbol(symbol: string): [string, string] {
  const at = symbol.lastIndexOf('_');
  return [symbol.slice(0, at), symbol.slice(at + 1)];
}
