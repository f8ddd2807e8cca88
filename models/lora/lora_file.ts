// An adapter's file against a model: whose layer each tensor is, and what alpha and rank it has. Names are in one of four
// spellings: diffusers' and peft's (dots), kohya's (underscores), kohya's with the original model's block names, and ComfyUI's,
// whose nodes save those with dots.
// Underscores cannot be split again, so names are matched by spelling every layer of the model in all ways; a name that
// matches none is an error, as a silently lost layer would be.
import { existsSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { type AnyModule, namedParameters, type Parameter } from '../../engine/module.ts';
import { decodeFloats } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import type { TensorFile, TensorInfo } from '../../io/tensor_file.ts';
import {
  fits,
  kindOf,
  kinds,
  lackOf,
  magnitudeAxis,
  magnitudeOf,
  type Parts,
  partOf,
  rankOf,
  unsupportedKind,
} from '../adapters/lora_kinds.ts';
import { byPattern, type PeftConfig, peftConfigs, peftRoot } from '../adapters/peft_config.ts';
import { refuseRun } from '../checkpoint/checkpoint.ts';
import { weightFile } from '../checkpoint/save.ts';
import { allFinite } from '../checkpoint/weights.ts';
import { isWeightsFile } from '../checkpoint/weights_file.ts';
import { isIPAdapter } from '../ip_adapter/ip_adapter.ts';
import type { UNetConfig } from '../unet/unet.ts';
import { unetKeyInSgm } from '../unet/unet_keys.ts';

/**
 * The models an adapter may change; parts of a file for an absent one are an error like any unmatched name.
 */
export interface LoraTargets {
  unet: AnyModule;
  unetConfig: Pick<UNetConfig, 'layers_per_block' | 'up_block_types'>;
  text_encoder?: AnyModule;
  text_encoder_2?: AnyModule;
}

/** A layer that an adapter can change, and its diffusers path with the component's name before it. */
interface Target {
  weight: Parameter;
  bias?: Parameter;
  path: string;
}

/** What a file changes of one layer. */
export interface Update {
  target: Target;
  parts: Parts;
  /** The difference counts alpha / rank times. Both are 1 where a file tells neither. */
  alpha: number;
  rank: number;
  /** peft's, where the file has one. */
  config: PeftConfig;
}

/** The file of a folder's adapter by its place: a finished run's is at its top, a checkpoint's in lora/. */
const placesIn = (ema: boolean): string[] => {
  const name = weightFile('lora');
  return [name, 'adapter_model.safetensors', join(...(ema ? ['ema'] : []), 'lora', name)];
};

/** The adapter's file: `path` itself, or that of a folder; undefined where it is neither. */
export function adapterAt(path: string, { ema = false } = {}): string | undefined {
  const places = [path, ...placesIn(ema).map((place) => join(path, place))];
  return places.find((place) => isWeightsFile(place) && existsSync(place) && !isFolder(place));
}

const isFolder = (path: string): boolean => statSync(path).isDirectory();

/**
 * As adapterAt, for what must be one, without reading it.
 * @throws UserError where nothing is there, or a folder that has none
 */
export function locateAdapter(path: string): string {
  const found = adapterAt(path);
  if (found) return found;
  const places = placesIn(false).join(', ');
  if (!existsSync(path))
    throw new UserError(
      `no LoRA at ${path}; give a .safetensors or .gguf file, or a folder that has one of ${places}`,
    );
  // Of a file of another kind the one who opens it tells more.
  if (!isFolder(path)) return path;
  refuseRun(path);
  throw new UserError(
    `${path} holds no LoRA: a folder must have one of ${places}; give such a folder, or a .safetensors or .gguf file`,
  );
}

/** A file's tensors by layer, in the file's spelling, and the names that are no part of an adapter. */
export function layersIn(file: TensorFile): { layers: Map<string, Parts>; unknown: string[] } {
  const layers = new Map<string, Record<string, TensorInfo>>();
  const unknown: string[] = [];
  for (const info of file.tensors.values()) {
    const found = partOf(info);
    const module = plainModule(found?.module ?? '');
    const parts = layers.get(module) ?? {};
    // A part that is there under another name already is none.
    if (!found || parts[found.part]) unknown.push(info.name);
    else layers.set(module, { ...parts, [found.part]: info });
  }
  return { layers, unknown };
}

/** Whether it is an adapter, if only of a kind that cannot be read. */
export function isAdapter(file: TensorFile): boolean {
  const { layers, unknown } = layersIn(file);
  return unknown.some(unsupportedKind) || [...layers.values()].some(kindOf);
}

/**
 * Drops what wrappers put into a path: peft's root, and the attention processors of diffusers before 0.22.
 */
const plainModule = (module: string): string =>
  module
    .replace(peftRoot, '')
    .replace(
      /\.processor\.(to_\w+)$/,
      (_, projection) => `.${projection === 'to_out' ? 'to_out.0' : projection}`,
    );

/** Every spelling of every layer that an adapter can change. */
function spellings({ unet, unetConfig, text_encoder, text_encoder_2 }: LoraTargets): Map<string, Target> {
  const found = new Map<string, Target>();
  const flat = (name: string) => name.replaceAll('.', '_');
  const note = (
    module: AnyModule | undefined,
    dotted: string,
    underscored: readonly string[],
    comfy = '',
  ) => {
    if (!module) return;
    const parameters = namedParameters(module);
    for (const [key, weight] of parameters) {
      if (!key.endsWith('.weight')) continue;
      const path = key.slice(0, -'.weight'.length);
      const target = { weight, bias: parameters.get(`${path}.bias`), path: `${dotted}.${path}` };
      // transformers 5 leaves `text_model.` out of the text encoders' keys.
      for (const each of [path, path.replace(/^text_model\./, '')]) found.set(`${dotted}.${each}`, target);
      for (const prefix of underscored) found.set(prefix + flat(path), target);
      if (comfy) found.set(`text_encoders.${comfy}.transformer.${path}`, target);
      if (module !== unet) continue;
      const sgm = unetKeyInSgm(key, unetConfig).replace(/\.weight$/, '');
      const others = [`lora_unet_${flat(sgm)}`, `oft_unet_${flat(sgm)}`, `diffusion_model.${sgm}`];
      for (const name of [path, ...others]) found.set(name, target);
    }
  };
  // Without kohya's trainer LyCORIS calls the network by its own name; kohya's OFT has another word than its LoRA.
  note(unet, 'unet', ['lora_unet_', 'lycoris_', 'oft_unet_']);
  note(text_encoder, 'text_encoder', ['lora_te1_'], 'clip_l');
  // Trained on the refiner, whose only encoder it is, kohya calls it `te`.
  note(text_encoder_2, 'text_encoder_2', text_encoder ? ['lora_te2_'] : ['lora_te2_', 'lora_te_'], 'clip_g');
  return found;
}

/**
 * Pairs the file's tensors with the model's layers, by the file's spelling.
 * @throws UserError listing what matches nothing, is incomplete or fits badly
 */
export function updatesOf(file: TensorFile, targets: LoraTargets): Map<string, Update> {
  const known = spellings(targets);
  const { layers, unknown } = layersIn(file);
  refuseOthers(file, unknown);
  const unmatched = [...layers].flatMap(([module, parts]) =>
    known.has(module) ? [] : Object.values(parts).map((info) => info?.name ?? ''),
  );
  complain(file, 'match no weight of this model', [...unknown, ...unmatched]);
  const paired = [...layers].map(([module, parts]) => [module, known.get(module) as Target, parts] as const);
  refuseDamaged(file, paired);
  const configOf = peftConfigs(file);
  return new Map(
    paired.map(([module, target, parts]) => {
      const config = configOf(target.path);
      const ratio = ratioOf(file, parts, config, target.path.replace(/^\w+\./, ''));
      const alpha = parts.alpha ? floatsOf(file, parts.alpha)[0] : 1;
      if (!Number.isFinite(alpha) || !Number.isFinite(ratio.alpha / ratio.rank)) {
        throw new UserError(
          `LoRA ${file.path}: the alpha of ${module} is not a finite number; the file is damaged`,
        );
      }
      if (parts.oft_R && config.oft_block_size === undefined)
        throw new UserError(
          `LoRA ${file.path}: how peft's OFT turns is told by its adapter_config.json, and there is none of OFT beside the file; put the two into one folder`,
        );
      return [module, { target, parts, ...ratio, config }];
    }),
  );
}

const fitsTarget = ({ weight, bias }: Target, parts: Parts): boolean =>
  fits(parts, weight.shape) &&
  (!parts.diff_b || parts.diff_b.shape.join() === bias?.shape.join()) &&
  (!magnitudeOf(parts) || magnitudeAxis(parts, weight.shape) !== undefined);

/** A file that is no adapter, or is of a kind that cannot be read. */
function refuseOthers(file: TensorFile, unknown: readonly string[]): void {
  if (file.tensors.size === 0)
    throw new UserError(`LoRA ${file.path} holds no tensors; it was not saved right, download it again`);
  if (isIPAdapter(unknown))
    throw new UserError(
      `${file.path} is an IP-Adapter, which sdxl sample takes as --ip-adapter ${file.path}`,
    );
  const name = unknown.find(unsupportedKind);
  if (name === undefined) return;
  throw new UserError(
    `LoRA ${file.path}: ${name} is a tensor of ${unsupportedKind(name)}, which is not supported; ` +
      `${kinds.map((kind) => kind.name).join(', ')} and DoRA are`,
  );
}

/** Adapters that lack something, fit no layer, or hold what is no number. */
function refuseDamaged(
  file: TensorFile,
  paired: readonly (readonly [module: string, target: Target, parts: Parts])[],
): void {
  const lacks = paired.map(([module, , parts]) => [module, lackOf(parts)] as const);
  complain(
    file,
    'have not all the tensors of one adapter',
    lacks.flatMap(([module, lack]) => (lack ? `${module} (${lack})` : [])),
    'the file is damaged, or of a kind that is not known here',
  );
  const misfits = paired.filter(([, target, parts]) => !fitsTarget(target, parts));
  complain(
    file,
    'have another shape than the model',
    misfits.map(([module]) => module),
  );
  complain(
    file,
    'have NaN or infinity in their tensors',
    paired.filter(([, , parts]) => !isSound(file, parts)).map(([module]) => module),
    'the file is damaged, download it again',
  );
}

/** Throws a sentence that names the first eight of these, where there are any. */
export function complain(
  file: TensorFile,
  what: string,
  names: readonly string[],
  mend = 'use an adapter made for this model, or name the model that it was made for (sdxl sample --model, sdxl export --configs)',
): void {
  if (names.length === 0) return;
  const more = names.length > 8 ? ` and ${names.length - 8} more` : '';
  throw new UserError(
    `LoRA ${file.path}: ${names.length} of its names ${what}: ${names.slice(0, 8).join(', ')}${more}; ${mend}`,
  );
}

/**
 * Alpha and rank: kohya keeps alpha in a tensor, peft in its config; without either it is the rank. A LoKr of two whole factors has no
 * rank: LyCORIS takes it as it is, whatever its alpha, and peft by its config's. OFT has none either. Rank-stabilised adapters (alpha
 * over the root of the rank) are told as what a plain one would say, as LyCORIS writes them.
 */
function ratioOf(
  file: TensorFile,
  parts: Parts,
  config: PeftConfig,
  path: string,
): Pick<Update, 'alpha' | 'rank'> {
  const kind = kindOf(parts)?.name;
  const own = rankOf(parts);
  if (parts.alpha) return own ? { alpha: floatsOf(file, parts.alpha)[0], rank: own } : { alpha: 1, rank: 1 };
  const named = kind === 'LoRA' ? config.lora_alpha : config.alpha;
  const rank = own ?? (named === undefined ? 1 : (byPattern(config.rank_pattern, path) ?? config.r ?? 1));
  const alpha = byPattern(config.alpha_pattern, path) ?? named ?? rank;
  return { alpha: alpha * (config.use_rslora ? Math.sqrt(rank) : 1), rank };
}

/** Whether all of a layer's numbers are finite, but alpha, which is told of by itself. */
const isSound = (file: TensorFile, { alpha, ...parts }: Parts): boolean =>
  Object.values(parts).every((part) => part === undefined || allFinite(file.read(part.name), part.dtype));

/** A part's numbers in float32. */
export const floatsOf = (file: TensorFile, { name, dtype }: TensorInfo): Float32Array =>
  decodeFloats(file.read(name), dtype);
