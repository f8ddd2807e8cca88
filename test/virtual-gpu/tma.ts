// cp.async.bulk: copies that the TMA unit makes, of boxes of a tensor or of plain bytes. Loads signal an mbarrier with the
// bytes they brought; stores belong to bulk groups, and read shared memory until their group is waited for. As with
// cp.async they complete late, early or at random; what the kernel may not rely on shows as poison or wrong data.
import { endRead, newAgent, readAsync, writeAsync } from './async_agents.ts';
import { blockAt, inBlock, noteReach } from './cluster.ts';
import { windows } from './emit.ts';
import { checkWaited } from './grid_dependency.ts';
import type { BlockState, Machine, Warp } from './machine.ts';
import { findMbarrier, isInitFenced, type Mbarrier, settlePhase } from './mbarrier.ts';
import { allocated, poison } from './memory.ts';
import type { Address, Instruction, Operand } from './ptx.ts';
import { fail } from './report.ts';
import { boxAlignment, boxBytes, mapAt, swizzled, type TensorMap, walkBox } from './tensor_map.ts';
import { eachLane, laneValue, type Outcome, type WarpCall } from './warp_ops.ts';

/** One copy: where it lies in shared memory, and its pieces as (global offset or -1, shared offset, bytes). */
interface BulkCopy {
  readonly i: Instruction;
  readonly warp: Warp;
  readonly lane: number;
  readonly shared: number;
  readonly bytes: number;
  readonly agent: number;
  readonly clock: number;
  /** For a copy from or to `to` in shared memory. */
  pieces(to: number, visit: (global: number, shared: number, bytes: number) => void): void;
}

interface BulkGroups {
  current: BulkCopy[];
  readonly groups: BulkCopy[][];
}

export function bulkCopy(call: WarpCall): Outcome {
  const { m, i } = call;
  const words = i.modifiers;
  eachLane(call, (lane) => {
    if (words.includes('prefetch')) return checkPrefetch(call, lane);
    if (!words[2].endsWith('_group')) checkWaited(m, lane, i);
    const groups = groupsOf(m.warp, lane);
    if (words[2] === 'commit_group') {
      groups.groups.push(groups.current);
      groups.current = [];
    } else if (words[2] === 'wait_group') {
      const left = laneValue(call, i.operands[0], lane);
      while (groups.groups.length > left)
        for (const copy of groups.groups.shift()!) {
          finishStore(m, copy);
          copy.pieces(copy.shared, (_, shared, bytes) => endRead(m, shared, bytes, lane, copy.i));
        }
    } else start(call, lane, groups);
  });
  return 'next';
}

/** To L2, which holds nothing stale: before griddepcontrol.wait too. */
function checkPrefetch(call: WarpCall, lane: number): void {
  if (call.i.modifiers.includes('tensor')) tensorMap(call, lane, call.i.operands[0]);
}

function groupsOf(warp: Warp, lane: number): BulkGroups {
  const all = (warp.bulk as Map<number, BulkGroups> | undefined) ?? new Map<number, BulkGroups>();
  warp.bulk = all;
  const known = all.get(lane) ?? { current: [], groups: [] };
  all.set(lane, known);
  return known;
}

function start(call: WarpCall, lane: number, groups: BulkGroups): void {
  const { m, i } = call;
  const words = i.modifiers;
  const isTensor = words.includes('tensor');
  // The first space named after `bulk` or the tensor's rank is the target.
  const isStore = words.find((word) => /^(shared|global)/.test(word)) === 'global';
  if (words.includes('reduce')) throw new Error(`ptx: the virtual GPU does not know "${i.text}"`);
  const copy = isTensor ? tensorCopy(call, lane, isStore) : plainCopy(call, lane, isStore);
  m.block.progress++;
  if (isStore) {
    checkShared(m, copy);
    copy.pieces(copy.shared, (_, shared, bytes) =>
      readAsync(m, shared & ~3, Math.max(4, bytes), m.warp, lane, i),
    );
    groups.current.push(copy);
    if (m.schedule.async === 'early') finishStore(m, copy);
    else watchStores(m);
    return;
  }
  const barrier = i.operands.findLast((x): x is Address => x.kind === 'address')!;
  const signal = laneValue(call, isTensor ? i.operands[2] : barrier, lane);
  for (const { block, shared, at } of targets(call, copy, signal))
    inBlock(m, block, () => load(call, { ...copy, shared, ...newAgent(block) }, at));
}

/** Where a load goes, with the mbarrier it signals there: one block, or by multicast the same places in several. */
function targets(call: WarpCall, { shared, lane }: BulkCopy, signal: number) {
  const { m, i } = call;
  const [to, barrier] = [shared, signal].map((address) => blockAt(m, address, lane, i.site));
  if (to.block !== barrier.block)
    fail(m, 'cluster', 'the copy and its mbarrier are in different blocks', lane, i);
  const target = (block: BlockState) => ({ block, shared: to.offset, at: barrier.offset });
  if (!i.modifiers.includes('multicast::cluster')) return [target(to.block)];
  const mask = laneValue(call, i.operands[i.operands.length - 1], lane) & 0xffff;
  const { blocks } = m.block.cluster;
  if (mask === 0 || mask >>> blocks.length)
    fail(
      m,
      'cluster',
      `multicast to blocks 0x${mask.toString(16)} of a cluster of ${blocks.length}`,
      lane,
      i,
    );
  return blocks.filter((_, rank) => (mask >>> rank) & 1).map(target);
}

function base(call: WarpCall, lane: number, shared: number, bytes: number): Omit<BulkCopy, 'pieces'> {
  const { m, i } = call;
  return { i, warp: m.warp, lane, shared, bytes, ...newAgent(m.block) };
}

function tensorCopy(call: WarpCall, lane: number, isStore: boolean): BulkCopy {
  const { m, i } = call;
  const [mapOperand, sharedOperand] = isStore
    ? [i.operands[0], i.operands[1]]
    : [i.operands[1], i.operands[0]];
  const { map, coordinates } = tensorMap(call, lane, mapOperand);
  const shared = laneValue(call, sharedOperand, lane);
  if (shared % boxAlignment(map)) {
    const need = boxAlignment(map);
    fail(
      m,
      'misaligned',
      `shared+0x${shared.toString(16)} is not ${need}-byte aligned, as the map's swizzle needs`,
      lane,
      i,
    );
  }
  const offsets = map.kind === 'im2col' ? elementsOf(i.operands[3]).map((x) => laneValue(call, x, lane)) : [];
  const largest = 2 ** Math.floor(16 / (map.dims.length - 2)) - 1;
  if (offsets.some((n) => n < 0 || n >= largest))
    fail(m, 'tensor map', `offsets [${offsets}] of a pixel are not below ${largest}`, lane, i);
  const origin = Number(map.base & 0xffffffffn);
  return {
    ...base(call, lane, shared, boxBytes(map)),
    pieces(to, visit) {
      walkBox(map, coordinates, offsets, (global, within, bytes) => {
        visit(global < 0 ? -1 : origin + global, swizzled(map.swizzle, to + within), bytes);
      });
    },
  };
}

const elementsOf = (x: Operand | undefined): readonly Operand[] => (x?.kind === 'vector' ? x.elements : []);

function tensorMap(call: WarpCall, lane: number, x: Operand): { map: TensorMap; coordinates: number[] } {
  const { m, i } = call;
  if (x.kind !== 'address' || x.base.kind !== 'register')
    return fail(m, 'tensor map', 'no address of a map', lane, i);
  const low = laneValue(call, x.base, lane) + x.offset;
  const high = m.registers[m.warp.base + x.base.plane * 32 + 32 + lane];
  if (high !== windows.param) fail(m, 'tensor map', 'the map is not a __grid_constant__ parameter', lane, i);
  const map = mapAt(m.tensorMaps, m.parameters, low);
  if (!map) return fail(m, 'tensor map', 'the parameter is not an encoded tensor map', lane, i);
  const coordinates = elementsOf(x.coordinates).map((c) => laneValue(call, c, lane));
  if (coordinates.length !== map.dims.length) {
    fail(m, 'tensor map', `${coordinates.length} coordinates for a map of rank ${map.dims.length}`, lane, i);
  }
  return { map, coordinates };
}

/** cp.async.bulk of plain bytes: one piece. */
function plainCopy(call: WarpCall, lane: number, isStore: boolean): BulkCopy {
  const { m, i } = call;
  const [to, from] = [i.operands[0], i.operands[1]];
  const [sharedOperand, globalOperand] = isStore ? [from, to] : [to, from];
  const shared = laneValue(call, sharedOperand, lane);
  const global = laneValue(call, globalOperand, lane);
  const bytes = laneValue(call, i.operands[2], lane);
  if (shared % 16 || global % 16 || bytes % 16) {
    fail(m, 'misaligned', `a bulk copy of ${bytes} bytes needs 16-byte alignment`, lane, i);
  }
  return { ...base(call, lane, shared, bytes), pieces: (at, visit) => visit(global, at, bytes) };
}

function checkShared(m: Machine, { shared, bytes, lane, i }: BulkCopy): void {
  for (let b = shared; b < shared + bytes; b++) {
    if ((m.shared.shadow8[b] ?? 0) & allocated) continue;
    fail(
      m,
      'out of bounds',
      `a box of ${bytes} bytes at shared+0x${shared.toString(16)} leaves shared memory`,
      lane,
      i,
    );
  }
}

function load(call: WarpCall, copy: BulkCopy, address: number): void {
  const { m, i } = call;
  const { lane, shared, bytes, agent } = copy;
  checkShared(m, copy);
  const { block } = m;
  const b = findMbarrier(call, block, address, lane);
  noteReach(m, block, lane, i.site, agent);
  if (m.detectRaces && !isInitFenced(m, b)) {
    const name = `mbarrier at shared+0x${address.toString(16)}`;
    fail(
      m,
      'proxy fence',
      `the copy signals the ${name}, whose init was not fenced (fence.mbarrier_init)`,
      lane,
      i,
    );
  }
  writeAsync(m, copy, shared, bytes);
  const land = () => inBlock(m, block, () => finishLoad(m, copy, b));
  if (m.schedule.async === 'early') {
    land();
    return;
  }
  m.shared.i32.fill(poison, shared >>> 2, (shared + bytes) >>> 2);
  pendingLoads(m).push(land);
}

function finishLoad(m: Machine, copy: BulkCopy, b: Mbarrier): void {
  const { u8, shadow8 } = m.shared;
  copy.pieces(copy.shared, (global, shared, bytes) => {
    if (global < 0) u8.fill(0, shared, shared + bytes);
    else {
      readGlobal(m, copy, global, bytes);
      u8.set(m.global.u8.subarray(global, global + bytes), shared);
    }
    shadow8.fill(3, shared, shared + bytes);
  });
  b.bytes -= copy.bytes;
  b.seen[copy.agent] = Math.max(b.seen[copy.agent], copy.clock);
  m.block.progress++;
  settlePhase(b);
}

/** The tensor's own bytes have to be allocated and written, whoever reads them. */
function readGlobal(m: Machine, copy: BulkCopy, global: number, bytes: number): void {
  for (let k = 0; k < bytes; k++) {
    if (m.global.shadow8[global + k] === 3) continue;
    m.firstThread = copy.warp.id * 32;
    m.fault.G(copy.lane, windows.global, global, bytes & -bytes, true, copy.i.site);
  }
}

function finishStore(m: Machine, copy: BulkCopy): void {
  const done = finished(m);
  if (done.has(copy)) return;
  done.add(copy);
  copy.pieces(copy.shared, (global, shared, bytes) => {
    if (global < 0) return;
    for (let k = 0; k < bytes; k++) {
      if (!((m.global.shadow8[global + k] ?? 0) & allocated)) {
        m.fault.G(copy.lane, windows.global, global, bytes & -bytes, false, copy.i.site);
      }
    }
    m.global.u8.set(m.shared.u8.subarray(shared, shared + bytes), global);
    m.global.shadow8.fill(3, global, global + bytes);
  });
}

function finished(m: Machine): Set<BulkCopy> {
  const known = (m.block.extra.get('stored') as Set<BulkCopy> | undefined) ?? new Set<BulkCopy>();
  m.block.extra.set('stored', known);
  return known;
}

/** The loads in flight; any of them may complete when the scheduler says so. */
function pendingLoads(m: Machine): (() => void)[] {
  const known = m.block.extra.get('loads') as (() => void)[] | undefined;
  if (known) return known;
  const loads: (() => void)[] = [];
  m.block.extra.set('loads', loads);
  m.block.pendingWork.push({
    complete(pick) {
      const [land] = loads.splice(pick(loads.length), 1);
      land?.();
      return land !== undefined;
    },
    describe: () => (loads.length ? `${loads.length} bulk load(s) are in flight` : ''),
  });
  return loads;
}

/** A block may not end while its stores still read its shared memory. */
function watchStores(m: Machine): void {
  if (m.block.extra.has('stores')) return;
  m.block.extra.set('stores', true);
  const { block } = m;
  const unfinished = () => {
    const done = finished(m);
    const groups = block.warps.flatMap((w) => [
      ...((w.bulk as Map<number, BulkGroups> | undefined)?.values() ?? []),
    ]);
    return groups.flatMap((g) => [...g.current, ...g.groups.flat()]).filter((copy) => !done.has(copy)).length;
  };
  block.pendingWork.push({
    complete: () => false,
    describe: () => (unfinished() ? `${unfinished()} bulk store(s) still read shared memory` : ''),
  });
}
