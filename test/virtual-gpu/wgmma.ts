// wgmma of sm_90a: a warpgroup's matrix product whose operands are read from shared memory through 64-bit descriptors, and
// whose accumulators are in flight from mma_async until its group is waited for. Each warp computes its own 16 rows, when
// it waits; until then touching an accumulator is a fault. The layouts are CUTLASS's canonical ones.
import { allLanes, readAsync } from './async_agents.ts';
import type { Block } from './flow.ts';
import { defines, reads } from './flow.ts';
import type { Machine, Warp } from './machine.ts';
import { a, b, registersIn, unpackA } from './matrix.ts';
import * as num from './numbers.ts';
import type { Instruction, Operand, Register } from './ptx.ts';
import { fail } from './report.ts';
import { isWhole, laneValue, type Outcome, type WarpCall } from './warp_ops.ts';
import { runAsWarpgroup } from './warpgroup.ts';

interface Descriptor {
  readonly address: number;
  /** Byte offsets between core matrices: leading dimension and stride. */
  readonly leading: number;
  readonly stride: number;
  /** 0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes. */
  readonly swizzle: number;
}

/** What an instruction's text says of its product. */
interface Form {
  readonly i: Instruction;
  readonly columns: number;
  /** 16 halves, or 32 bytes of e4m3. */
  readonly k: number;
  readonly type: string;
  readonly accumulators: readonly Register[];
  /** Registers of operand a, where it is not in shared memory. */
  readonly fragments: readonly Register[];
}

interface Product extends Form {
  /** Four registers of 32 lanes, or a descriptor. */
  readonly a: Int32Array | Descriptor;
  readonly b: Descriptor;
  readonly accumulate: boolean;
  readonly sign: number;
  readonly transposeA: boolean;
  readonly transposeB: boolean;
}

interface WgmmaState {
  current: Product[];
  readonly groups: Product[][];
  /** A wgmma.fence has been executed, and since then ordinary code wrote these registers. */
  fenced: boolean;
  readonly unfenced: Set<Register>;
  inFlight: Set<Register>;
  /** Registers that products in flight read as their operand a: others may read them too, but not write. */
  operands: Set<Register>;
}

function stateOf(warp: Warp): WgmmaState {
  warp.wgmma ??= {
    current: [],
    groups: [],
    fenced: false,
    unfenced: new Set(),
    inFlight: new Set(),
    operands: new Set(),
  };
  return warp.wgmma as WgmmaState;
}

export function wgmma(call: WarpCall): Outcome {
  const { m, i, first } = call;
  if (!isWhole(call)) return 'park';
  const state = stateOf(m.warp);
  switch (i.modifiers[0]) {
    case 'fence':
      state.fenced = true;
      state.unfenced.clear();
      return 'next';
    case 'commit_group':
      state.groups.push(state.current);
      state.current = [];
      return 'next';
    case 'wait_group': {
      const left = laneValue(call, i.operands[0], first);
      while (state.groups.length > left) for (const product of state.groups.shift()!) compute(m, product);
      const products = [...state.groups.flat(), ...state.current];
      state.inFlight = new Set(products.flatMap((p) => p.accumulators));
      state.operands = new Set(products.flatMap((p) => p.fragments));
      return 'next';
    }
    default:
      begin(call, state);
      return 'next';
  }
}

const forms = new WeakMap<Instruction, Form>();

function formOf(i: Instruction): Form {
  const known = forms.get(i);
  if (known) return known;
  const shape = /^m64n(\d+)k(16|32)$/.exec(i.modifiers.find((word) => word.startsWith('m64')) ?? '');
  const type = i.modifiers.at(-1) ?? '';
  const types = shape?.[2] === '32' ? ['e4m3'] : ['bf16', 'f16'];
  if (!shape || !types.includes(type) || !i.modifiers.includes('f32')) {
    throw new Error(`ptx: the virtual GPU does not know "${i.text}"`);
  }
  const form = {
    ...{ i, columns: Number(shape[1]), k: Number(shape[2]), type, accumulators: registersIn(i.operands[0]) },
    fragments: i.operands[1].kind === 'vector' ? registersIn(i.operands[1]) : [],
  };
  forms.set(i, form);
  return form;
}

function begin(call: WarpCall, state: WgmmaState): void {
  const { m, i } = call;
  const form = formOf(i);
  const { accumulators, fragments } = form;
  const isUnfenced = (r: Register) => state.unfenced.has(r);
  if (!state.fenced || (state.unfenced.size && (accumulators.some(isUnfenced) || fragments.some(isUnfenced))))
    fail(m, 'async', 'wgmma.mma_async without a wgmma.fence after its registers were written', 0, i);
  const fromRegisters = fragments.length > 0;
  const number = (x: Operand | undefined) => (x ? laneValue(call, x, 0) : 0);
  const rest = i.operands.slice(3);
  const accumulates = number(rest[0]);
  for (let l = 1; l < 32; l++)
    if (laneValue(call, rest[0], l) !== accumulates)
      fail(m, 'wgmma', 'whether to accumulate differs between threads', l, i);
  const product = {
    ...form,
    a: fromRegisters ? heldBy(m, fragments) : descriptor(call, i.operands[1]),
    b: descriptor(call, i.operands[2]),
    accumulate: accumulates !== 0,
    sign: number(rest[1]) * number(rest[2]),
    transposeA: !fromRegisters && number(rest[3]) !== 0,
    transposeB: number(fromRegisters ? rest[3] : rest[4]) !== 0,
  };
  const words = [product.b, ...('address' in product.a ? [product.a] : [])];
  runAsWarpgroup(call, [accumulates, ...words.flatMap((d) => Object.values(d))].join());
  state.current.push(product);
  for (const r of accumulators) state.inFlight.add(r);
  for (const r of fragments) state.operands.add(r);
  m.stats.matrixProducts++;
}

/** What registers hold now, 32 lanes each. */
function heldBy(m: Machine, registers: readonly Register[]): Int32Array {
  const held = new Int32Array(32 * registers.length);
  registers.forEach(({ plane }, n) => {
    const from = m.warp.base + plane * 32;
    for (let l = 0; l < 32; l++) held[32 * n + l] = m.registers[from + l];
  });
  return held;
}

function descriptor(call: WarpCall, x: Operand): Descriptor {
  const { m, i } = call;
  if (x.kind !== 'register') throw new Error(`ptx: the virtual GPU does not know "${i.text}"`);
  const at = m.warp.base + x.plane * 32;
  const [low, high] = [m.registers[at], m.registers[at + 32]];
  for (let l = 1; l < 32; l++) {
    if (m.registers[at + l] !== low || m.registers[at + 32 + l] !== high) {
      fail(m, 'wgmma', 'the descriptor differs between threads', l, i);
    }
  }
  if ((high >>> 17) & 7) fail(m, 'wgmma', 'the virtual GPU knows no descriptor with a base offset', 0, i);
  if (low & 0xc000c000 || high & 0x3ff1c000)
    fail(m, 'wgmma', 'the descriptor has bits outside its fields', 0, i);
  const field = (bits: number) => (bits & 0x3fff) << 4;
  return { address: field(low), leading: field(low >>> 16), stride: field(high), swizzle: high >>> 30 };
}

/** Byte address of element (row or column `mn`, `k`) of an operand of `size` bytes an element, 2 where transposed. */
function elementAddress(d: Descriptor, mn: number, k: number, transposed: boolean, size: number): number {
  const mask = [0, 0x70, 0x30, 0x10][d.swizzle];
  let ax: number;
  if (!transposed) {
    // Rows of the swizzle's span, eight to a group; without swizzle 16-byte rows of 8 x 8 core matrices.
    ax = d.address + (mn >> 3) * d.stride;
    if (d.swizzle === 0) ax += (mn & 7) * 16 + ((k * size) >> 4) * d.leading + ((k * size) & 15);
    else ax += (mn & 7) * (256 >> d.swizzle) + k * size;
  } else if (d.swizzle === 0)
    ax = d.address + (mn >> 3) * d.stride + (mn & 7) * 2 + (k & 7) * 16 + (k >> 3) * d.leading;
  else {
    const width = 128 >> d.swizzle;
    ax =
      d.address +
      Math.floor(mn / width) * d.leading +
      (mn % width) * 2 +
      (k & 7) * width * 2 +
      (k >> 3) * d.stride;
  }
  return ax ^ ((ax >>> 3) & mask);
}

/** Reads the columns of `count` rows of an operand into floats, in the 16-byte pieces that every layout keeps together. */
function readOperand(
  m: Machine,
  p: Product,
  d: Descriptor,
  transposed: boolean,
  from: number,
  count: number,
  into: Float32Array,
): void {
  const size = 32 / p.k;
  const values = valuesOf(p.type);
  const { u8, u16 } = m.shared;
  const held = size === 1 ? u8 : u16;
  const piece = 16 / size;
  const [rowStep, columnStep] = transposed ? [8, 1] : [1, piece];
  const step = transposed ? p.k : 1;
  for (let row = 0; row < count; row += rowStep) {
    for (let k = 0; k < p.k; k += columnStep) {
      const ax = elementAddress(d, from + row, k, transposed, size);
      readAsync(m, ax, 16, m.warp, allLanes, p.i);
      const at = ax / size;
      const to = row * p.k + k;
      for (let e = 0; e < piece; e++) into[to + e * step] = values[held[at + e]];
    }
  }
}

const tables = new Map<string, Float32Array>();

/** The number that each code of a type stands for. */
function valuesOf(type: string): Float32Array {
  const known = tables.get(type);
  if (known) return known;
  const value = { e4m3: num.fromE4m3, bf16: num.fromBf16, f16: num.fromF16 }[type]!;
  const table = Float32Array.from({ length: type === 'e4m3' ? 2 ** 8 : 2 ** 16 }, (_, code) => value(code));
  tables.set(type, table);
  return table;
}

/**
 * What Hopper keeps of sums of 8-bit products: 8 bits of exponent and 13 of mantissa, the rest cut off (measured on an H100 for
 * PyTorch's "Some Matrix Multiplication Engines Are Not As Accurate As We Thought"; DeepSeek-V3's report says some 14 bits).
 */
const FP22 = ~0x3ff;

function compute(m: Machine, p: Product): void {
  const { k, a: source, accumulate, sign } = p;
  if ('address' in source) readOperand(m, p, source, p.transposeA, (m.warp.id & 3) * 16, 16, a);
  else unpackA(16, p.type, source, 0, [0, 32, 64, 96]);
  readOperand(m, p, p.b, p.transposeB, 0, p.columns, b);
  const { floats, registers } = m;
  const kept = p.type === 'e4m3' ? FP22 : -1;
  const at = (n: number) => m.warp.base + p.accumulators[n].plane * 32;
  for (let j = 0; j < p.columns / 8; j++) {
    const [p0, p1, p2, p3] = [at(4 * j), at(4 * j + 1), at(4 * j + 2), at(4 * j + 3)];
    for (let l = 0; l < 32; l++) {
      let x = (l >> 2) * k;
      let u = (j * 8 + (l & 3) * 2) * k;
      let s0 = 0;
      let s1 = 0;
      let s2 = 0;
      let s3 = 0;
      for (const end = x + k; x < end; x++, u++) {
        const x0 = a[x];
        const x1 = a[x + 8 * k];
        const u0 = b[u];
        const u1 = b[u + k];
        s0 += x0 * u0;
        s1 += x0 * u1;
        s2 += x1 * u0;
        s3 += x1 * u1;
      }
      floats[p0 + l] = (accumulate ? floats[p0 + l] : 0) + sign * s0;
      floats[p1 + l] = (accumulate ? floats[p1 + l] : 0) + sign * s1;
      floats[p2 + l] = (accumulate ? floats[p2 + l] : 0) + sign * s2;
      floats[p3 + l] = (accumulate ? floats[p3 + l] : 0) + sign * s3;
      for (const plane of [p0, p1, p2, p3]) registers[plane + l] &= kept;
    }
  }
}

const usage = new WeakMap<Block, { touched: Register[]; written: Register[] }>();

/** Ordinary code of a warp that has used wgmma: it may not touch accumulators in flight; what it writes needs a fence. */
export function noteRegisters(m: Machine, block: Block): void {
  const state = m.warp.wgmma as WgmmaState;
  let known = usage.get(block);
  if (!known) {
    // Plain moves are left out: the compiler renames registers with them wherever it likes.
    const real = block.instructions.filter((i) => i.opcode !== 'mov' || i.operands[1]?.kind === 'vector');
    known = {
      touched: block.instructions.flatMap((i) => [...defines(i), ...reads(i)]),
      written: real.flatMap(defines),
    };
    usage.set(block, known);
  }
  const overwritten = known.written.find((r) => state.operands.has(r));
  if (overwritten) {
    const i = block.instructions.find((x) => defines(x).includes(overwritten))!;
    fail(m, 'async', `register ${overwritten.name} is written while wgmma still reads it`, 0, i);
  }
  const touched = known.touched.find((r) => state.inFlight.has(r));
  if (touched) {
    const i = block.instructions.find((x) => [...defines(x), ...reads(x)].includes(touched))!;
    fail(m, 'async', `register ${touched.name} is touched while wgmma has it in flight`, 0, i);
  }
  for (const r of known.written) state.unfenced.add(r);
}
