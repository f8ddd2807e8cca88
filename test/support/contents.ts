// A safetensors file as text that tests compare: names, shapes and numbers, whatever type they are stored in.
import { createHash } from 'node:crypto';
import { decodeFloats } from '../../io/dtype.ts';
import { openSafetensors } from '../../io/safetensors.ts';

/** Every tensor as `shape: digest of its numbers`, by name. */
export function contents(path: string): Map<string, string> {
  const file = openSafetensors(path);
  const found = new Map(
    [...file.tensors.values()].map(({ name, shape, dtype }) => {
      return [name, `${shape}: ${digestOf(decodeFloats(file.read(name), dtype))}`];
    }),
  );
  file.close();
  return found;
}

/** Numbers that are equal have the same, and zero's sign does not count. As decimals they would take seconds for a small model. */
export const digestOf = (values: Float32Array): string =>
  createHash('sha256')
    .update(values.map((value) => value + 0))
    .digest('hex');

/** What `sdxl sample --save-latents` has written. */
export function savedLatents(path: string): Float32Array {
  const file = openSafetensors(path);
  const values = decodeFloats(file.read('latents'), 'float32');
  file.close();
  return values;
}
