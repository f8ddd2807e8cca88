// The state of the virtual GPU: memories, the register file that all kernels share, and who runs now. Generated code and
// the detectors work on this one object; clusters of a grid (mostly of one block) run one after another, their warps take turns.
import { newAtomics } from './atomics.ts';
import type { Chunk } from './compile.ts';
import { newCopyAsync } from './copy_async.ts';
import type { Locate } from './emit.ts';
import { type Faults, newFaults } from './faults.ts';
import type { Flow } from './flow.ts';
import { type Arena, type Memory, newArena, newMemory } from './memory.ts';
import type { Kernel, Register } from './ptx.ts';
import { newRaceDetector, type RaceDetector } from './races.ts';
import type { TensorMap } from './tensor_map.ts';

/** How asynchronous copies complete: as late as the kernel allows in order or the newest first, at once, or by the seed. */
export type AsyncMode = 'late' | 'newest' | 'early' | 'random';
/** In which order blocks and warps run. */
export type WarpOrder = 'forward' | 'reverse' | 'random';

export interface Schedule {
  readonly async: AsyncMode;
  readonly order: WarpOrder;
  readonly seed: number;
}

/** Lanes of a warp that are at the same place. */
export interface Group {
  pc: number;
  mask: number;
  /** Waits at a warp-wide instruction for other lanes. */
  parked: boolean;
  /** Has just yielded: other groups of the warp go first, for one may be what this one waits for. */
  tired?: boolean;
}

/** How far each agent (agents.ts) has come. */
export type VectorClock = Int32Array;

/** A cp.async that a lane has begun. */
export interface PendingCopy {
  readonly to: number;
  readonly from: number;
  readonly bytes: number;
  readonly sourceBytes: number;
  done: boolean;
  /** An mbarrier will be told of it. */
  signalled?: boolean;
}

export interface LaneCopies {
  current: PendingCopy[];
  readonly groups: PendingCopy[][];
}

export interface Warp {
  readonly id: number;
  readonly block: BlockState;
  /** Its number among all warps of the cluster, by which the happens-before order knows it. */
  readonly agent: number;
  /** First word of its registers in the register file. */
  readonly base: number;
  readonly groups: Group[];
  /** Lanes that exist, and those that have not ended. */
  readonly initial: number;
  live: number;
  state: 'run' | 'yield' | 'barrier' | 'done';
  /** Lanes that have waited for the grids before (grid_dependency.ts). */
  waited: number;
  /** Of the barrier it waits at: the group to move on. */
  waiting?: Group;
  /** Happens-before: how far it has seen each agent. */
  readonly seen: VectorClock;
  /** How far each agent's writes are fenced towards the async proxy, and towards the whole GPU. */
  readonly proxyFenced: VectorClock;
  readonly gpuFenced: VectorClock;
  /** Other blocks of the grid that it has synchronised with, and how far. */
  acquired: Map<number, VectorClock>;
  /** What the strong reads since its last fence would let it acquire. */
  readonly observed: Map<number, VectorClock>;
  readonly copies: (LaneCopies | undefined)[];
  /** State of wgmma and of bulk stores, made by those who need it. */
  wgmma?: unknown;
  bulk?: unknown;
}

export interface BarrierState {
  readonly expected: number;
  /** Warps that have come, and those of them that wait: bar.arrive does not. */
  count: number;
  readonly waiting: Warp[];
  /** What those that came had seen, as they came. */
  readonly seen: VectorClock;
  readonly proxyFenced: VectorClock;
  readonly gpuFenced: VectorClock;
  readonly acquired: Map<number, VectorClock>;
}

/** Which of `count` waiting pieces of work completes next. */
export type Pick = (count: number) => number;

/** Blocks that run together and reach each other's shared memory; mostly one. Their warps are agents of one order. */
export interface Cluster {
  readonly blocks: BlockState[];
  /** Each agent's own clock. */
  readonly clocks: Int32Array;
  /** Asynchronous operations that have begun. */
  operations: number;
  /** What cluster.ts keeps of barrier.cluster. */
  barrier?: unknown;
}

/** A block of the cluster that runs now. */
export interface BlockState {
  readonly cluster: Cluster;
  /** Its number in the cluster, and its coordinates in the grid. */
  readonly rank: number;
  readonly ctaid: readonly number[];
  readonly warps: Warp[];
  readonly barriers: Map<number, BarrierState>;
  /** The cluster's. */
  readonly clocks: Int32Array;
  /** Until when, by their clocks, agents of other blocks have reached this one's shared memory, and where. */
  readonly reached: VectorClock;
  readonly reachedAt: Int32Array;
  /** Counts whatever may let a waiting warp go on, to tell a deadlock. */
  progress: number;
  /** Registers from which asynchronous work continues (TMA); each returns false once nothing is left to complete. */
  readonly pendingWork: { complete(pick: Pick): boolean; describe(): string }[];
  readonly extra: Map<string, unknown>;
}

/** A kernel ready to run. */
export interface LoadedKernel {
  readonly source: Kernel;
  readonly flow: Flow;
  readonly locate: Locate;
  /** Compiled blocks by the rank of the block in its cluster, filled when first run; `visits` counts runs for coverage. */
  readonly chunks: (Chunk | undefined)[][];
  readonly visits: Int32Array;
  /** End of static shared memory, and what it counts as, start of dynamic shared memory, bytes of local memory a thread. */
  readonly staticEnd: number;
  readonly staticBytes: number;
  readonly dynamicStart: number;
  readonly localBytes: number;
  /** log2 of the smallest access to each space: the grain of race detection. */
  readonly sharedGrain: number;
  readonly globalGrain: number;
}

export interface Machine {
  readonly arena: Arena;
  readonly global: Memory;
  /** Of the block that runs now, as `race` is. */
  shared: Memory;
  readonly local: Memory;
  readonly registers: Int32Array;
  readonly floats: Float32Array;
  readonly parameters: DataView;
  readonly tensorMaps: TensorMap[];

  schedule: Schedule;
  /** Whether races are looked for. */
  detectRaces: boolean;
  random(): number;
  seed(value: number): void;

  kernel: LoadedKernel;
  /** Launched so that it may begin before the grid before it has ended. */
  programmatic: boolean;
  block: BlockState;
  warp: Warp;
  firstThread: number;
  readonly tidX: Int32Array;
  readonly tidY: Int32Array;
  readonly tidZ: Int32Array;
  readonly ctaid: Int32Array;
  readonly ntid: Int32Array;
  readonly nctaid: Int32Array;
  dynamicBytes: number;
  localBase: number;
  localStride: number;
  clock: number;

  readonly fault: Faults;
  race: RaceDetector;
  /** Shared memory and its detector by the rank of a block in its cluster. */
  readonly ranks: { readonly shared: Memory; readonly race: RaceDetector }[];
  readonly atomic: ReturnType<typeof newAtomics>;
  readonly copyAsync: ReturnType<typeof newCopyAsync>;

  readonly stats: { instructions: number; matrixProducts: number };
}

/** Shared memory of the largest block (sm_90: 227 KiB and one reserved), and where a block's own begins. */
export const sharedBytes = 228 * 1024;
export const sharedStart = 1024;
const localArenaBytes = 1 << 20;
const parameterBytes = 8192;

export interface MachineOptions {
  /** Size of the global arena: everything ever allocated has to fit, plus red zones. */
  readonly arenaBytes: number;
  /** Where in it allocations begin. */
  readonly arenaBegin?: number;
  /** Words of registers of a whole block. */
  readonly registerWords: number;
}

export function newMachine({ arenaBytes, arenaBegin, registerWords }: MachineOptions): Machine {
  const registerFile = new ArrayBuffer(registerWords * 4);
  const arena = newArena(arenaBytes, arenaBegin);
  let state = 1;
  const m = {
    arena,
    global: arena.memory,
    shared: newMemory(sharedBytes),
    local: newMemory(localArenaBytes),
    registers: new Int32Array(registerFile),
    floats: new Float32Array(registerFile),
    parameters: new DataView(new ArrayBuffer(parameterBytes)),
    tensorMaps: [],
    schedule: { async: 'late', order: 'forward', seed: 1 },
    detectRaces: true,
    random: () => {
      state = (Math.imul(state, 1664525) + 1013904223) | 0;
      return (state >>> 8) / 16777216;
    },
    seed: (value: number) => {
      state = value;
    },
    firstThread: 0,
    ...{ tidX: new Int32Array(1024), tidY: new Int32Array(1024), tidZ: new Int32Array(1024) },
    ...{ ctaid: new Int32Array(3), ntid: new Int32Array(3), nctaid: new Int32Array(3) },
    ...{ dynamicBytes: 0, localBase: 0, localStride: 0, clock: 0, programmatic: false },
    stats: { instructions: 0, matrixProducts: 0 },
  } as unknown as Machine;
  const late = {
    fault: newFaults(m),
    race: newRaceDetector(m),
    atomic: newAtomics(m),
    copyAsync: newCopyAsync(m),
  };
  return Object.assign(m, late, { ranks: [{ shared: m.shared, race: late.race }] });
}

/** A lane's value of a register, as bits. */
export const readRegister = (m: Machine, r: Register, lane: number): number =>
  m.registers[m.warp.base + r.plane * 32 + lane];

export function writeRegister(m: Machine, r: Register, lane: number, value: number): void {
  m.registers[m.warp.base + r.plane * 32 + lane] = value;
}
