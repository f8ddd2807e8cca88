// The reference device: ordinary JavaScript buffers, over which a record's own loops run in TypeScript. It launches no kernels;
// asking it to is a bug in the engine.
import { bytesPerElement, decodeFloats, encodeNumbers, isFloat } from '../io/dtype.ts';
import { eagerStep } from './capture.ts';
import type { Device } from './device.ts';
import type { Driver } from './driver.ts';
import { MemoryPool } from './memory.ts';
import type { RefTensors } from './op.ts';
import type { Tensor } from './tensor.ts';

export function referenceDevice(): Device {
  const driver = referenceDriver();
  return {
    name: 'reference',
    driver,
    memory: new MemoryPool(driver),
    step: eagerStep,
    together: (fn) => fn(),
    executeAll(calls) {
      for (const { record, tensors, attrs } of calls) this.execute(record, 'forward', tensors, attrs);
    },
    execute(record, direction, tensors, attrs) {
      const arrays: RefTensors = {};
      for (const [name, t] of Object.entries(tensors))
        arrays[name] = { shape: t.shape, dtype: t.dtype, data: hostFloats(t) };
      const run = direction === 'forward' ? record.reference.forward : record.reference.backward;
      if (!run) throw new Error(`op ${record.name} has no reference ${direction}`);
      run(arrays, attrs);
      for (const [name, t] of Object.entries(tensors)) {
        const written = isFloat(t.dtype) || name === 'y' || record.updates?.includes(name);
        if (written && !isView(t)) storeNumbers(t, arrays[name].data);
      }
    },
    add(sum, a, b) {
      const [left, right] = [hostFloats(a), hostFloats(b)];
      storeNumbers(
        sum,
        left.map((x, i) => x + right[i]),
      );
    },
  };
}

const isView = (t: Tensor): boolean => t.dtype === 'float32';

/** float32 tensors are seen in place; every other type is converted to float32 and stored back after the op. */
function hostFloats(t: Tensor): Float32Array {
  const host = t.block.host as Uint8Array;
  const bytes = host.subarray(0, t.size * bytesPerElement[t.dtype]);
  return isView(t) ? new Float32Array(bytes.buffer, bytes.byteOffset, t.size) : decodeFloats(bytes, t.dtype);
}

function storeNumbers(t: Tensor, values: ArrayLike<number>): void {
  (t.block.host as Uint8Array).set(encodeNumbers(values, t.dtype));
}

function referenceDriver(): Driver {
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
