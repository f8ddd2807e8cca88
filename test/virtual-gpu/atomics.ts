// Atomic operations on global and shared memory. Bits come in and go out; a 64-bit result is left in num.result.
import { windows } from './emit.ts';
import { observe, release } from './grid_order.ts';
import type { Machine } from './machine.ts';
import * as num from './numbers.ts';
import type { Instruction } from './ptx.ts';
import { bytesOf, typeOf } from './ptx.ts';

const operations = new Set(['add', 'min', 'max', 'and', 'or', 'xor', 'exch', 'cas', 'inc', 'dec']);

export function newAtomics(m: Machine) {
  /** lane, window, offset, low and high of the value and of cas's new value, site; returns the old low bits. */
  return (
    lane: number,
    high: number,
    ax: number,
    low: number,
    highValue: number,
    low2: number,
    high2: number,
    site: number,
  ): number => {
    const i = m.kernel.source.instructions[site];
    const type = typeOf(i);
    const bytes = bytesOf(type);
    const shared = high === windows.shared;
    const memory = shared ? m.shared : m.global;
    const x = ax >>> 2;
    const written = bytes === 2 ? memory.shadow16[ax >>> 1] === 0x0303 : memory.shadow32[x] === 0x03030303;
    if (ax & (bytes - 1) || !written || (!shared && high !== windows.global)) {
      if (shared) m.fault.S(lane, high, ax, bytes, true, site);
      else m.fault.G(lane, high, ax, bytes, true, site);
    }
    if (shared) m.race.sharedWriteStrong(lane, ax, bytes, site);
    else {
      m.race.globalWriteStrong(lane, ax, bytes, site);
      const orders = (word: string) => i.modifiers.includes(word) || i.modifiers.includes('acq_rel');
      observe(m, ax, orders('acquire'));
      release(m, ax, orders('release'));
    }
    const operation = i.modifiers.find((word) => operations.has(word)) ?? 'add';
    if (bytes === 8) return atomicWide(m, memory.i32, x, operation, type, [low, highValue, low2, high2]);
    if (bytes === 2) {
      const old = memory.u16[ax >>> 1];
      memory.u16[ax >>> 1] = combine(operation, type, old, low & 0xffff, low2, i);
      return old;
    }
    const old = memory.i32[x];
    memory.i32[x] = combine(operation, type, old, low, low2, i);
    return old;
  };
}

function combine(
  operation: string,
  type: string,
  old: number,
  value: number,
  other: number,
  i: Instruction,
): number {
  const unsignedType = type[0] === 'u';
  switch (operation) {
    case 'add':
      if (type === 'f32') return num.bitsOfFloat(Math.fround(num.floatOfBits(old) + num.floatOfBits(value)));
      if (type === 'f16x2') return num.pairwiseF16((a, b) => a + b, old, value);
      if (type === 'bf16x2') return num.pairwiseBf16((a, b) => a + b, old, value);
      if (type === 'f16') return num.toF16(num.fromF16(old) + num.fromF16(value));
      if (type === 'bf16') return num.toBf16(num.fromBf16(old) + num.fromBf16(value));
      return (old + value) | 0;
    case 'min':
      return unsignedType ? Math.min(old >>> 0, value >>> 0) | 0 : Math.min(old, value);
    case 'max':
      return unsignedType ? Math.max(old >>> 0, value >>> 0) | 0 : Math.max(old, value);
    case 'and':
      return old & value;
    case 'or':
      return old | value;
    case 'xor':
      return old ^ value;
    case 'exch':
      return value;
    case 'cas':
      return old === value ? other : old;
    case 'inc':
      return old >>> 0 >= value >>> 0 ? 0 : (old + 1) | 0;
    case 'dec':
      return old === 0 || old >>> 0 > value >>> 0 ? value : (old - 1) | 0;
    default:
      throw new Error(`ptx: the virtual GPU does not know "${i.text}"`);
  }
}

function atomicWide(
  m: Machine,
  words: Int32Array,
  x: number,
  operation: string,
  type: string,
  [low, high, low2, high2]: readonly number[],
): number {
  const long = (a: number, b: number) => (BigInt(b) << 32n) | BigInt(a >>> 0);
  const [oldLow, oldHigh] = [words[x], words[x + 1]];
  const fit = (value: bigint) => (type[0] === 'u' ? BigInt.asUintN(64, value) : BigInt.asIntN(64, value));
  const old = fit(long(oldLow, oldHigh));
  const value = fit(long(low, high));
  let made: bigint;
  if (type === 'f64') {
    const sum = num.doubleOfBits(oldLow, oldHigh) + num.doubleOfBits(low, high);
    made = long(num.lowOfDouble(sum), num.highOfDouble(sum));
  } else if (operation === 'add') made = old + value;
  else if (operation === 'min') made = old < value ? old : value;
  else if (operation === 'max') made = old > value ? old : value;
  else if (operation === 'and') made = old & value;
  else if (operation === 'or') made = old | value;
  else if (operation === 'xor') made = old ^ value;
  else if (operation === 'exch') made = value;
  else if (operation === 'cas') made = old === value ? long(low2, high2) : old;
  else
    throw new Error(
      `ptx: the virtual GPU has no 64-bit atomic ${operation} (kernel ${m.kernel.source.name})`,
    );
  words[x] = Number(BigInt.asIntN(32, made));
  words[x + 1] = Number(BigInt.asIntN(32, made >> 32n));
  num.result[0] = oldLow;
  num.result[1] = oldHigh;
  return oldLow;
}
