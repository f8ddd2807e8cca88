// Copies of the driver and the memory of a virtual GPU: their bytes have to lie in one live allocation, and what is read has to
// have been written.
import { type Arena, initialised } from './memory.ts';
import { GpuReport } from './report.ts';

export interface Copies {
  /** The arena offset of `bytes` at an address. */
  range(call: string, address: bigint, bytes: number): number;
  read(call: string, address: bigint, bytes: number): Uint8Array;
  write(call: string, address: bigint, bytes: Uint8Array): void;
}

export function openCopies(arena: Arena): Copies {
  const { u8, shadow8 } = arena.memory;
  const range = (call: string, address: bigint, bytes: number): number => {
    const offset = arena.resolve(address, bytes);
    if (offset === undefined) {
      const near = arena.describe(Number(address & 0xffffffffn));
      throw new GpuReport(
        'out of bounds',
        `${call} of ${bytes} bytes at 0x${address.toString(16)} (${near})`,
      );
    }
    return offset;
  };
  return {
    range,
    read(call, address, bytes) {
      const from = range(call, address, bytes);
      for (let b = 0; b < bytes; b++) {
        if (shadow8[from + b] & initialised) continue;
        const near = arena.describe(from + b);
        throw new GpuReport(
          'uninitialised',
          `${call} reads byte ${b} of ${bytes}, ${near}, that nothing has written`,
        );
      }
      return u8.slice(from, from + bytes);
    },
    write(call, address, bytes) {
      const to = range(call, address, bytes.byteLength);
      u8.set(bytes, to);
      shadow8.fill(3, to, to + bytes.byteLength);
    },
  };
}
