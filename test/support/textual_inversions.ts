// Textual inversions of golden/textual_inversion.jsonl, whose vectors a formula gives, as files; and prompts with them as a tiny model's
// text encoders see them.
import { join } from 'node:path';
import type { Test } from 'tap';
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { scope } from '../../engine/scope.ts';
import { encodeNumbers } from '../../io/dtype.ts';
import { writeSafetensors } from '../../io/safetensors.ts';
import { openModel } from '../../models/checkpoint/checkpoint.ts';
import { loadPipeline, type Pipeline } from '../../models/pipeline.ts';
import { encodePrompts, type Prompts } from '../../models/text/conditioning.ts';
import { goldenFolder } from './golden.ts';

/** The k-th embedding of the golden cases: vectors [count, width]. */
export const vectors = (count: number, width: number, k: number) =>
  Float32Array.from({ length: count * width }, (_, at) => {
    const [i, c] = [Math.floor(at / width), at % width];
    return (((k * 7 + i * 31 + c * 17) % 101) - 50) / 250;
  });

type Entry = [name: string, shape: number[], values: Float32Array];

export function write(path: string, ...entries: Entry[]): string {
  writeSafetensors(
    path,
    entries.map(([name, shape, values]) => ({
      name,
      shape,
      dtype: 'float32',
      bytes: encodeNumbers(values, 'float32'),
    })),
  );
  return path;
}

/** <toy> of three vectors as diffusers' script leaves them, mystyle of one without its own axis as others may. */
export function embeddings(t: Test): { toy: string; style: string } {
  const folder = t.testdir({ toy: {} });
  const toy = join(folder, 'toy');
  write(join(toy, 'learned_embeds.safetensors'), ['<toy>', [3, 32], vectors(3, 32, 1)]);
  write(join(toy, 'learned_embeds_2.safetensors'), ['<toy>', [3, 48], vectors(3, 48, 1)]);
  const style = write(
    join(folder, 'mystyle.safetensors'),
    ['clip_l', [32], vectors(1, 32, 2)],
    ['clip_g', [48], vectors(1, 48, 2)],
  );
  return { toy, style };
}

export const open = (device: Device, name = 'tiny-sdxl'): Pipeline =>
  loadPipeline(openModel(join(goldenFolder, name)), { device, dtype: 'float32' });

export function embed({ text, device }: Pipeline, prompts: Prompts, guided = false) {
  return noGrad(() =>
    scope(() => {
      const got = encodePrompts(text, prompts, { guided, copies: 1, device, dtype: 'float32' });
      return { context: got.context.floats(), pooled: got.pooled.floats(), cut: got.truncated };
    }),
  );
}
