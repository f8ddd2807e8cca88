// From one checkpoint format to another, tensor by tensor, without building the model: a diffusers folder (whole or in
// parts, sharded where large) or the original single file. What is written is read back and held against what was meant, and
// one forward pass through it must equal the source's. A missing or an extra tensor is an error before anything is written.
// The work yields after each tensor and each pass, as a model is of many GB: whoever drives it may leave there.
import { createHash } from 'node:crypto';
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import type { Device } from '../../engine/device.ts';
import { unload } from '../../engine/module.ts';
import { encodeNumbers, type FloatDType, isFloat } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { replaceInTurns } from '../../io/files.ts';
import { copyFolder, newFolderInTurns } from '../../io/folders.ts';
import { isGguf, openGguf } from '../../io/gguf.ts';
import { bytesOf, openSafetensors, type TensorEntry, writeSafetensorsInTurns } from '../../io/safetensors.ts';
import type { Room } from '../../io/tensor_file.ts';
import { type Json, type ModelSource, openModel } from '../checkpoint/checkpoint.ts';
import { saveShardsInTurns, writeJson } from '../checkpoint/save.ts';
import { matchParameters, misfit, reusedRoom, type WeightSource } from '../checkpoint/weights.ts';
import { pipelineIndex } from '../control/inpainting.ts';
import { isInstructPix2Pix } from '../control/instruct_pix2pix.ts';
import { isEDM } from '../samplers/config.ts';
import { buildComponent, classOf } from './components.ts';
import { componentClasses } from './diffusers_config.ts';
import { marksFor } from './marks.ts';
import { openSingleFile } from './singlefile.ts';
import { singleFileEntries } from './write_singlefile.ts';

const weightComponents = ['unet', 'vae', 'text_encoder', 'text_encoder_2'] as const;
const tokenizers = ['tokenizer', 'tokenizer_2'] as const;
const exportable: readonly string[] = [...weightComponents, ...tokenizers, 'scheduler'];

export interface ExportRequest {
  /** Components to write; empty for all that the source has. */
  save_keys: readonly string[];
  /** The type of all weights; each tensor keeps its own if absent. */
  dtype?: FloatDType;
  /** Bytes of a weight file of a diffusers folder. */
  max_shard_size: number;
  /** Of the files of weights, beside what readers ask for. */
  metadata?: Readonly<Record<string, string>>;
  /** Where the forward passes run that are compared. */
  device: Device;
  onProgress?: (progress: { done: number; total: number }) => void;
}

export interface Certificate {
  /** Tensors read back and found equal to what was meant. */
  tensors: number;
  /** Of all weights written, in the order of names. */
  sha256: string;
  /** Components whose forward pass through the new files equals the source's. */
  forward: string[];
  /** How far that is from the source's at most, as a share (root mean square), where types lose something. */
  error?: number;
}

/** Which of the source's components a request means. @throws UserError for a name the source has not */
function chooseComponents(source: ModelSource, keys: readonly string[]): string[] {
  const present = exportable.filter((name) => hasComponent(source, name));
  for (const key of keys.filter((name) => name !== 'all')) {
    if (!present.includes(key))
      throw new UserError(`--save-keys: ${source.path} has no ${key}; it has ${present.join(', ')}`);
  }
  return keys.length === 0 || keys.includes('all')
    ? present
    : exportable.filter((name) => keys.includes(name));
}

/** A single file has no folders for its scheduler and tokenizers, and lends or borrows them. */
export function hasComponent(source: ModelSource, name: string): boolean {
  if (source.has(name)) return true;
  try {
    if (name === 'scheduler') return source.config(name) !== undefined;
    return (
      name.startsWith('tokenizer') &&
      source.has(name.replace('tokenizer', 'text_encoder')) &&
      existsSync(source.folder(name))
    );
  } catch (error) {
    if (error instanceof UserError) return false;
    throw error;
  }
}

/** Weights in the type asked for, each made when its turn to be written comes, hashed and counted on the way. */
export class Outgoing {
  readonly hashes = new Map<string, string>();
  readonly #request: ExportRequest;
  readonly #open: WeightSource[] = [];
  readonly #room = reusedRoom();

  constructor(request: ExportRequest) {
    this.#request = request;
  }

  /** One component's tensors under diffusers' keys. @throws UserError listing what is missing or left over */
  entries(source: ModelSource, component: string): TensorEntry[] {
    const built = buildComponent(source.config(component));
    if (!built) throw new UserError(`${source.path}: ${component} is of a class that SDXL has not`);
    const weights = source.weights(component);
    this.#open.push(weights);
    const { stored, problems, parameters } = matchParameters(built.module, weights);
    if (problems.length) throw misfit(weights, problems);
    return [...stored].map(([name, spelling]) => {
      const from = weights.info(spelling)?.dtype as FloatDType;
      const dtype = this.#request.dtype ?? from;
      const shape = parameters.get(name)?.shape ?? [];
      return { name, dtype, shape, bytes: () => converted(weights, spelling, from, dtype, this.#room) };
    });
  }

  /** The entries, noting the hash of what is written under `scope`/name, and that it is one more of `total`. */
  noted<E extends Pick<TensorEntry, 'name' | 'bytes'>>(
    scope: string,
    entries: readonly E[],
    total: number,
  ): (E & { bytes(): Uint8Array })[] {
    return entries.map((entry) => ({
      ...entry,
      bytes: () => {
        const bytes = bytesOf(entry);
        this.hashes.set(`${scope}/${entry.name}`, sha256(bytes));
        this.#request.onProgress?.({ done: this.hashes.size, total });
        return bytes;
      },
    }));
  }

  close(): void {
    for (const weights of this.#open) weights.close();
  }
}

const sha256 = (bytes: Uint8Array | string): string => createHash('sha256').update(bytes).digest('hex');

/** @throws UserError where float16 would turn a weight into infinity */
function converted(
  weights: WeightSource,
  name: string,
  from: FloatDType,
  to: FloatDType,
  room: Room,
): Uint8Array {
  if (!isFloat(from)) {
    weights.bytes(name); // tells of a type that is not read at all
    throw new UserError(`${weights.where}: tensor ${name} is ${from}, not a float type`);
  }
  return from === to ? weights.bytes(name, room) : encodeWeight(weights, name, weights.floats(name), to);
}

/** A weight's numbers in a type. @throws UserError where float16 would turn one into infinity */
export function encodeWeight(
  { where }: Pick<WeightSource, 'where'>,
  name: string,
  values: Float32Array,
  to: FloatDType,
): Uint8Array {
  const large = to === 'float16' ? values.find((value) => Math.abs(value) >= 65520) : undefined;
  if (large !== undefined)
    throw new UserError(
      `${where}: tensor ${name} holds ${large}, more than float16 can; export it as bfloat16 or float32`,
    );
  return encodeNumbers(values, to);
}

/** Writes the chosen components as a diffusers folder; `out` appears whole or not at all. @throws UserError */
export function* exportFolder(
  source: ModelSource,
  out: string,
  request: ExportRequest,
): Generator<void, Certificate> {
  const chosen = chooseComponents(source, request.save_keys);
  const outgoing = new Outgoing(request);
  try {
    const weighty = chosen.filter((name) => (weightComponents as readonly string[]).includes(name));
    const plans = weighty.map((name) => [name, outgoing.entries(source, name)] as const);
    const count = plans.flatMap(([, entries]) => entries).length;
    return yield* newFolderInTurns(out, function* (folder) {
      for (const [name, entries] of plans) {
        writeJson(join(folder, name, 'config.json'), source.config(name));
        const noted = outgoing.noted(name, entries, count);
        yield* saveShardsInTurns(join(folder, name), name, noted, request.max_shard_size, request.metadata);
      }
      for (const name of chosen) copyPlain(source, name, join(folder, name));
      writeJson(join(folder, 'model_index.json'), indexOf(source, chosen));
      for (const name of weighty) {
        const files = readdirSync(join(folder, name)).filter((file) => file.endsWith('.safetensors'));
        for (const file of files) yield* compareHashes(join(folder, name, file), name, outgoing.hashes);
      }
      return yield* certify(source, openModel(folder), outgoing.hashes, weighty, request);
    });
  } finally {
    outgoing.close();
  }
}

/** A scheduler's config and a tokenizer's files are kept as they are. */
function copyPlain(source: ModelSource, name: string, folder: string): void {
  if (name === 'scheduler') writeJson(join(folder, 'scheduler_config.json'), source.config(name));
  if (!(tokenizers as readonly string[]).includes(name)) return;
  copyFolder(source.folder(name), folder);
}

/** The source's index, with what was left out marked so in diffusers' way. */
function indexOf(source: ModelSource, chosen: readonly string[]): Json {
  const named = exportable.map((name) => {
    const known = source.modelIndex[name] as [string, string] | undefined;
    if (!chosen.includes(name)) return [name, [null, null]];
    if (known?.[0]) return [name, known];
    const scheduler =
      name === 'scheduler' ? (source.config(name)._class_name as string | undefined) : undefined;
    return [name, scheduler ? ['diffusers', scheduler] : componentClasses[name]];
  });
  const isEdit =
    ['unet', 'scheduler'].every((name) => chosen.includes(name)) &&
    isInstructPix2Pix(source.config('unet')) &&
    isEDM(source.config('scheduler')._class_name);
  return {
    ...pipelineIndex(source),
    ...(isEdit && { is_cosxl_edit: true }),
    ...Object.fromEntries(named),
  };
}

/** All weights of a model, which one file holds under the original keys. @throws UserError for a part, or what such a file has no names for */
export function wholeModel(source: ModelSource, { save_keys }: ExportRequest): string[] {
  const chosen = chooseComponents(source, save_keys);
  const weighty = chosen.filter((name) => (weightComponents as readonly string[]).includes(name));
  const needed = weightComponents.filter((name) => source.has(name));
  if (needed.some((name) => !weighty.includes(name)))
    throw new UserError(`a single file holds a whole model; export ${needed.join(', ')} together`);
  const lacking = ['unet', 'text_encoder_2'].filter((name) => !source.has(name));
  if (lacking.length > 0)
    throw new UserError(
      `a single file holds a whole model, and ${source.path} has no ${lacking.join(' and no ')}; export it as a folder`,
    );
  if (needed.includes('vae') && classOf(source.config('vae')) === 'AutoencoderTiny')
    throw new UserError(
      `${source.path} has a tiny autoencoder (AutoencoderTiny), which no single file has; export a folder`,
    );
  return weighty;
}

/** What a single file of this model says of its noise. @throws UserError where it has no words for it */
export const marksOf = (source: ModelSource): TensorEntry[] =>
  hasComponent(source, 'scheduler')
    ? marksFor(source.config('scheduler'), source.has('vae') ? source.config('vae') : undefined)
    : [];

/** Writes all weights into one file under the original keys. */
export function* exportSingleFile(
  source: ModelSource,
  out: string,
  request: ExportRequest,
): Generator<void, Certificate> {
  const weighty = wholeModel(source, request);
  const outgoing = new Outgoing(request);
  try {
    const entriesOf = (name: string) => outgoing.entries(source, name);
    const entries = singleFileEntries(source, weighty, entriesOf, marksOf(source));
    const noted = outgoing.noted('', entries, entries.length);
    return yield* replaceInTurns(out, function* (temporary) {
      yield* writeSafetensorsInTurns(temporary, noted, { format: 'pt', ...request.metadata });
      yield* compareHashes(temporary, '', outgoing.hashes);
      const written = openSingleFile(temporary, { configs: source });
      return yield* certify(source, written, outgoing.hashes, weighty, request);
    });
  } finally {
    outgoing.close();
  }
}

/** Reads a written file back. A difference is a broken disk or a bug, not a user's mistake. */
export function* compareHashes(
  path: string,
  scope: string,
  hashes: ReadonlyMap<string, string>,
): Generator<void, void> {
  const file = isGguf(path) ? openGguf(path) : openSafetensors(path);
  const room = reusedRoom();
  try {
    for (const name of file.tensors.keys()) {
      if (sha256(file.stored(name, room)) !== hashes.get(`${scope}/${name}`))
        throw new UserError(`${path}: tensor ${name} reads back other than it was written; check the disk`);
      yield;
    }
  } finally {
    file.close();
  }
}

/** Loads each component from both and compares one forward pass: bit for bit, or to `most` of its numbers (root mean square). */
export function* certify(
  source: ModelSource,
  written: ModelSource,
  hashes: ReadonlyMap<string, string>,
  forward: string[],
  request: ExportRequest,
  most?: number,
): Generator<void, Certificate> {
  let error = 0;
  for (const name of forward) {
    const dtype = request.dtype ?? storedType(source, name);
    const want = throughModel(source, name, dtype, request.device);
    yield;
    const got = throughModel(written, name, dtype, request.device);
    const off = Buffer.compare(Buffer.from(want.buffer), Buffer.from(got.buffer)) && apart(got, want);
    if (!(off <= (most ?? 0)))
      throw new UserError(`the exported ${name} computes other numbers than its source; nothing was kept`);
    error = Math.max(error, off);
    yield;
  }
  return { tensors: hashes.size, sha256: total(hashes), forward, ...(most !== undefined && { error }) };
}

/** How far numbers are from others, as a share of these, by the root mean square; infinite where the bits differ and nothing else. */
function apart(got: Float32Array, want: Float32Array): number {
  const power = (of: (i: number) => number) => want.reduce((sum, _, i) => sum + of(i) ** 2, 0);
  if (got.length !== want.length) return Number.POSITIVE_INFINITY;
  return Math.sqrt(power((i) => got[i] - want[i]) / power((i) => want[i])) || Number.POSITIVE_INFINITY;
}

function throughModel(model: ModelSource, name: string, dtype: FloatDType, device: Device): Float32Array {
  const built = buildComponent(model.config(name));
  if (!built) throw new Error(`${name} lost its class`);
  try {
    model.load(name, built.module, device, dtype);
    return built.probe(device, dtype);
  } finally {
    unload(built.module);
  }
}

const total = (hashes: ReadonlyMap<string, string>): string =>
  sha256(
    [...hashes]
      .sort(([a], [b]) => (a < b ? -1 : 1))
      .map(([name, hash]) => `${name} ${hash}\n`)
      .join(''),
  );

/** The type that most of a component's weights take in memory: its first tensor's. */
function storedType(source: ModelSource, name: string): FloatDType {
  const weights = source.weights(name);
  try {
    const built = buildComponent(source.config(name));
    const [first] = built ? matchParameters(built.module, weights).stored.values() : [];
    return weights.info(first)?.dtype as FloatDType;
  } finally {
    weights.close();
  }
}
