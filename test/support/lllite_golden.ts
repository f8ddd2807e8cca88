// The ControlNet-LLLites that golden/lllite.jsonl was made with: their weights are the formulas of ControlNets'.
import { encodeNumbers } from '../../io/dtype.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import { weight } from './controlnet_golden.ts';
import { goldenLines } from './golden.ts';

type Keys = Readonly<Record<string, readonly number[]>>;

/** The shapes of the weights of `edges`, whose layers are those of kohya's script, and `everywhere`, which has the way up too. */
export const llliteKeys: Readonly<Record<string, Keys>> = Object.fromEntries(
  goldenLines<{ net?: string; keys: Keys }>('lllite').flatMap(({ net, keys }) => (net ? [[net, keys]] : [])),
);

/** Writes the file of one of them, or of other shapes. */
export function writeLLLite(path: string, name: string, keys: Keys = llliteKeys[name]): string {
  const entries = Object.entries(keys).map(([key, shape]) => ({
    ...{ name: key, dtype: 'float16' as const, shape },
    bytes: encodeNumbers(weight(name, key, shape), 'float16'),
  }));
  writeSafetensors(path, entries);
  return path;
}
