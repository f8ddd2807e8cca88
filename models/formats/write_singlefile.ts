// The original single file's tensors from a model under diffusers' keys: the other direction of singlefile.ts, through the
// same spelling. Fused matrices are put together from their thirds, the bare text projection is turned, and the VAE's
// attention goes back to 1x1 convolutions. Marks say what a folder's scheduler does (marks.ts).
import { bytesOf, type TensorEntry } from '../../io/safetensors.ts';
import type { ModelSource } from '../checkpoint/checkpoint.ts';
import { isVaeAttention, type Origin, sgmLayout, sgmOrigin } from './sgm_keys.ts';
import { transposed } from './singlefile.ts';

/** `entriesOf` gives a component's tensors under diffusers' keys; bytes are made when they are asked for. */
export function singleFileEntries(
  source: ModelSource,
  components: readonly string[],
  entriesOf: (component: string) => TensorEntry[],
  marks: readonly TensorEntry[],
): TensorEntry[] {
  const layout = sgmLayout(!source.has('text_encoder'));
  const weights = components.flatMap((component) => {
    const origin = sgmOrigin(component, source.config, layout);
    const parts = new Map<string, { from: Origin; entry: TensorEntry }[]>();
    for (const entry of entriesOf(component)) {
      const from = origin(entry.name);
      parts.set(from.name, [...(parts.get(from.name) ?? []), { from, entry }]);
    }
    return [...parts].map(([name, group]) => (group.length > 1 ? fused(name, group) : plain(name, group[0])));
  });
  return [...weights, ...marks];
}

function plain(name: string, { from, entry }: { from: Origin; entry: TensorEntry }): TensorEntry {
  const { dtype, shape } = entry;
  if (from.transposed)
    return { name, dtype, shape: shape.toReversed(), bytes: () => transposed(bytesOf(entry), shape, dtype) };
  return { ...entry, name, shape: isVaeAttention(name) ? [...shape, 1, 1] : shape };
}

/** q, k and v one below the other. */
function fused(name: string, group: { from: Origin; entry: TensorEntry }[]): TensorEntry {
  const thirds = group
    .toSorted((a, b) => (a.from.third ?? 0) - (b.from.third ?? 0))
    .map(({ entry }) => entry);
  const { dtype, shape } = thirds[0];
  return {
    name,
    dtype,
    shape: [shape[0] * thirds.length, ...shape.slice(1)],
    bytes: () => Buffer.concat(thirds.map((third) => bytesOf(third).slice())),
  };
}
