// Memory with a shadow. Each byte has a shadow byte that says allocated (1) and initialised (2), and generated code
// tests a word of shadow per word of memory, so that one comparison covers bounds and initialisation. Global memory is
// one arena: allocations lie 512 bytes apart with red zones between, and addresses are reused only when it is full.
import { windows } from './emit.ts';

export const allocated = 1;
export const initialised = 2;
/** Fills memory that nobody has written: a NaN as float32 and as two bfloat16. */
export const poison = 0x7fe17fe1;

export interface Memory {
  readonly i32: Int32Array;
  readonly f32: Float32Array;
  readonly u16: Uint16Array;
  readonly u8: Uint8Array;
  readonly shadow32: Int32Array;
  readonly shadow16: Uint16Array;
  readonly shadow8: Uint8Array;
}

export function newMemory(bytes: number): Memory {
  const data = new ArrayBuffer(bytes);
  const shadow = new ArrayBuffer(bytes);
  return {
    i32: new Int32Array(data),
    f32: new Float32Array(data),
    u16: new Uint16Array(data),
    u8: new Uint8Array(data),
    shadow32: new Int32Array(shadow),
    shadow16: new Uint16Array(shadow),
    shadow8: new Uint8Array(shadow),
  };
}

interface Allocation {
  readonly offset: number;
  readonly bytes: number;
  live: boolean;
}

export interface Arena {
  readonly memory: Memory;
  /** Undefined when no room is left. */
  allocate(bytes: number): bigint | undefined;
  /** False for an address that is not the start of a live allocation. */
  free(address: bigint): boolean;
  /** The offset of `bytes` at an address within one live allocation, undefined where they are not. */
  resolve(address: bigint, bytes: number): number | undefined;
  /** Words for a report: the allocation next to an offset. */
  describe(offset: number): string;
}

const gap = 512;
const firstOffset = 4096;

/** An arena that ends at the offset `bytes`, and whose allocations begin at `begin`. */
export function newArena(bytes: number, begin = 0): Arena {
  const memory = newMemory(bytes);
  /** In order of offset. */
  const allocations: Allocation[] = [];
  const starts = new Map<number, Allocation>();
  const freed: Allocation[] = [];
  let top = begin + firstOffset;

  const windowOf = (address: bigint) => Number(address >> 32n);
  const offsetOf = (address: bigint) => Number(address & 0xffffffffn);
  /** The last allocation that starts at or before the offset. */
  const before = (offset: number): Allocation | undefined => {
    let low = 0;
    let high = allocations.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (allocations[middle].offset <= offset) low = middle + 1;
      else high = middle;
    }
    return allocations[low - 1];
  };
  const spanOf = (size: number) => Math.ceil(Math.max(size, 1) / gap) * gap;

  /** A freed place of the same span, taken only when the arena is full: until then a use after free stays visible. */
  const reuse = (size: number): Allocation | undefined => {
    const index = freed.findIndex((a) => spanOf(a.bytes) === spanOf(size));
    if (index < 0) return undefined;
    const [old] = freed.splice(index, 1);
    const made = { offset: old.offset, bytes: size, live: true };
    allocations[allocations.indexOf(old)] = made;
    return made;
  };

  return {
    memory,
    allocate(size) {
      let made: Allocation | undefined;
      if (top + spanOf(size) + gap <= bytes) {
        made = { offset: top, bytes: size, live: true };
        top += spanOf(size) + gap;
        allocations.push(made);
      } else made = reuse(size);
      if (!made) return undefined;
      starts.set(made.offset, made);
      memory.shadow8.fill(allocated, made.offset, made.offset + size);
      return (BigInt(windows.global) << 32n) | BigInt(made.offset);
    },
    free(address) {
      const found = windowOf(address) === windows.global ? starts.get(offsetOf(address)) : undefined;
      if (!found?.live) return false;
      found.live = false;
      freed.push(found);
      memory.shadow8.fill(0, found.offset, found.offset + found.bytes);
      return true;
    },
    resolve(address, size) {
      const offset = offsetOf(address);
      const found = windowOf(address) === windows.global ? before(offset) : undefined;
      return found?.live && offset + size <= found.offset + found.bytes ? offset : undefined;
    },
    describe(offset) {
      const found = before(offset) ?? allocations[0];
      if (!found) return 'nothing is allocated';
      const state = found.live ? '' : 'freed ';
      return `${offset - found.offset} bytes from the start of a ${state}${found.bytes}-byte allocation`;
    },
  };
}
