// A model as GGUF. A whole one keeps the original's names, and its types follow stable-diffusion.cpp's convert: rows of whole blocks are
// quantised, while biases, embeddings and what takes the time stay (ours leaves norms too, which convert quantises). A UNet alone follows
// ComfyUI-GGUF's tools, which lay weights out in rows of 256 and say in the metadata what shape they had. Numbers are quantised as they
// are stored. Unlike other exports the result is not its source: a forward pass is held to a bound of the type.
import { type DType, decodeFloats, type FloatDType, isFloat } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { replaceInTurns } from '../../io/files.ts';
import { quantisers } from '../../io/ggml_quantise.ts';
import { bytesOf, type TensorEntry } from '../../io/safetensors.ts';
import { type GgufEntry, type GgufValue, writeGgufInTurns } from '../../io/write_gguf.ts';
import type { ModelSource } from '../checkpoint/checkpoint.ts';
import { parseUNetConfig } from '../unet/unet.ts';
import { unetKeyInSgm } from '../unet/unet_keys.ts';
import {
  type Certificate,
  certify,
  compareHashes,
  type ExportRequest,
  encodeWeight,
  marksOf,
  Outgoing,
  wholeModel,
} from './export.ts';
import { openSingleFile } from './singlefile.ts';
import { openUNetFile } from './unet_file.ts';
import { singleFileEntries } from './write_singlefile.ts';

/**
 * Of each type: its name in the file, llama.cpp's number for a file mostly of it, and how far off a forward pass may be: twice and more
 * what the tiny models are off, while weights in each other's places are off by all.
 */
const types = {
  f32: { ggml: 'F32', fileType: 0, off: 0.001 },
  f16: { ggml: 'F16', fileType: 1, off: 0.02 },
  bf16: { ggml: 'BF16', fileType: 32, off: 0.1 },
  q8_0: { ggml: 'Q8_0', fileType: 7, off: 0.1 },
  q5_1: { ggml: 'Q5_1', fileType: 9, off: 0.4 },
  q5_0: { ggml: 'Q5_0', fileType: 8, off: 0.4 },
  q4_1: { ggml: 'Q4_1', fileType: 3, off: 0.7 },
  q4_0: { ggml: 'Q4_0', fileType: 2, off: 0.7 },
} as const;
export type GgufType = keyof typeof types;
export const ggufTypes = Object.keys(types) as GgufType[];

export interface GgufRequest extends Omit<ExportRequest, 'max_shard_size'> {
  /** Of what takes it; everything is as it is stored, or in `dtype`, if absent. */
  type?: GgufType;
}

const block = 32;
const plainTypes = { float32: 'F32', float16: 'F16', bfloat16: 'BF16' } as const;
const dtypes: Readonly<Record<string, FloatDType>> = { F32: 'float32', F16: 'float16', BF16: 'bfloat16' };

/** How a tensor is laid down: ggml's type and, as the file counts, a shape. */
type Plan = Pick<GgufEntry, 'type' | 'shape'>;

/** What is no float is refused when its bytes are asked for. */
const floatOf = (dtype: DType): FloatDType => (isFloat(dtype) ? dtype : 'float32');

const isQuantised = (type: GgufType): boolean => types[type].ggml in quantisers;

/** stable-diffusion.cpp: ModelLoader::tensor_should_be_converted. */
function planInModel({ name, shape, dtype }: TensorEntry, request: GgufRequest): Plan {
  const { type } = request;
  const kept = { type: plainTypes[request.dtype ?? floatOf(dtype)], shape };
  const stays = /\.bias$|time_embed\.|label_emb\.|embedding/.test(name) || shape.includes(0);
  if (!type || stays) return kept;
  if (isQuantised(type) && (shape.length < 2 || (shape.at(-1) as number) % block !== 0)) return kept;
  return { type: types[type].ggml, shape };
}

/** ComfyUI-GGUF: convert.py, which makes float16 or bfloat16, and the patch of llama.cpp's quantize, which goes on from there. */
function planAlone({ name, shape, dtype }: TensorEntry, request: GgufRequest): Plan {
  const { type } = request;
  const count = shape.reduce((product, length) => product * length, 1);
  const row = shape.at(-1) as number;
  const laid =
    shape.length > 1 && count >= 512 && count % 256 === 0 && row % 256 !== 0 ? [count / 256, 256] : shape;
  if (shape.length < 2 || count <= 1024) return { type: 'F32', shape: laid };
  const half = dtype === 'bfloat16' ? 'BF16' : 'F16';
  const kept = { type: request.dtype ? plainTypes[request.dtype] : half, shape: laid };
  if (!type) return kept;
  if (!isQuantised(type)) return { type: types[type].ggml, shape: laid };
  const stays = /time_embed\.|label_emb\.|^(input_blocks\.0\.0|out\.2)\.weight$/.test(name);
  if (stays || laid.length !== 2 || laid[1] % block !== 0) return kept;
  // The feed-forward layers' last matrices take the better of two types of as many bits.
  const better = name.endsWith('.ff.net.2.weight') && (type === 'q4_0' || type === 'q5_0');
  return { type: types[better ? (type === 'q4_0' ? 'q4_1' : 'q5_1') : type].ggml, shape: laid };
}

/** @throws UserError for a number that the type does not hold */
function encoded(where: string, entry: TensorEntry, type: string): Uint8Array {
  const from = entry.dtype as FloatDType;
  const bytes = bytesOf(entry);
  if (dtypes[type] === from) return bytes;
  const values = decodeFloats(bytes, from);
  if (dtypes[type]) return encodeWeight({ where }, entry.name, values, dtypes[type]);
  const bad = values.find((value) => !(Math.abs(value) < 65520));
  if (bad !== undefined)
    throw new UserError(
      `${where}: tensor ${entry.name} holds ${bad}, which ${type.toLowerCase()} cannot; export it as f32`,
    );
  return quantisers[type](values);
}

/** Writes a whole model, or with save_keys "unet" the UNet alone. @throws UserError */
export function* exportGguf(
  source: ModelSource,
  out: string,
  request: GgufRequest,
): Generator<void, Certificate> {
  const alone = request.save_keys.join() === 'unet';
  const asked = { ...request, max_shard_size: Number.POSITIVE_INFINITY };
  const outgoing = new Outgoing({ ...asked, dtype: undefined });
  try {
    const components = alone ? ['unet'] : wholeModel(source, asked);
    const entriesOf = (name: string) => outgoing.entries(source, name);
    const entries = alone
      ? unetEntries(source, entriesOf('unet'))
      : singleFileEntries(source, components, entriesOf, marksOf(source));
    const laid = entries.map((entry): GgufEntry => {
      const plan = (alone ? planAlone : planInModel)(entry, request);
      return { name: entry.name, ...plan, bytes: () => encoded(source.path, entry, plan.type) };
    });
    checkAny(source, laid, request);
    const noted = outgoing.noted('', laid, laid.length);
    const metadata = new Map<string, GgufValue>([
      ...(alone ? unetMetadata(entries, laid, request) : []),
      ...Object.entries(request.metadata ?? {}),
    ]);
    return yield* replaceInTurns(out, function* (temporary) {
      yield* writeGgufInTurns(temporary, noted, metadata);
      yield* compareHashes(temporary, '', outgoing.hashes);
      const written = alone
        ? openUNetFile(temporary, source)
        : openSingleFile(temporary, { configs: source });
      const off = request.type ? types[request.type].off : types.f16.off;
      return yield* certify(source, written, outgoing.hashes, components, asked, off);
    });
  } finally {
    outgoing.close();
  }
}

/** Under the original's names, without what they begin with in a whole model. */
function unetEntries(source: ModelSource, entries: readonly TensorEntry[]): TensorEntry[] {
  if (!source.has('unet')) throw new UserError(`${source.path} has no unet`);
  const layout = parseUNetConfig(source.config('unet'));
  return entries.map((entry) => ({ ...entry, name: unetKeyInSgm(entry.name, layout) }));
}

/** @throws UserError where a type was asked for and nothing takes it */
function checkAny(source: ModelSource, laid: readonly GgufEntry[], { type }: GgufRequest): void {
  if (type && isQuantised(type) && !laid.some((entry) => entry.type in quantisers))
    throw new UserError(
      `--type ${type}: no weight of ${source.path} has rows of whole blocks of ${block} numbers; export it as f16`,
    );
}

/** What ComfyUI-GGUF asks of a file, and the shapes of what was laid out in other rows. */
function unetMetadata(
  entries: readonly TensorEntry[],
  laid: readonly GgufEntry[],
  { type }: GgufRequest,
): Map<string, GgufValue> {
  const isMain = (each: GgufType): boolean =>
    laid.some((entry) => entry.type === types[each].ggml && entry.name.endsWith('ff.net.0.proj.weight'));
  const metadata = new Map<string, GgufValue>([
    ['general.architecture', 'sdxl'],
    ['general.quantization_version', 2],
    ['general.file_type', types[type ?? ggufTypes.find(isMain) ?? 'f16'].fileType],
  ]);
  for (const [i, { name, shape }] of entries.entries())
    if (laid[i].shape !== shape) metadata.set(`comfy.gguf.orig_shape.${name}`, shape);
  return metadata;
}
