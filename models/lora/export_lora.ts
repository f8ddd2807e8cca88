// An adapter from one spelling to another: diffusers' (`unet.….lora.down.weight` and `text_encoder.….lora_linear_layer.down.weight`,
// alpha in the metadata) or kohya's (`lora_unet_…_….lora_down.weight`, alpha in a tensor). Names are matched through the model's own
// weights, because kohya's underscores cannot be split again. Every kind has names in kohya's spelling, as LyCORIS writes them;
// diffusers' files hold LoRA and DoRA alone. A file in kohya's spelling says in its metadata that it is SDXL's: A1111 takes one
// with metadata that does not for Stable Diffusion 1's, and does not list it beside an SDXL model.
import { basename } from 'node:path';
import { decodeFloats, encodeNumbers, type FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { type TensorEntry, writeSafetensors } from '../../io/safetensors.ts';
import type { TensorFile, TensorInfo } from '../../io/tensor_file.ts';
import { kindName, kindOf, magnitudeAxis, magnitudeOf, rankOf } from '../adapters/lora_kinds.ts';
import { peftEntries } from '../adapters/peft_config.ts';
import { openWeightsFile } from '../checkpoint/weights_file.ts';
import { type LoraTargets, type Update, updatesOf } from './lora_file.ts';

export type LoraFormat = 'lora-peft' | 'lora-kohya';

/** Writes the adapter at `path` to `out`, all or nothing, and returns how many layers it changes. @throws UserError */
export function exportLora(
  path: string,
  out: string,
  format: LoraFormat,
  targets: LoraTargets,
  dtype?: FloatDType,
): number {
  const file = openWeightsFile(path);
  try {
    return writeLora(file, out, format, targets, dtype);
  } finally {
    file.close();
  }
}

/** The same of a file that is open, or of tensors that are in memory only. */
export function writeLora(
  file: TensorFile,
  out: string,
  format: LoraFormat,
  targets: LoraTargets,
  dtype?: FloatDType,
): number {
  const updates = [...updatesOf(file, targets).values()];
  const spelled = format === 'lora-kohya' ? inKohya : inPeft;
  const entries = updates.flatMap((update) => spelled(file, update, dtype));
  const metadata = format === 'lora-peft' ? peftMetadata(updates) : kohyaMetadata(file, updates, out);
  writeSafetensors(out, entries, { format: 'pt', ...metadata });
  return updates.length;
}

function tensorOf(
  file: TensorFile,
  info: TensorInfo,
  name: string,
  dtype?: FloatDType,
  shape = info.shape,
): TensorEntry {
  const from = info.dtype as FloatDType;
  const to = dtype ?? from;
  const bytes = () =>
    from === to ? file.read(info.name) : encodeNumbers(decodeFloats(file.read(info.name), from), to);
  return { name, dtype: to, shape, bytes };
}

/** Where diffusers has a tensor of a LoRA or a DoRA. It reads a text encoder's layers under another word than the UNet's. */
function peftName(part: string, path: string): string | undefined {
  const word = path.startsWith('text_encoder') ? 'lora_linear_layer' : 'lora';
  const names: Record<string, string> = {
    lora_down: `${word}.down.weight`,
    lora_up: `${word}.up.weight`,
    lora_magnitude_vector: 'lora_magnitude_vector',
    dora_scale: 'lora_magnitude_vector',
  };
  return names[part];
}

function inPeft(file: TensorFile, update: Update, dtype?: FloatDType): TensorEntry[] {
  const { target, parts } = update;
  const weight = target.weight.shape;
  return tensorsOf(update).map(([part, info]) => {
    const name = peftName(part, target.path);
    if (!name || (part === 'dora_scale' && magnitudeAxis(parts, weight) !== 'rows')) {
      const what = name ? `${kindName(parts)} over inputs` : `${kindName(parts)} with ${part}`;
      throw new UserError(
        `${file.path}: diffusers' files hold no ${what}, as ${target.path} has; export it as --format lora-kohya`,
      );
    }
    const [o, , ...kernel] = weight;
    const shape = kernel.length > 0 ? [1, o, ...kernel.map(() => 1)] : [o];
    const isMagnitude = name === 'lora_magnitude_vector';
    return tensorOf(file, info, `${target.path}.${name}`, dtype, isMagnitude ? shape : undefined);
  });
}

/** All but alpha, which each spelling keeps in its own way; in the order that the kinds name them. */
const tensorsOf = ({ parts }: Update): [string, TensorInfo][] =>
  Object.entries(parts)
    .flatMap(([part, info]): [string, TensorInfo][] => (info && part !== 'alpha' ? [[part, info]] : []))
    .sort(([a], [b]) => (a < b ? -1 : 1));

const kohyaPrefixes: Record<string, string> = {
  unet: 'lora_unet_',
  text_encoder: 'lora_te1_',
  text_encoder_2: 'lora_te2_',
};

/** Layers that A1111 and diffusers know in this spelling by the original's name alone. */
const originals: Record<string, string> = {
  add_embedding_linear_1: 'label_emb_0_0',
  add_embedding_linear_2: 'label_emb_0_2',
};

/** A layer, by its path behind its network's name, as kohya spells it. */
export function kohyaModule(path: string): string {
  const [component, ...names] = path.split('.');
  const name = names.join('_');
  return kohyaPrefixes[component] + (originals[name] ?? name);
}

/** What LyCORIS calls a part; norms have names of their own. */
function kohyaName(part: string, isNorm: boolean): string {
  if (part.startsWith('lora_') && part !== 'lora_magnitude_vector') return `${part}.weight`;
  if (isNorm && part.startsWith('diff')) return part === 'diff' ? 'w_norm' : 'b_norm';
  return part === 'lora_magnitude_vector' ? 'dora_scale' : part;
}

function inKohya(file: TensorFile, update: Update, dtype?: FloatDType): TensorEntry[] {
  const { target, parts, alpha, rank } = update;
  const module = kohyaModule(target.path);
  const [o, ...rest] = target.weight.shape;
  const entries = tensorsOf(update).map(([part, info]) => {
    const shape = part === 'lora_magnitude_vector' ? [o, ...rest.map(() => 1)] : undefined;
    return tensorOf(file, info, `${module}.${kohyaName(part, rest.length === 0)}`, dtype, shape);
  });
  if (parts.oft_R)
    throw new UserError(
      `${file.path}: ${target.path} has peft's OFT, which turns what a layer is given, and kohya's spelling has one of what it makes; keep the file as it is, as --lora reads it`,
    );
  // The constraint of an OFT, which has no rank.
  if (kindOf(parts)?.turns && parts.alpha)
    return [tensorOf(file, parts.alpha, `${module}.alpha`, dtype), ...entries];
  const own = rankOf(parts);
  if (own === undefined && alpha !== rank) {
    throw new UserError(
      `${file.path}: ${target.path} is a LoKr of two whole factors times ${alpha / rank}, which kohya's spelling cannot tell; keep the file as it is, as --lora reads it`,
    );
  }
  if (own === undefined) return entries;
  const [{ dtype: to }] = entries;
  return [
    { name: `${module}.alpha`, dtype: to, shape: [], bytes: encodeNumbers([alpha], to as FloatDType) },
    ...entries,
  ];
}

/** peft's LoraConfig per component, as diffusers reads it; none where every alpha is the rank, which is what no config means. */
function peftMetadata(updates: readonly Update[]): Record<string, string> {
  if (updates.every(({ alpha, rank }) => alpha === rank)) return {};
  const config: Record<string, unknown> = {};
  for (const component of Object.keys(kohyaPrefixes)) {
    const mine = updates.filter(({ target }) => target.path.startsWith(`${component}.`));
    if (mine.length === 0) continue;
    const layers = mine.map(({ target, rank, alpha }) => {
      return { path: target.path.slice(component.length + 1), rank, alpha };
    });
    const more = {
      use_dora: mine.some(({ parts }) => magnitudeOf(parts)),
      target_modules: layers.map(({ path }) => path),
    };
    Object.assign(config, peftEntries(component, layers, layers[0], more));
  }
  return { lora_adapter_metadata: JSON.stringify(config) };
}

/** kohya's words for what a file in its spelling is for, beside what it was made by and how large it is. */
export const kohyaModel = {
  ss_base_model_version: 'sdxl_base_v1-0',
  'modelspec.sai_model_spec': '1.0.0',
  'modelspec.architecture': 'stable-diffusion-xl-v1-base/lora',
  'modelspec.implementation': 'https://github.com/Stability-AI/generative-models',
};

/** kohya's words for what the file holds, and, of a file that has them, its own: how it was trained, its tags, its licence. */
function kohyaMetadata(
  { metadata }: TensorFile,
  updates: readonly Update[],
  out: string,
): Record<string, string> {
  const told = (numbers: readonly number[]) => (new Set(numbers).size === 1 ? `${numbers[0]}` : 'Dynamic');
  const plain = updates.every(({ parts }) => kindName(parts) === 'LoRA');
  // A hash is one of the tensors as they were.
  const own = Object.entries(metadata).filter(([key]) => /^(ss_|modelspec\.(?!hash))/.test(key));
  return {
    ...kohyaModel,
    ss_network_module: plain ? 'networks.lora' : 'lycoris.kohya',
    ss_network_dim: told(updates.map(({ rank }) => rank)),
    ss_network_alpha: told(updates.map(({ alpha }) => alpha)),
    'modelspec.title': basename(out, '.safetensors'),
    ...Object.fromEntries(own),
  };
}
