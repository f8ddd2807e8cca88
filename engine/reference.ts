// The reference device's memory: ordinary JavaScript buffers. It launches no kernels, because op records bring their
// own loops; asking it to is a bug in the engine.
import type { Driver } from './memory.ts';

export function referenceDriver(): Driver {
  return {
    allocate(bytes) {
      try {
        return { bytes, address: 0n, host: new Uint8Array(bytes) };
      } catch {
        return undefined;
      }
    },
    free() {},
    upload: (block, offset, source) => block.host?.set(source, offset),
    download: (block, offset, target) =>
      target.set((block.host as Uint8Array).subarray(offset, offset + target.length)),
    clear: (block, bytes) => block.host?.fill(0, 0, bytes),
    launch(symbol) {
      throw new Error(`the reference device has no kernels, yet ${symbol} was launched`);
    },
  };
}
