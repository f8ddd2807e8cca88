// The engine's Driver on an NVIDIA GPU, behind the calls of api.ts: one context and one stream, memory in stream order, and
// kernels by symbol. A symbol's plan turns a call into launches, which are remembered (plan_memo.ts); the PTX they need is
// loaded when first asked for. Blocks that a plan uses between its launches go back to the pool at once, because whoever takes
// them next runs later in the same stream.
import { type Block, type Driver, MemoryPool } from '../memory.ts';
import { checkArguments } from '../signature.ts';
import { type Context, DeviceAttribute, type GpuApi, RELEASE_THRESHOLD, type Stream } from './api.ts';
import { CudaError } from './errors.ts';
import { openExchange } from './exchange.ts';
import { recordGraph } from './graph.ts';
import { guarded } from './guard.ts';
import { KernelTable, type ReadyLaunch } from './kernel_table.ts';
import type { KernelLaunch, LaunchArguments, Plan, PlanContext } from './plan.ts';
import { PlanMemo, type Remembered } from './plan_memo.ts';
import { plans } from './plans.ts';
import { openStaging } from './staging.ts';

export interface CudaDriver extends Driver {
  readonly memory: MemoryPool;
  readonly name: string;
  /** Compute capability as major * 10 + minor. */
  readonly capability: number;
  readonly multiprocessors: number;
  readonly context: Context;
  readonly stream: Stream;
  /** Waits for everything queued. */
  synchronize(): void;
}

type Planner = (op: string, context: PlanContext) => Iterable<KernelLaunch>;

/** Calls together that are worth remembering. */
const FEW = 8;

/** The driver whose context is current, of all of this process. */
let current: GpuApi | undefined;

/** Opens GPU `ordinal`. Throws CudaError where there is none, or an older one than Ampere. */
export function openCudaDriver(unguarded: GpuApi, ordinal = 0): CudaDriver {
  let lastKernel: string | undefined;
  let context: Context | undefined;
  const enter = (): void => {
    if (context === undefined || current === api) return;
    unguarded.cuCtxSetCurrent(context);
    current = api;
  };
  const count = unguarded.cuDeviceGetCount();
  const label = count > 1 ? `cuda:${ordinal}` : undefined;
  const api: GpuApi = guarded(unguarded, { gpu: label, lastKernel: () => lastKernel, enter });
  if (ordinal >= count)
    throw new CudaError(
      'CUDA_ERROR_INVALID_DEVICE',
      'cuDeviceGet',
      `${count} GPU${count === 1 ? '' : 's'} visible`,
      `cuda:${ordinal}`,
    );
  const attribute = (name: keyof typeof DeviceAttribute) =>
    api.cuDeviceGetAttribute(DeviceAttribute[name], ordinal);
  const capability = 10 * attribute('COMPUTE_CAPABILITY_MAJOR') + attribute('COMPUTE_CAPABILITY_MINOR');
  if (capability < 80) {
    const found = `${api.cuDeviceGetName(ordinal)} has compute capability ${capability / 10}`;
    throw new CudaError('CUDA_ERROR_NO_BINARY_FOR_GPU', 'cuDeviceGetAttribute', found, label);
  }
  if (!attribute('MEMORY_POOLS_SUPPORTED'))
    throw new CudaError(
      'CUDA_ERROR_NOT_SUPPORTED',
      'cuDeviceGetAttribute',
      'the GPU has no memory pools',
      label,
    );
  context = api.cuDevicePrimaryCtxRetain(ordinal);
  // Freed memory stays in the driver's pool until trim(): it would else go back to the system at each synchronization.
  const pool = api.cuDeviceGetDefaultMemPool(ordinal);
  api.cuMemPoolSetAttribute(pool, RELEASE_THRESHOLD, 2n ** 64n - 1n);
  const stream = api.cuStreamCreate(1); // CU_STREAM_NON_BLOCKING
  const multiprocessors = attribute('MULTIPROCESSOR_COUNT');
  const sharedBytes = attribute('MAX_SHARED_MEMORY_PER_BLOCK_OPTIN');
  const kernels = new KernelTable(api);
  const memo = new PlanMemo();
  const staging = openStaging(api, stream);
  let capturing = false;
  const notInCapture = (what: string): void => {
    if (capturing) throw new Error(`${what} in a step that is being captured`);
  };

  const exchange = openExchange({ api, ordinal, context, pool, stream }, () =>
    notInCapture('tensors were copied'),
  );
  const allocate = (bytes: number): Block | undefined => {
    notInCapture('memory was allocated');
    try {
      return { bytes, address: api.cuMemAllocAsync(bytes, stream) };
    } catch (error) {
      if (error instanceof CudaError && error.result === 'CUDA_ERROR_OUT_OF_MEMORY') return undefined;
      throw error;
    }
  };

  const driver: Omit<CudaDriver, 'memory'> = {
    name: api.cuDeviceGetName(ordinal),
    label,
    capability,
    multiprocessors,
    context,
    stream,
    allocate,
    free: (block) => api.cuMemFreeAsync(block.address, stream),
    trim() {
      // Frees are in stream order: only what the stream has passed can go.
      api.cuStreamSynchronize(stream);
      api.cuMemPoolTrimTo(pool, 0);
    },
    room: () => api.cuMemGetInfo(),
    upload(block, offset, source) {
      notInCapture('bytes were uploaded');
      staging.upload(block.address + BigInt(offset), source);
    },
    download(block, offset, target) {
      notInCapture('a tensor was read');
      staging.download(target, block.address + BigInt(offset));
    },
    exchange,
    clear(block, bytes) {
      if (bytes > 0) api.cuMemsetD8Async(block.address, 0, bytes, stream);
    },
    capture(queue) {
      notInCapture('another capture was begun');
      const replay = recordGraph(api, stream, () => {
        capturing = true;
        try {
          queue();
        } finally {
          capturing = false;
        }
      });
      const launch = () => {
        notInCapture('a step was replayed');
        replay.launch();
      };
      return { ...replay, launch };
    },
    synchronize: () => api.cuStreamSynchronize(stream),
    launch: (symbol, args) => remembered(symbol, [args], (op, context) => planned(op, args, context)),
    launchAll(symbol, calls) {
      const plan: Planner = (op, context) => plannedTogether(op, calls, context);
      // Updates of all weights bring a table to the device, which is another each time.
      if (calls.length > FEW) run(symbol, plan);
      else remembered(symbol, calls, plan);
    },
  };
  /** Queues a symbol's launches for these calls, which are planned if they were not before. */
  function remembered(symbol: string, calls: readonly LaunchArguments[], plan: Planner): void {
    if (queueAgain(memo.find(symbol, calls))) return;
    const made = run(symbol, plan);
    if (made) memo.keep(symbol, calls, made);
  }
  function queue(launch: ReadyLaunch): void {
    kernels.queue(launch, stream);
    lastKernel = launch.name;
  }
  /** Queues a call's launches as they were made before, if what they have between them lies where it lay in one of these. */
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
   * Makes a symbol's launches and queues them; what they have between them goes back to the pool.
   * @returns what can be queued again, unless it was uploaded to
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
      ...{ multiprocessors, sharedBytes },
      hopper: capability === 90,
      tiledMap: (map) => api.cuTensorMapEncodeTiled(map),
      im2colMap: (map) => api.cuTensorMapEncodeIm2col(map),
      workspace: (bytes) => workspace(bytes).address,
      upload(bytes) {
        const block = workspace(bytes.byteLength);
        driver.upload(block, 0, bytes);
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
  const memory = new MemoryPool(driver);
  return { ...driver, memory };
}

/** `silu_forward_bfloat16` as `silu_forward` and `bfloat16`. */
function splitSymbol(symbol: string): [string, string] {
  const at = symbol.lastIndexOf('_');
  return [symbol.slice(0, at), symbol.slice(at + 1)];
}

/** A symbol's plan, once arguments are checked against its signature. Throws where there is no such kernel. */
function planFor(op: string, args: LaunchArguments): Plan {
  const plan = plans.get(op);
  if (!plan) throw new Error(`the GPU has no kernel ${op}`);
  if (plan.signature !== undefined) checkArguments(op, plan.signature, args);
  return plan;
}

const hasWork = ({ grid }: KernelLaunch): boolean => !grid.includes(0);

/** The launches of a call. */
export const planned = (op: string, args: LaunchArguments, context: PlanContext): KernelLaunch[] =>
  planFor(op, args).launches(args, context).filter(hasWork);

/** The launches of independent calls: all together where the plan can, else each when the one before is queued. */
function* plannedTogether(
  op: string,
  calls: readonly LaunchArguments[],
  context: PlanContext,
): Iterable<KernelLaunch> {
  const each = calls.map((args) => planFor(op, args));
  if (each[0]?.together) yield* each[0].together(calls, context).filter(hasWork);
  else for (const args of calls) yield* planned(op, args, context);
}
