// Low-rank adapters (Hu et al. 2021) merged into loaded weights: W += scale * alpha / rank * B A, in float32.
// Read in the three spellings in use: diffusers and peft (dots, lora_A/lora_B or lora.down/lora.up), kohya
// (underscores, `.alpha`), and kohya with the original model's block names. Underscores cannot be split
// again, so names are matched by spelling every weight of the model in all ways; a name that matches none is
// an error, as a silently lost layer would be.
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { noGrad } from '../engine/grad.ts';
import { type AnyModule, namedParameters, type Parameter } from '../engine/module.ts';
import { add } from '../engine/ops/binary.ts';
import { matmul } from '../engine/ops/linear.ts';
import { cast, scale as scaled } from '../engine/ops/unary.ts';
import { keep, scope } from '../engine/scope.ts';
import { empty, tensor } from '../engine/tensor.ts';
import { decodeFloats } from '../io/dtype.ts';
import { UserError } from '../io/errors.ts';
import { openSafetensors, type SafetensorsFile } from '../io/safetensors.ts';
import { channelsLast } from './checkpoint.ts';
import { weightFile } from './save.ts';
import { unetKeyInSgm } from './sgm_keys.ts';
import type { UNetConfig } from './unet.ts';

/**
 * The models an adapter may change; parts of a file for an absent one are an error like any unmatched name.
 */
export interface LoraTargets {
  unet: AnyModule;
  unetConfig: Pick<UNetConfig, 'layers_per_block' | 'up_block_types'>;
  text_encoder?: AnyModule;
  text_encoder_2?: AnyModule;
}

/** A weight that an adapter can change, and its diffusers path with the component's name before it. */
interface Target {
  parameter: Parameter;
  path: string;
}

/** One weight's update: tensor names in the file, and the weight they meet. */
export interface Update {
  target: Target;
  down?: string;
  up?: string;
  alpha?: string;
}

type Part = 'down' | 'up' | 'alpha';

const suffixes: readonly (readonly [RegExp, Part])[] = [
  [
    /(\.lora_A|\.lora_down|\.lora\.down|\.lora_linear_layer\.down|_lora\.down)(\.default)?(\.weight)?$/,
    'down',
  ],
  [/(\.lora_B|\.lora_up|\.lora\.up|\.lora_linear_layer\.up|_lora\.up)(\.default)?(\.weight)?$/, 'up'],
  [/(\.lora)?\.alpha$/, 'alpha'],
];

/**
 * `module` without the part's suffix, in the file's spelling. Undefined for anything but a plain adapter's
 * tensors.
 */
export function loraPart(name: string): { module: string; part: Part } | undefined {
  for (const [suffix, part] of suffixes) {
    if (suffix.test(name)) return { module: plainModule(name.replace(suffix, '')), part };
  }
  return undefined;
}

/**
 * Drops what wrappers put into a path: peft's root, and the attention processors of diffusers before 0.22.
 */
const plainModule = (module: string): string =>
  module
    .replace(/^base_model\.model\./, '')
    .replace(
      /\.processor\.(to_\w+)$/,
      (_, projection) => `.${projection === 'to_out' ? 'to_out.0' : projection}`,
    );

/** Every spelling of every weight that an adapter can change. */
function spellings({ unet, unetConfig, text_encoder, text_encoder_2 }: LoraTargets): Map<string, Target> {
  const found = new Map<string, Target>();
  const flat = (name: string) => name.replaceAll('.', '_');
  const note = (module: AnyModule | undefined, dotted: string, underscored: readonly string[]) => {
    if (!module) return;
    for (const [key, parameter] of namedParameters(module)) {
      if (!key.endsWith('.weight') || parameter.shape.length < 2) continue;
      const path = key.slice(0, -'.weight'.length);
      const target = { parameter, path: `${dotted}.${path}` };
      // transformers 5 leaves `text_model.` out of the text encoders' keys.
      for (const each of [path, path.replace(/^text_model\./, '')]) found.set(`${dotted}.${each}`, target);
      for (const prefix of underscored) found.set(prefix + flat(path), target);
      if (module !== unet) continue;
      found.set(path, target);
      found.set(`lora_unet_${flat(unetKeyInSgm(key, unetConfig).replace(/\.weight$/, ''))}`, target);
    }
  };
  note(unet, 'unet', ['lora_unet_']);
  note(text_encoder, 'text_encoder', ['lora_te1_']);
  // Trained on the refiner, whose only encoder it is, kohya calls it `te`.
  note(text_encoder_2, 'text_encoder_2', text_encoder ? ['lora_te2_'] : ['lora_te2_', 'lora_te_']);
  return found;
}

/**
 * Pairs the file's tensors with the model's weights. @throws UserError listing what matches nothing or fits
 * badly
 */
export function updatesOf(file: SafetensorsFile, targets: LoraTargets): Map<string, Update> {
  const known = spellings(targets);
  const updates = new Map<string, Update>();
  const unmatched: string[] = [];
  for (const name of file.tensors.keys()) {
    const split = loraPart(name);
    const target = split && known.get(split.module);
    if (!target) {
      unmatched.push(name);
      continue;
    }
    const update = updates.get(split.module) ?? { target };
    update[split.part] = name;
    updates.set(split.module, update);
  }
  complain(file, 'match no weight of this model', unmatched);
  const lonely = [...updates].filter(([, { down, up }]) => !down || !up).map(([module]) => module);
  complain(file, 'have only one half of their update', lonely);
  const misfits = [...updates].filter(([, update]) => !fits(file, update)).map(([module]) => module);
  complain(file, 'have another shape than the model', misfits);
  return updates;
}

/** The adapter's file: `path` itself, or that of a folder, which a finished run has at its top and a checkpoint in lora/. */
export function adapterAt(path: string, { ema = false } = {}): string | undefined {
  const name = weightFile('lora');
  const places = [[], [name], [...(ema ? ['ema'] : []), 'lora', name]].map((parts) => join(path, ...parts));
  return places.find((place) => place.endsWith('.safetensors') && existsSync(place));
}

function complain(file: SafetensorsFile, what: string, names: readonly string[]): void {
  if (names.length === 0) return;
  const more = names.length > 8 ? ` and ${names.length - 8} more` : '';
  throw new UserError(
    `LoRA ${file.path}: ${names.length} of its names ${what}: ${names.slice(0, 8).join(', ')}${more}; ` +
      'use an adapter made for this model, or name the model that it was made for',
  );
}

/** down [r, i, ...kernel] and up [o, r, ...ones] make the weight's own shape. */
function fits(file: SafetensorsFile, { target, down = '', up = '' }: Update): boolean {
  const { shape } = target.parameter;
  const [a, b] = [file.tensors.get(down)?.shape ?? [], file.tensors.get(up)?.shape ?? []];
  const product = [b[0], ...a.slice(1)];
  const ones = b.slice(2).every((size) => size === 1);
  // Some trainers write a linear layer's pair as 1x1 convolutions.
  const linear = shape.length === 2 && product.slice(2).every((size) => size === 1);
  return ones && a[0] === b[1] && (linear ? product.slice(0, 2) : product).join() === shape.join();
}

/** scale * alpha / rank. */
function factorOf(file: SafetensorsFile, module: string, update: Update, scale: number): number {
  const factor = (scale * alphaOf(file, module, update)) / rankOf(file, update);
  if (!Number.isFinite(factor)) {
    throw new UserError(
      `LoRA ${file.path}: the alpha of ${module} is not a finite number; the file is damaged`,
    );
  }
  return factor;
}

export const rankOf = (file: SafetensorsFile, { down = '' }: Update): number =>
  file.tensors.get(down)?.shape[0] ?? 0;

/**
 * An update's alpha: diffusers keeps it in the metadata, kohya in a tensor; without either it is the rank. Rank-stabilised
 * adapters (alpha over the root of the rank) are told as what a plain one would say.
 */
export function alphaOf(file: SafetensorsFile, module: string, update: Update): number {
  if (update.alpha) return floatsOf(file, update.alpha)[0];
  const rank = rankOf(file, update);
  const [component] = module.split('.');
  const metadata = adapterMetadata(file);
  const patterns = (metadata[`${component}.alpha_pattern`] ?? {}) as Record<string, number>;
  const pattern = Object.keys(patterns).find((ending) => module.endsWith(`.${ending}`));
  const written = (pattern ? patterns[pattern] : metadata[`${component}.lora_alpha`]) as number | undefined;
  return (written ?? rank) * (metadata[`${component}.use_rslora`] ? Math.sqrt(rank) : 1);
}

function adapterMetadata(file: SafetensorsFile): Record<string, unknown> {
  try {
    return JSON.parse(file.metadata.lora_adapter_metadata ?? '{}') as Record<string, unknown>;
  } catch {
    throw new UserError(`LoRA ${file.path}: its "lora_adapter_metadata" is not JSON; save the adapter again`);
  }
}

const floatsOf = (file: SafetensorsFile, name: string): Float32Array =>
  decodeFloats(file.read(name), file.tensors.get(name)?.dtype ?? 'float32');

/**
 * Adds the adapter in `path`, times `scale`, to the loaded weights. Several adapters are merged one after the
 * other; merging with the negative scale takes one out again up to rounding. Returns how many weights
 * changed.
 * @throws UserError before anything is changed, if a name of the file matches no weight or a shape does not
 *   fit
 */
export function mergeLora(targets: LoraTargets, path: string, scale = 1): number {
  const file = openSafetensors(path);
  try {
    const updates = [...updatesOf(file, targets)].map(
      ([module, update]) => [update, factorOf(file, module, update, scale)] as const,
    );
    noGrad(() => {
      for (const [update, factor] of updates) merge(file, update, factor);
    });
    return updates.length;
  } finally {
    file.close();
  }
}

/** W += factor * B A, the sum in float32 and rounded once to the weight's own type. */
function merge(
  file: SafetensorsFile,
  { target: { parameter: target }, down = '', up = '' }: Update,
  factor: number,
): void {
  const [rank, inputs, ...kernel] = file.tensors.get(down)?.shape ?? [];
  const taps = kernel.reduce((a, b) => a * b, 1);
  const { device, dtype } = target.tensor;
  const merged = scope(() => {
    const { buffer } = floatsOf(file, down);
    const turned = channelsLast(new Uint8Array(buffer), [rank, inputs, taps, 1], 4);
    const a = empty([rank, taps * inputs], { device }).upload(turned);
    const b = tensor(floatsOf(file, up), [target.shape[0], rank], { device });
    const delta = scaled(matmul(b, a), factor).reshape(...target.memoryShape);
    return cast(add(cast(target.tensor, 'float32'), delta), dtype);
  });
  target.tensor = keep(merged);
}
