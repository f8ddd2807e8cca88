// Warp-wide matrix instructions of sm_80: mma.sync, ldmatrix and stmatrix. Fragments are laid out as the PTX ISA draws
// them: lane l holds row l / 4 and columns 2 (l % 4), +1 of each 8 x 8 (or 8 x 16-byte) part. Products are summed in
// float64 and rounded once; a tensor core rounds in its own way, so results are compared with a tolerance.
import { readRegister } from './machine.ts';
import * as num from './numbers.ts';
import type { Instruction, Operand, Register } from './ptx.ts';
import type { WarpCall } from './warp_ops.ts';
import { laneValue } from './warp_ops.ts';

export function registersIn(x: Operand): readonly Register[] {
  return (x.kind === 'vector' ? x.elements : [x]) as readonly Register[];
}

/** Where the rows of the matrices lie, in halves: row r of matrix j at 8 j + r. */
const rowAt = new Int32Array(32);

/** Takes the rows' addresses from the lanes; each is tested and told to the detectors. */
function findRows(call: WarpCall, address: Operand, count: number, load: boolean): void {
  const { m, i } = call;
  const { shadow32 } = m.shared;
  const want = load ? 0x03030303 : 0x01010101;
  for (let lane = 0; lane < 8 * count; lane++) {
    const ax = laneValue(call, address, lane);
    const x = ax >>> 2;
    let good = (ax & 15) === 0;
    for (let k = 0; k < 4; k++) good &&= (shadow32[x + k] & want) === want;
    if (!good) m.fault.S(lane, 0, ax, 16, load, i.site);
    if (load) m.race.sharedRead(lane, ax, 16, i.site);
    else {
      shadow32.fill(0x03030303, x, x + 4);
      m.race.sharedWrite(lane, ax, 16, i.site);
    }
    rowAt[lane] = ax >>> 1;
  }
}

const matrixCount = (words: readonly string[]): number =>
  words.includes('x4') ? 4 : words.includes('x2') ? 2 : 1;

export function loadMatrix(call: WarpCall): void {
  const { m, i } = call;
  const halves = m.shared.u16;
  const targets = registersIn(i.operands[0]);
  const transposed = i.modifiers.includes('trans');
  const count = matrixCount(i.modifiers);
  findRows(call, i.operands[1], count, true);
  for (let j = 0; j < count; j++) {
    const plane = m.warp.base + targets[j].plane * 32;
    for (let l = 0; l < 32; l++) {
      const c = (l & 3) * 2;
      const r = l >> 2;
      m.registers[plane + l] = transposed
        ? halves[rowAt[8 * j + c] + r] | (halves[rowAt[8 * j + c + 1] + r] << 16)
        : halves[rowAt[8 * j + r] + c] | (halves[rowAt[8 * j + r] + c + 1] << 16);
    }
  }
}

export function storeMatrix(call: WarpCall): void {
  const { m, i } = call;
  const halves = m.shared.u16;
  const transposed = i.modifiers.includes('trans');
  const sources = registersIn(i.operands[1]);
  findRows(call, i.operands[0], sources.length, false);
  sources.forEach((source, j) => {
    for (let l = 0; l < 32; l++) {
      const c = (l & 3) * 2;
      const r = l >> 2;
      const value = readRegister(m, source, l);
      halves[transposed ? rowAt[8 * j + c] + r : rowAt[8 * j + r] + c] = value & 0xffff;
      halves[transposed ? rowAt[8 * j + c + 1] + r : rowAt[8 * j + r] + c + 1] = value >>> 16;
    }
  });
}

/** a[row * k + column] and b[column * k + row] of the fragments, as floats; large enough for wgmma's 256 columns of 32 bytes. */
export const a = new Float32Array(16 * 32);
export const b = new Float32Array(256 * 32);
const aBits = new Int32Array(a.buffer);
const bBits = new Int32Array(b.buffer);

/** Writes the two halves of a packed register at index `at` as floats. */
function unpackPair(into: Float32Array, bits: Int32Array, at: number, value: number, type: string): void {
  if (type === 'bf16') {
    bits[at] = value << 16;
    bits[at + 1] = value & 0xffff0000;
  } else {
    into[at] = num.fromF16(value & 0xffff);
    into[at + 1] = num.fromF16(value >>> 16);
  }
}

/** Where the registers of a fragment lie, 32 lanes each. */
type Places = readonly number[];

/** Fills `a` from a 16-bit fragment of k = 8 or 16 columns, whose places in `bits` begin at `base`. */
export function unpackA(k: number, type: string, bits: Int32Array, base: number, places: Places): void {
  for (let j = 0; j < k / 4; j++) {
    const from = base + places[j];
    for (let l = 0; l < 32; l++) {
      const at = ((l >> 2) + (j & 1) * 8) * k + (l & 3) * 2 + (j >> 1) * 8;
      unpackPair(a, aBits, at, bits[from + l], type);
    }
  }
}

function unpackB(k: number, type: string, bits: Int32Array, base: number, places: Places): void {
  for (let j = 0; j < k / 8; j++) {
    const from = base + places[j];
    for (let l = 0; l < 32; l++)
      unpackPair(b, bBits, (l >> 2) * k + (l & 3) * 2 + j * 8, bits[from + l], type);
  }
}

/** tf32 fragments hold one element a register; the low 13 bits of a float32 do not count. */
function unpackTf32(k: number, bits: Int32Array, base: number, first: Places, second: Places): void {
  for (let l = 0; l < 32; l++) {
    const row = l >> 2;
    const column = l & 3;
    for (let j = 0; j < k / 2; j++)
      aBits[(row + (j & 1) * 8) * k + column + (j >> 1) * 4] = bits[base + first[j] + l] & ~0x1fff;
    for (let j = 0; j < k / 4; j++) bBits[row * k + column + j * 4] = bits[base + second[j] + l] & ~0x1fff;
  }
}

interface Form {
  readonly type: string;
  readonly k: number;
  /** Whether sums are halves. */
  readonly isHalf: boolean;
  /** d, a, b, c, from the start of a warp's registers on. */
  readonly operands: readonly Places[];
}

const forms = new WeakMap<Instruction, Form>();

function formOf(i: Instruction): Form {
  const known = forms.get(i);
  if (known) return known;
  const shape = /^m16n8k(\d+)$/.exec(i.modifiers.find((word) => word.startsWith('m16n8')) ?? '');
  const type = i.modifiers.at(-2) ?? '';
  if (!shape || !['bf16', 'f16', 'tf32'].includes(type))
    throw new Error(`ptx: the virtual GPU does not know "${i.text}"`);
  const form = {
    ...{ type, k: Number(shape[1]), isHalf: i.modifiers.at(-1) === 'f16' },
    operands: i.operands.map((x) => registersIn(x).map(({ plane }) => plane * 32)),
  };
  forms.set(i, form);
  return form;
}

/** mma.sync.aligned.m16n8k{4,8,16}.row.col.{f32,f16}.T.T.{f32,f16} for T bf16, f16 or tf32. */
export function multiplyMatrix({ m, i }: WarpCall): void {
  const { type, k, isHalf, operands } = formOf(i);
  const { floats, registers } = m;
  const { base } = m.warp;
  const [to, first, second, from] = operands;
  if (type === 'tf32') unpackTf32(k, registers, base, first, second);
  else {
    unpackA(k, type, registers, base, first);
    unpackB(k, type, registers, base, second);
  }
  for (let l = 0; l < 32; l++) {
    const at = base + l;
    // Not as an array: one for each lane of each product would keep the collector busy.
    let s0 = isHalf ? num.fromF16(registers[at + from[0]] & 0xffff) : floats[at + from[0]];
    let s1 = isHalf ? num.fromF16(registers[at + from[0]] >>> 16) : floats[at + from[1]];
    let s2 = isHalf ? num.fromF16(registers[at + from[1]] & 0xffff) : floats[at + from[2]];
    let s3 = isHalf ? num.fromF16(registers[at + from[1]] >>> 16) : floats[at + from[3]];
    let x = (l >> 2) * k;
    let u = (l & 3) * 2 * k;
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
    if (isHalf) {
      registers[at + to[0]] = num.toF16(s0) | (num.toF16(s1) << 16);
      registers[at + to[1]] = num.toF16(s2) | (num.toF16(s3) << 16);
    } else {
      floats[at + to[0]] = s0;
      floats[at + to[1]] = s1;
      floats[at + to[2]] = s2;
      floats[at + to[3]] = s3;
    }
  }
  m.stats.matrixProducts++;
}
