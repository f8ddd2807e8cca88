// Runs a grid: blocks, or clusters of them, one after another, and the warps of each in turns. A warp runs until it waits at a
// barrier or yields. Lanes that part are groups, each at its own place; the group at the lowest place runs first, and groups that
// meet are joined, which with nvcc's layout reconverges where a GPU would.
import type { LaunchAttributes } from '../../engine/cuda/api.ts';
import { agents } from './agents.ts';
import { checkReached, enterBlock } from './cluster.ts';
import { compileBlock } from './compile.ts';
import { isCopying } from './copy_async.ts';
import { checkEnd } from './grid_dependency.ts';
import { resetGridOrder } from './grid_order.ts';
import {
  type BlockState,
  type Cluster,
  type Group,
  type LoadedKernel,
  type Machine,
  sharedStart,
  type Warp,
} from './machine.ts';
import { describeMbarriers } from './mbarrier.ts';
import { allocated, poison } from './memory.ts';
import { countBits } from './numbers.ts';
import { GpuReport, quote, whereIs } from './report.ts';
import { runWarpInstruction } from './warp_ops.ts';
import { noteRegisters } from './wgmma.ts';

export type Triple = readonly [number, number, number];

/** Runs all blocks of a grid, in clusters along x. The parameters are already in the machine's parameter block. */
export function runGrid(
  m: Machine,
  kernel: LoadedKernel,
  grid: Triple,
  block: Triple,
  dynamicBytes: number,
  { cluster: clusterBlocks = 1, programmatic = false }: LaunchAttributes,
): void {
  const [bx, by] = block;
  const threads = bx * by * block[2];
  for (let t = 0; t < threads; t++) {
    m.tidX[t] = t % bx;
    m.tidY[t] = Math.floor(t / bx) % by;
    m.tidZ[t] = Math.floor(t / (bx * by));
  }
  m.kernel = kernel;
  m.programmatic = programmatic;
  m.dynamicBytes = dynamicBytes;
  m.ntid.set(block);
  m.nctaid.set(grid);
  m.seed(m.schedule.seed);
  const count = (grid[0] * grid[1] * grid[2]) / clusterBlocks;
  m.race.globals.startGrid(count);
  resetGridOrder(m);
  for (const n of inOrder(
    m,
    Array.from({ length: count }, (_, k) => k),
  )) {
    const places = Array.from({ length: clusterBlocks }, (_, rank) => {
      const at = n * clusterBlocks + rank;
      return [at % grid[0], Math.floor(at / grid[0]) % grid[1], Math.floor(at / (grid[0] * grid[1]))];
    });
    runCluster(m, threads, places);
  }
}

function inOrder<T>(m: Machine, items: T[]): T[] {
  if (m.schedule.order === 'reverse') return items.reverse();
  if (m.schedule.order === 'forward') return items;
  for (let k = items.length - 1; k > 0; k--) {
    const other = Math.floor(m.random() * (k + 1));
    [items[k], items[other]] = [items[other], items[k]];
  }
  return items;
}

/** Turns in which nothing moved before it is called a deadlock: a failed try_wait may be spurious once or twice. */
const idleTurns = 4;

function runCluster(m: Machine, threads: number, places: readonly (readonly number[])[]): void {
  const { blocks } = newCluster(m.kernel, threads, places);
  const warps = blocks.flatMap((b) => b.warps);
  prepareLocal(m, threads * blocks.length);
  m.registers.fill(poison, 0, warps.length * m.kernel.flow.planes * 32);
  m.race.globals.startCluster();
  for (const block of blocks) prepareShared(m, block);
  const progress = () => blocks.reduce((sum, b) => sum + b.progress, 0);
  const running = new Set(blocks);
  for (let idle = 0; running.size; ) {
    const before = progress();
    const ready = warps.filter((w) => w.state === 'run' || w.state === 'yield');
    for (const warp of inOrder(m, ready)) {
      // What an earlier warp of this turn did may have made it useless, but never unready.
      enter(m, warp);
      runWarp(m, warp);
    }
    if (completeWork(m, blocks, progress() === before) || progress() !== before) idle = 0;
    else if (++idle >= idleTurns)
      throw new GpuReport('deadlock', [...running].map((b) => describeBlock(m, b)).join('; '));
    for (const block of running)
      if (block.warps.every((w) => w.state === 'done')) endBlock(m, running, block);
  }
  for (const block of blocks) checkReached(m, block);
}

function prepareShared(m: Machine, block: BlockState): void {
  enterBlock(m, block);
  const end = m.dynamicBytes ? m.kernel.dynamicStart + m.dynamicBytes : m.kernel.staticEnd;
  m.shared.shadow8.fill(0);
  m.shared.shadow8.fill(allocated, sharedStart, end);
  m.shared.i32.fill(poison, 0, (end + 3) >> 2);
  m.race.startBlock(end + 64);
}

function endBlock(m: Machine, running: Set<BlockState>, block: BlockState): void {
  running.delete(block);
  for (const work of block.pendingWork) {
    if (work.describe())
      throw new GpuReport(
        'async',
        `kernel ${m.kernel.source.name} block (${block.ctaid}) ends while ${work.describe()}`,
      );
  }
}

/** Lets pending asynchronous work complete: at random, or because nothing else can move. True if some did. */
function completeWork(m: Machine, blocks: readonly BlockState[], stuck: boolean): boolean {
  const { async } = m.schedule;
  if (!stuck && !(async === 'random' && m.random() < 0.5)) return false;
  const pick = (count: number) =>
    async === 'random' ? Math.floor(m.random() * count) : async === 'newest' ? count - 1 : 0;
  const work = blocks.flatMap((b) => b.pendingWork);
  return work.some((one) => one.complete(pick));
}

function newCluster(kernel: LoadedKernel, threads: number, places: readonly (readonly number[])[]): Cluster {
  const cluster: Cluster = { blocks: [], clocks: new Int32Array(agents).fill(2), operations: 0 };
  cluster.blocks.push(...places.map((ctaid, rank) => newBlock(kernel, threads, cluster, rank, ctaid)));
  return cluster;
}

function newBlock(
  kernel: LoadedKernel,
  threads: number,
  cluster: Cluster,
  rank: number,
  ctaid: readonly number[],
): BlockState {
  const count = Math.ceil(threads / 32);
  const block: BlockState = {
    ...{ cluster, rank, ctaid, warps: [], barriers: new Map(), clocks: cluster.clocks },
    ...{ reached: new Int32Array(agents), reachedAt: new Int32Array(agents) },
    ...{ progress: 0, pendingWork: [], extra: new Map() },
  };
  block.warps.push(
    ...Array.from({ length: count }, (_, id): Warp => {
      const lanes = Math.min(32, threads - id * 32);
      const initial = lanes === 32 ? -1 : (1 << lanes) - 1;
      const agent = rank * count + id;
      return {
        ...{ id, block, agent, base: agent * kernel.flow.planes * 32, initial, live: initial, state: 'run' },
        waited: 0,
        groups: [{ pc: 0, mask: initial, parked: false }],
        seen: new Int32Array(agents),
        proxyFenced: new Int32Array(agents),
        gpuFenced: new Int32Array(agents),
        ...{ acquired: new Map(), observed: new Map(), copies: [] },
      };
    }),
  );
  return block;
}

/** Local memory: each thread's own, with a gap between threads so that running over shows. */
function prepareLocal(m: Machine, threads: number): void {
  const { localBytes } = m.kernel;
  if (localBytes === 0) return;
  m.localStride = Math.ceil(localBytes / 16) * 16 + 16;
  if (threads * m.localStride > m.local.u8.length)
    throw new GpuReport(
      'launch',
      `${m.kernel.source.name}: ${localBytes} bytes of local memory a thread are too many here`,
    );
  m.local.shadow8.fill(0, 0, threads * m.localStride);
  for (let t = 0; t < threads; t++)
    m.local.shadow8.fill(allocated, t * m.localStride, t * m.localStride + localBytes);
}

function enter(m: Machine, warp: Warp): void {
  if (m.block !== warp.block) enterBlock(m, warp.block);
  m.warp = warp;
  m.firstThread = warp.id * 32;
  m.localBase = warp.agent * 32 * m.localStride;
  warp.state = 'run';
}

/** Blocks of code that a warp may run without a barrier: a loop that never ends is reported. */
const stepLimit = 2_000_000;

function runWarp(m: Machine, warp: Warp): void {
  const { kernel } = m;
  const { blocks } = kernel.flow;
  const chunks = (kernel.chunks[warp.block.rank] ??= []);
  const { groups } = warp;
  for (let steps = 0; ; steps++) {
    if (groups.length === 0) {
      warp.state = 'done';
      m.block.progress++;
      return;
    }
    const group = groups.length === 1 && !groups[0].parked ? groups[0] : nextGroup(m, warp);
    const block = blocks[group.pc];
    kernel.visits[block.id]++;
    if (block.kind === 'lanes') {
      m.stats.instructions += (block.instructions.length + 1) * countBits(group.mask);
      if (block.branch?.opcode === 'brx') branchByIndex(m, warp, group);
      else {
        if (warp.wgmma) noteRegisters(m, block);
        const chunk = (chunks[block.id] ??= compileBlock(block, m, kernel.locate));
        const taken = chunk(warp.base, group.mask);
        if (taken === 0) group.pc = block.next;
        else if (taken === group.mask) group.pc = block.targets[0];
        else {
          group.pc = block.next;
          group.mask &= ~taken;
          groups.push({ pc: block.targets[0], mask: taken, parked: false });
        }
      }
    } else if (block.kind === 'exit') endLanes(m, warp, group);
    else {
      const outcome = runWarpInstruction(m, block.instructions[0], group);
      if (outcome === 'park') group.parked = true;
      else if (outcome === 'barrier') {
        warp.state = 'barrier';
        return;
      } else {
        if (outcome !== 'again') group.pc = block.next;
        if (outcome === 'yield' || outcome === 'again') {
          group.tired = true;
          joinGroups(groups);
          warp.state = 'yield';
          return;
        }
      }
    }
    if (groups.length > 1) joinGroups(groups);
    if (steps > stepLimit)
      throw new GpuReport('timeout', `a warp runs on without end, ${whereIs(m, 0, quoteable(m, group))}`);
  }
}

const quoteable = (m: Machine, { pc }: Group) => {
  const block = m.kernel.flow.blocks[pc];
  return block.instructions[0] ?? block.branch ?? m.kernel.source.instructions[0];
};

/** The runnable group at the lowest place, those that yielded last; none is a divergence. */
function nextGroup(m: Machine, warp: Warp): Group {
  const free = warp.groups.filter((g) => !g.parked);
  const fresh = free.filter((g) => !g.tired);
  if (fresh.length === 0) for (const g of free) g.tired = false;
  const candidates = fresh.length ? fresh : free;
  if (candidates.length) return candidates.reduce((a, b) => (b.pc < a.pc ? b : a));
  const places = warp.groups.map((g) => `${countBits(g.mask)} thread(s) wait at ${quote(quoteable(m, g))}`);
  const ended = countBits(warp.initial) - countBits(warp.live);
  const first = warp.groups[0];
  const where = whereIs(m, 31 - Math.clz32(first.mask & -first.mask), quoteable(m, first));
  throw new GpuReport(
    'divergence',
    `in warp ${warp.id} ${places.join(', ')}, and ${ended} have ended: not all reach it, ${where}`,
  );
}

function joinGroups(groups: Group[]): void {
  for (let a = 0; a < groups.length; a++) {
    for (let b = groups.length - 1; b > a; b--) {
      if (groups[a].pc !== groups[b].pc) continue;
      groups[a].mask |= groups[b].mask;
      groups[a].parked = false;
      groups.splice(b, 1);
    }
  }
}

function endLanes(m: Machine, warp: Warp, group: Group): void {
  for (let l = 0; l < 32; l++)
    if (m.detectRaces && (group.mask >>> l) & 1 && isCopying(m, l))
      throw new GpuReport(
        'async',
        `a thread ends with a cp.async that it has not waited for, ${whereIs(m, l, quoteable(m, group))}`,
      );
  checkEnd(m, group, quoteable(m, group));
  warp.live &= ~group.mask;
  warp.groups.splice(warp.groups.indexOf(group), 1);
  for (const other of warp.groups) other.parked = false;
}

/** brx.idx: each lane goes where its index says. */
function branchByIndex(m: Machine, warp: Warp, group: Group): void {
  const { branch, targets } = m.kernel.flow.blocks[group.pc];
  const index = branch?.operands[0];
  if (index?.kind !== 'register') throw new Error(`ptx: the virtual GPU does not know "${branch?.text}"`);
  const byTarget = new Map<number, number>();
  for (let l = 0; l < 32; l++) {
    if (!((group.mask >>> l) & 1)) continue;
    const target = targets[m.registers[warp.base + index.plane * 32 + l]];
    if (target === undefined)
      throw new GpuReport('out of bounds', `brx.idx beyond its table, ${whereIs(m, l, branch!)}`);
    byTarget.set(target, (byTarget.get(target) ?? 0) | (1 << l));
  }
  warp.groups.splice(warp.groups.indexOf(group), 1);
  for (const [pc, mask] of byTarget) warp.groups.push({ pc, mask, parked: false });
}

function describeBlock(m: Machine, block: BlockState): string {
  const waiting = block.warps
    .filter((w) => w.state !== 'done')
    .map((w) => `warp ${w.id} (${w.state}) at ${w.groups.map((g) => quote(quoteable(m, g))).join(' and ')}`);
  const pending = block.pendingWork.map((p) => p.describe());
  const work = [...pending, describeMbarriers(block)].filter((text) => text);
  const done = block.warps.filter((w) => w.state === 'done').length;
  const name = `kernel ${m.kernel.source.name} block (${block.ctaid})`;
  return `${name}: ${waiting.join('; ')}${done ? `; ${done} warp(s) have ended` : ''}${work.length ? `; ${work.join('; ')}` : ''}`;
}
