// Warp-wide matrix instructions of sm_80: mma.sync, ldmatrix and stmatrix. Fragments are laid out as the PTX ISA draws
// them: lane l holds row l / 4 and columns 2 (l % 4), +1 of each 8 x 8 (or 8 x 16-byte) part. Products are summed in
// float64 and rounded once; a tensor core rounds in its own way, so results are compared with a tolerance.
import { readRegister } from './machine.ts';
import * as num from './numbers.ts';
import type { Operand, Register } from './ptx.ts';
import type { WarpCall } from './warp_ops.ts';
import { laneValue } from './warp_ops.ts';

export function registersIn(x: Operand): readonly Register[] {
  return (x.kind === 'vector' ? x.elements : [x]) as readonly Register[];
}

/** Byte offsets of the eight rows of matrix `j`, given by lanes 8j to 8j+7; each is tested and told to the detectors. */
function matrixRows(call: WarpCall, address: Operand, j: number, load: boolean): number[] {
  const { m, i } = call;
  return Array.from({ length: 8 }, (_, r) => {
    const lane = j * 8 + r;
    const ax = laneValue(call, address, lane);
    const x = ax >>> 2;
    const shadow = m.shared.shadow32;
    const want = load ? 0x03030303 : 0x01010101;
    let good = (ax & 15) === 0;
    for (let k = 0; k < 4; k++) good &&= (shadow[x + k] & want) === want;
    if (!good) m.fault.S(lane, 0, ax, 16, load, i.site);
    if (load) m.race.sharedRead(lane, ax, 16, i.site);
    else {
      shadow.fill(0x03030303, x, x + 4);
      m.race.sharedWrite(lane, ax, 16, i.site);
    }
    return ax >>> 1;
  });
}

const matrixCount = (words: readonly string[]): number =>
  words.includes('x4') ? 4 : words.includes('x2') ? 2 : 1;

export function loadMatrix(call: WarpCall): void {
  const { m, i } = call;
  const halves = m.shared.u16;
  const targets = registersIn(i.operands[0]);
  const transposed = i.modifiers.includes('trans');
  const all = Array.from({ length: matrixCount(i.modifiers) }, (_, j) =>
    matrixRows(call, i.operands[1], j, true),
  );
  all.forEach((rows, j) => {
    const plane = m.warp.base + targets[j].plane * 32;
    for (let l = 0; l < 32; l++) {
      const c = (l & 3) * 2;
      const r = l >> 2;
      m.registers[plane + l] = transposed
        ? halves[rows[c] + r] | (halves[rows[c + 1] + r] << 16)
        : halves[rows[r] + c] | (halves[rows[r] + c + 1] << 16);
    }
  });
}

export function storeMatrix(call: WarpCall): void {
  const { m, i } = call;
  const halves = m.shared.u16;
  const transposed = i.modifiers.includes('trans');
  registersIn(i.operands[1]).forEach((source, j) => {
    const rows = matrixRows(call, i.operands[0], j, false);
    for (let l = 0; l < 32; l++) {
      const c = (l & 3) * 2;
      const r = l >> 2;
      const value = readRegister(m, source, l);
      const [low, high] = transposed ? [rows[c] + r, rows[c + 1] + r] : [rows[r] + c, rows[r] + c + 1];
      halves[low] = value & 0xffff;
      halves[high] = value >>> 16;
    }
  });
}

/** a[row * k + column] and b[column * k + row] of the fragments, as floats; large enough for wgmma's 256 columns of 32 bytes. */
export const a = new Float32Array(16 * 32);
export const b = new Float32Array(256 * 32);
const aBits = new Int32Array(a.buffer);
const bBits = new Int32Array(b.buffer);

/** Writes the two halves of a packed register at index `at` as floats. */
export function unpackPair(
  into: Float32Array,
  bits: Int32Array,
  at: number,
  value: number,
  type: string,
): void {
  if (type === 'bf16') {
    bits[at] = value << 16;
    bits[at + 1] = value & 0xffff0000;
  } else {
    into[at] = num.fromF16(value & 0xffff);
    into[at + 1] = num.fromF16(value >>> 16);
  }
}

/** Fills `a` from 16-bit fragments of k = 8 or 16 columns held by `value(register, lane)`. */
export function unpackA(k: number, type: string, value: (register: number, lane: number) => number): void {
  for (let l = 0; l < 32; l++) {
    for (let j = 0; j < k / 4; j++) {
      const at = ((l >> 2) + (j & 1) * 8) * k + (l & 3) * 2 + (j >> 1) * 8;
      unpackPair(a, aBits, at, value(j, l), type);
    }
  }
}

function unpackB(k: number, type: string, value: (register: number, lane: number) => number): void {
  for (let l = 0; l < 32; l++) {
    for (let j = 0; j < k / 8; j++)
      unpackPair(b, bBits, (l >> 2) * k + (l & 3) * 2 + j * 8, value(j, l), type);
  }
}

/** tf32 fragments hold one element a register; the low 13 bits of a float32 do not count. */
function unpackTf32(k: number, value: (operand: number, register: number, lane: number) => number): void {
  for (let l = 0; l < 32; l++) {
    const row = l >> 2;
    const column = l & 3;
    for (let j = 0; j < k / 2; j++)
      aBits[(row + (j & 1) * 8) * k + column + (j >> 1) * 4] = value(0, j, l) & ~0x1fff;
    for (let j = 0; j < k / 4; j++) bBits[row * k + column + j * 4] = value(1, j, l) & ~0x1fff;
  }
}

/** mma.sync.aligned.m16n8k{4,8,16}.row.col.{f32,f16}.T.T.{f32,f16} for T bf16, f16 or tf32. */
export function multiplyMatrix({ m, i }: WarpCall): void {
  const shape = /^m16n8k(\d+)$/.exec(i.modifiers.find((word) => word.startsWith('m16n8')) ?? '');
  const type = i.modifiers.at(-2) ?? '';
  const k = Number(shape?.[1]);
  if (!shape || !['bf16', 'f16', 'tf32'].includes(type))
    throw new Error(`ptx: the virtual GPU does not know "${i.text}"`);
  const [d, first, second, c] = i.operands.map(registersIn);
  const at = (r: Register) => m.warp.base + r.plane * 32;
  const value = (registers: readonly Register[]) => (j: number, l: number) =>
    m.registers[at(registers[j]) + l];
  if (type === 'tf32') unpackTf32(k, (operand, j, l) => value(operand ? second : first)(j, l));
  else {
    unpackA(k, type, value(first));
    unpackB(k, type, value(second));
  }
  const isHalf = i.modifiers.at(-1) === 'f16';
  const from = c.map(at);
  const to = d.map(at);
  const { floats, registers } = m;
  for (let l = 0; l < 32; l++) {
    const ra = (l >> 2) * k;
    const rb = (l & 3) * 2 * k;
    const c0 = isHalf ? num.fromF16(registers[from[0] + l] & 0xffff) : floats[from[0] + l];
    const c1 = isHalf ? num.fromF16(registers[from[0] + l] >>> 16) : floats[from[1] + l];
    const c2 = isHalf ? num.fromF16(registers[from[1] + l] & 0xffff) : floats[from[2] + l];
    const c3 = isHalf ? num.fromF16(registers[from[1] + l] >>> 16) : floats[from[3] + l];
    let [s0, s1, s2, s3] = [c0, c1, c2, c3];
    for (let q = 0; q < k; q++) {
      const x = a[ra + q];
      const y = a[ra + 8 * k + q];
      const u = b[rb + q];
      const v = b[rb + k + q];
      s0 += x * u;
      s1 += x * v;
      s2 += y * u;
      s3 += y * v;
    }
    if (isHalf) {
      registers[to[0] + l] = num.toF16(s0) | (num.toF16(s1) << 16);
      registers[to[1] + l] = num.toF16(s2) | (num.toF16(s3) << 16);
    } else {
      floats[to[0] + l] = s0;
      floats[to[1] + l] = s1;
      floats[to[2] + l] = s2;
      floats[to[3] + l] = s3;
    }
  }
  m.stats.matrixProducts++;
}
