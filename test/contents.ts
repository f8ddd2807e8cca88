// A safetensors file as text that tests compare: names, shapes and numbers, whatever type they are stored in.
import { decodeFloats } from '../io/dtype.ts';
import { openSafetensors } from '../io/safetensors.ts';

/** Every tensor as `shape: values`, by name. */
export function contents(path: string): Map<string, string> {
  const file = openSafetensors(path);
  const found = new Map(
    [...file.tensors.values()].map(({ name, shape, dtype }) => {
      return [name, `${shape}: ${decodeFloats(file.read(name), dtype)}`];
    }),
  );
  file.close();
  return found;
}
