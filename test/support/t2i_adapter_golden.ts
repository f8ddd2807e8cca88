// The T2I-Adapters that golden/t2i_adapter.jsonl was made with: their weights are the formulas of ControlNets'.
import type { Json } from '../../models/checkpoint/checkpoint.ts';
import { writeComponent } from './controlnet_golden.ts';
import { goldenLines } from './golden.ts';

/** Diffusers' config and the shapes of the weights of `edges`, which sees colours, and `sketch`, which sees grey. */
export const t2iAdapters = goldenLines<{ adapter?: string; config: Json; keys: Record<string, number[]> }>(
  't2i_adapter',
).flatMap(({ adapter, config, keys }) => (adapter ? [{ name: adapter, config, keys }] : []));

/** Writes the folder of one of them, perhaps with another config. */
export function writeT2IAdapter(folder: string, name: string, more: Json = {}): string {
  const { config, keys } = t2iAdapters.find((each) => each.name === name) as (typeof t2iAdapters)[number];
  return writeComponent(folder, name, { ...config, ...more }, Object.entries(keys));
}
