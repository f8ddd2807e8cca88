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

type Gpu = Pick<PlanContext, 'multiprocessors' | 'sharedBytes' | 'hopper'>;
type QueuePart = Pick<Queue, 'memory' | 'stream' | 'upload'>;

export class Launcher implements Required<Pick<Driver, 'launch' | 'launchAll'>> {
  readonly #api: GpuApi;
  readonly #gpu: Gpu;
  readonly #queue: QueuePart;
  readonly #kernels: KernelTable;
  readonly #memo = new PlanMemo();
  /** The kernel that was queued last. */
  last: string | undefined;

  constructor(api: GpuApi, gpu: Gpu, queue: QueuePart) {
    this.#api = api;
    this.#gpu = gpu;
    this.#queue = queue;
    this.#kernels = new KernelTable(api);
  }

  launch = (symbol: string, args: LaunchArguments): void =>
    this.#remembered(symbol, [args], (op, context) => planned(op, args, context));

  launchAll = (symbol: string, calls: readonly LaunchArguments[]): void => {
    const plan: Planner = (op, context) => plannedTogether(op, calls, context);
    // Updates of all weights bring a table to the device, which is another each time.
    if (calls.length > FEW) this.#run(symbol, plan);
    else this.#remembered(symbol, calls, plan);
  };

  /** Queues a symbol's launches for these calls, which are planned if they were not before. */
  #remembered(symbol: string, calls: readonly LaunchArguments[], plan: Planner): void {
    if (this.#again(this.#memo.find(symbol, calls))) return;
    const made = this.#run(symbol, plan);
    if (made) this.#memo.keep(symbol, calls, made);
  }

  #send(launch: ReadyLaunch): void {
    this.#kernels.queue(launch, this.#queue.stream);
    this.last = launch.name;
  }

  /** Queues a call's launches as they were made before, if their workspaces lie where they lay in one of these. */
  #again(known: readonly Remembered[]): boolean {
    if (known.length === 0) return false;
    const { memory } = this.#queue;
    const taken: Block[] = [];
    try {
      for (const { bytes } of known[0].workspaces) taken.push(memory.take(bytes));
      const same = known.find(({ workspaces }) => workspaces.every((w, i) => w.address === taken[i].address));
      for (const launch of same?.launches ?? []) this.#send(launch);
      return same !== undefined;
    } finally {
      for (const block of taken) memory.give(block);
    }
  }

  /**
   * Makes a symbol's launches and queues them; their workspaces go back to the pool.
   * @returns what can be queued again; undefined where bytes were uploaded for it
   */
  #run(symbol: string, plan: Planner): Remembered | undefined {
    const [op, dtype] = splitSymbol(symbol);
    const workspaces: Workspace[] = [];
    const launches: ReadyLaunch[] = [];
    try {
      for (const launch of plan(op, this.#context(dtype, workspaces))) {
        const ready = this.#kernels.ready(launch, dtype);
        this.#send(ready);
        launches.push(ready);
      }
    } finally {
      for (const { block } of workspaces) this.#queue.memory.give(block);
    }
    if (workspaces.some(({ uploaded }) => uploaded)) return undefined;
    return { launches, workspaces: workspaces.map(({ bytes, block: { address } }) => ({ bytes, address })) };
  }

  /** What a plan sees of the GPU; what it takes of the pool goes into `workspaces`. */
  #context(dtype: string, workspaces: Workspace[]): PlanContext {
    const { memory, upload } = this.#queue;
    const take = (bytes: number, uploaded: boolean): Block => {
      const block = memory.take(bytes);
      workspaces.push({ bytes, block, uploaded });
      return block;
    };
    return {
      dtype: dtype as PlanContext['dtype'],
      elementBytes: dtype === 'float32' ? 4 : 2,
      ...this.#gpu,
      tiledMap: (map) => this.#api.cuTensorMapEncodeTiled(map),
      im2colMap: (map) => this.#api.cuTensorMapEncodeIm2col(map),
      workspace: (bytes) => take(bytes, false).address,
      upload(bytes) {
        const block = take(bytes.byteLength, true);
        upload(block, 0, bytes);
        return block.address;
      },
    };
  }
}

/** A block that a plan uses between its launches. */
interface Workspace {
  /** As many as the plan asked for. */
  readonly bytes: number;
  readonly block: Block;
  readonly uploaded: boolean;
}

/** `silu_forward_bfloat16` as `silu_forward` and `bfloat16`. */
function splitSymbol(symbol: string): [string, string] {
  const at = symbol.lastIndexOf('_');
  return [symbol.slice(0, at), symbol.slice(at + 1)];
}
