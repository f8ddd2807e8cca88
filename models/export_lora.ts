// A LoRA from one spelling to another: diffusers' (`unet.….lora.down.weight`, alpha in the metadata) or kohya's
// (`lora_unet_…_….lora_down.weight`, alpha in a tensor). Names are matched through the model's own weights, because
// kohya's underscores cannot be split again.
import { decodeFloats, encodeNumbers, type FloatDType } from '../io/dtype.ts';
import {
  openSafetensors,
  type SafetensorsFile,
  type TensorEntry,
  writeSafetensors,
} from '../io/safetensors.ts';
import { alphaOf, type LoraTargets, rankOf, type Update, updatesOf } from './lora.ts';

export type LoraFormat = 'lora-peft' | 'lora-kohya';

/** Writes the adapter at `path` to `out`, all or nothing, and returns how many layers it changes. @throws UserError */
export function exportLora(
  path: string,
  out: string,
  format: LoraFormat,
  targets: LoraTargets,
  dtype?: FloatDType,
): number {
  const file = openSafetensors(path);
  try {
    const updates = [...updatesOf(file, targets)];
    const spelled = format === 'lora-kohya' ? inKohya : inPeft;
    const entries = updates.flatMap(([module, update]) => spelled(file, module, update, dtype));
    const metadata = format === 'lora-peft' ? peftMetadata(file, updates) : {};
    writeSafetensors(out, entries, { format: 'pt', ...metadata });
    return updates.length;
  } finally {
    file.close();
  }
}

function tensorOf(file: SafetensorsFile, stored: string, name: string, dtype?: FloatDType): TensorEntry {
  const info = file.tensors.get(stored);
  const from = info?.dtype as FloatDType;
  const to = dtype ?? from;
  const bytes = () =>
    from === to ? file.read(stored) : encodeNumbers(decodeFloats(file.read(stored), from), to);
  return { name, dtype: to, shape: info?.shape ?? [], bytes };
}

function inPeft(file: SafetensorsFile, _: string, update: Update, dtype?: FloatDType): TensorEntry[] {
  const { target, down = '', up = '' } = update;
  return [
    tensorOf(file, down, `${target.path}.lora.down.weight`, dtype),
    tensorOf(file, up, `${target.path}.lora.up.weight`, dtype),
  ];
}

const kohyaPrefixes: Record<string, string> = {
  unet: 'lora_unet_',
  text_encoder: 'lora_te1_',
  text_encoder_2: 'lora_te2_',
};

function inKohya(file: SafetensorsFile, module: string, update: Update, dtype?: FloatDType): TensorEntry[] {
  const { target, down = '', up = '' } = update;
  const [component, ...path] = target.path.split('.');
  const name = kohyaPrefixes[component] + path.join('_');
  const pair = [
    tensorOf(file, down, `${name}.lora_down.weight`, dtype),
    tensorOf(file, up, `${name}.lora_up.weight`, dtype),
  ];
  const alpha = encodeNumbers([alphaOf(file, module, update)], pair[0].dtype);
  return [{ name: `${name}.alpha`, dtype: pair[0].dtype, shape: [], bytes: alpha }, ...pair];
}

/** peft's LoraConfig per component, as diffusers reads it; none where every alpha is the rank, which is what no config means. */
function peftMetadata(
  file: SafetensorsFile,
  updates: readonly (readonly [string, Update])[],
): Record<string, string> {
  if (updates.every(([module, update]) => alphaOf(file, module, update) === rankOf(file, update))) return {};
  const config: Record<string, unknown> = {};
  for (const component of Object.keys(kohyaPrefixes)) {
    const mine = updates.filter(([, { target }]) => target.path.startsWith(`${component}.`));
    if (mine.length === 0) continue;
    const paths = mine.map(([, { target }]) => target.path.slice(component.length + 1));
    const [first, update] = mine[0];
    const [rank, alpha] = [rankOf(file, update), alphaOf(file, first, update)];
    const others = (value: (module: string, u: Update) => number, common: number) =>
      Object.fromEntries(
        mine.flatMap(([module, u], i) => (value(module, u) === common ? [] : [[paths[i], value(module, u)]])),
      );
    Object.assign(config, {
      [`${component}.peft_type`]: 'LORA',
      [`${component}.r`]: rank,
      [`${component}.lora_alpha`]: alpha,
      [`${component}.rank_pattern`]: others((_, u) => rankOf(file, u), rank),
      [`${component}.alpha_pattern`]: others((module, u) => alphaOf(file, module, u), alpha),
      [`${component}.target_modules`]: paths,
    });
  }
  return { lora_adapter_metadata: JSON.stringify(config) };
}
