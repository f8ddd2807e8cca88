// A kernel's control flow: basic blocks, which registers live across them, and where in a warp's register file those are
// kept. A block is straight-line code that each lane runs on its own (`lanes`), or one instruction that a warp runs
// together (`warp`). Straight-line code is cut every few instructions: V8 compiles small functions ten times faster.
import type { Instruction, Kernel, Label, Register } from './ptx.ts';
import { bytesOf, isLabel, registersOf } from './ptx.ts';

export interface Block {
  readonly id: number;
  kind: 'lanes' | 'warp' | 'exit';
  /** Whether control flow can enter here: where a basic block begins, and is not just cut. */
  entered: boolean;
  readonly instructions: Instruction[];
  /** The branch that ends the block, if any. */
  branch?: Instruction;
  /** Where lanes go that do not branch, and where those go that do (several for brx.idx). */
  next: number;
  targets: number[];
  readonly liveIn: Set<Register>;
  readonly liveOut: Set<Register>;
}

export interface Flow {
  readonly blocks: readonly Block[];
  /** The block that ends a thread. */
  readonly exit: number;
  /** Words of 32 lanes that a warp's registers take. */
  readonly planes: number;
}

const chunkLength = 12;

const warpOpcodes = new Set([
  ...[
    'bar',
    'barrier',
    'shfl',
    'vote',
    'match',
    'redux',
    'activemask',
    'elect',
    'mma',
    'ldmatrix',
    'stmatrix',
  ],
  ...['wgmma', 'setmaxnreg', 'mbarrier', 'fence', 'membar', 'griddepcontrol', 'nanosleep'],
]);

/** Whether the warp runs the instruction as one: it crosses lanes, or orders memory. */
function isWarpWide({ opcode, modifiers }: Instruction): boolean {
  if (opcode === 'cp') {
    const what = modifiers[1];
    return what === 'bulk' || what === 'mbarrier' || /^(commit|wait)/.test(what);
  }
  return warpOpcodes.has(opcode);
}

const writesNothing = new Set([
  ...[
    'st',
    'red',
    'bar',
    'barrier',
    'ret',
    'exit',
    'bra',
    'brx',
    'fence',
    'membar',
    'setmaxnreg',
    'stmatrix',
    'cp',
  ],
  ...[
    'griddepcontrol',
    'nanosleep',
    'trap',
    'prefetch',
    'prefetchu',
    'discard',
    'call',
    'brkpt',
    'applypriority',
  ],
]);

/** Registers an instruction writes. */
export function defines(i: Instruction): Register[] {
  if (writesNothing.has(i.opcode) && !(i.opcode === 'bar' && i.modifiers.includes('red'))) return [];
  if (i.opcode === 'mbarrier' && !/^(try_wait|test_wait|arrive)/.test(i.modifiers[0])) return [];
  if (i.opcode === 'wgmma' && i.modifiers[0] !== 'mma_async') return [];
  return i.operands[0]?.kind === 'address' ? [] : registersOf(i.operands[0]);
}

/** Registers an instruction reads. */
export function reads(i: Instruction): Register[] {
  const first = i.operands[0];
  const skip = (defines(i).length > 0 || first?.kind === 'sink') && i.opcode !== 'wgmma' ? 1 : 0;
  const read = i.operands.slice(skip).flatMap(registersOf);
  return i.guard ? [i.guard.register, ...read] : read;
}

/** Cuts a kernel into blocks, finds live registers and gives them planes of the register file. */
export function analyse(kernel: Kernel): Flow {
  const blocks = cut(kernel);
  const exit = blocks.length - 1;
  findLive(blocks);
  return { blocks, exit, planes: placeRegisters(blocks) };
}

function cut(kernel: Kernel): Block[] {
  const blocks: Block[] = [];
  const starts = new Map<Label, number>();
  const open = (): Block => {
    const made: Block = {
      ...{ id: blocks.length, kind: 'lanes', instructions: [], next: blocks.length + 1, targets: [] },
      ...{ entered: false, liveIn: new Set(), liveOut: new Set() },
    };
    blocks.push(made);
    return made;
  };
  let current = open();
  current.entered = true;
  const isFresh = () => current.instructions.length === 0 && !current.branch;
  for (const item of kernel.code) {
    if (isLabel(item)) {
      if (!isFresh()) current = open();
      current.entered = true;
      starts.set(item, current.id);
    } else if (isWarpWide(item)) {
      if (!isFresh()) current = open();
      current.kind = 'warp';
      current.instructions.push(item);
      current = open();
    } else if (['bra', 'brx', 'ret', 'exit'].includes(item.opcode)) {
      // The scheduler reads brx's index from the register file, so it may not be computed in the same block.
      if (item.opcode === 'brx' && !isFresh()) current = open();
      current.branch = item;
      current = open();
      current.entered = true;
    } else {
      current.instructions.push(item);
      if (current.instructions.length >= chunkLength) current = open();
    }
  }
  if (!isFresh()) open();
  const exit = blocks[blocks.length - 1];
  exit.kind = 'exit';
  for (const block of blocks) {
    if (!block.branch) continue;
    const labels = block.branch.targets;
    block.targets = labels ? labels.map((label) => starts.get(label)!) : [exit.id];
    if (!block.branch.guard && block.branch.opcode !== 'brx') block.next = block.targets[0];
  }
  return blocks;
}

/** Backward dataflow: what a block reads before it writes, and what its successors still need. */
function findLive(blocks: Block[]): void {
  const written = blocks.map((block) => {
    const own = new Set<Register>();
    for (const i of block.branch ? [...block.instructions, block.branch] : block.instructions) {
      for (const r of reads(i)) if (!own.has(r)) block.liveIn.add(r);
      for (const r of defines(i)) {
        // A guarded write may leave the old value in place, so that value is read too.
        if (i.guard && !own.has(r)) block.liveIn.add(r);
        own.add(r);
      }
    }
    return own;
  });
  for (let changed = true; changed; ) {
    changed = false;
    for (const block of blocks.toReversed()) {
      if (block.kind === 'exit') continue;
      for (const successor of new Set([block.next, ...block.targets])) {
        for (const r of blocks[successor].liveIn) {
          if (block.liveOut.has(r)) continue;
          block.liveOut.add(r);
          if (!written[block.id].has(r)) block.liveIn.add(r);
          changed = true;
        }
      }
    }
  }
}

/** Linear scan: a register keeps its planes from the first to the last block that it touches. Returns the planes used. */
function placeRegisters(blocks: readonly Block[]): number {
  const last = new Map<Register, number>();
  const first = new Map<number, Register[]>();
  for (const block of blocks) {
    const together =
      block.kind === 'warp' ? block.instructions.flatMap((i) => [...defines(i), ...reads(i)]) : [];
    for (const r of new Set([...block.liveIn, ...block.liveOut, ...together])) {
      if (!last.has(r)) first.set(block.id, [...(first.get(block.id) ?? []), r]);
      last.set(r, block.id);
    }
  }
  const free: Record<number, number[]> = { 1: [], 2: [] };
  const ending = new Map<number, Register[]>();
  let planes = 0;
  for (const block of blocks) {
    for (const r of first.get(block.id) ?? []) {
      const size = bytesOf(r.type) === 8 ? 2 : 1;
      r.plane = free[size].pop() ?? planes;
      if (r.plane === planes) planes += size;
      const end = last.get(r)!;
      ending.set(end, [...(ending.get(end) ?? []), r]);
    }
    for (const r of ending.get(block.id) ?? []) free[bytesOf(r.type) === 8 ? 2 : 1].push(r.plane);
  }
  return planes;
}
