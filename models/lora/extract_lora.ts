// A LoRA extracted of a tuned model (kohya's extract_lora_from_models): of each linear layer and convolution the product B A of a rank
// that is nearest to W_tuned - W_base (adapters/low_rank.ts), a convolution flat, [o, i * kh * kw]. As there B has the singular
// values, and alpha is the rank. Nothing is clamped (clamp_quantile): the largest numbers are what a difference is known by. Layers
// are taken one after the other from both models, so that of these no more than a layer is held, beside the LoRA that is made.
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { type AnyModule, namedParameters } from '../../engine/module.ts';
import { sub } from '../../engine/ops/binary.ts';
import { matmul } from '../../engine/ops/linear.ts';
import { sum } from '../../engine/ops/reduce.ts';
import { cast, square } from '../../engine/ops/unary.ts';
import { scope } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { decodeFloats, type FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import type { TensorFile, TensorInfo } from '../../io/tensor_file.ts';
import { isLarge } from '../adapters/adapter_kinds.ts';
import { layersOf } from '../adapters/adapters.ts';
import { lowRank } from '../adapters/low_rank.ts';
import type { ModelSource } from '../checkpoint/checkpoint.ts';
import {
  matchParameters,
  misfit,
  notFinite,
  storedTensor,
  trimMemory,
  type WeightSource,
} from '../checkpoint/weights.ts';
import { buildComponent } from '../formats/components.ts';
import { encodeWeight } from '../formats/export.ts';
import { otherShapes, shown } from '../formats/merge_models.ts';
import { type LoraFormat, writeLora } from './export_lora.ts';
import { targetsIn } from './merged.ts';

/** What a LoRA is of. */
const components: readonly string[] = ['unet', 'text_encoder', 'text_encoder_2'];

export interface ExtractRequest {
  /** Components to compare; empty for the UNet and text encoders that both have. */
  save_keys: readonly string[];
  rank: number;
  /** Of convolutions larger than 1x1; the rank if absent. */
  conv_rank?: number;
  /** The type that the LoRA is stored in; that of each tuned weight if absent. */
  dtype?: FloatDType;
  device: Device;
  onProgress?: (progress: { done: number; total: number }) => void;
}

export interface Extracted {
  layers: number;
  /** The share of the difference that the LoRA holds as it is stored, by the Frobenius norm: 1 is all. */
  retained: number;
  worst: { layer: string; retained: number };
  /** Norms, biases and embeddings that differ too, which no LoRA changes. */
  others: number;
}

/** A weight that both models have. */
interface Pair {
  /** With the component's name before it. */
  path: string;
  base: Stored;
  tuned: Stored;
  isLayer: boolean;
}

interface Stored {
  weights: WeightSource;
  name: string;
}

/**
 * Writes the LoRA to `out`, whole or not at all.
 * @throws UserError for models of different shapes, and where no layer differs
 */
export function* extractLora(
  base: ModelSource,
  tuned: ModelSource,
  out: string,
  format: LoraFormat,
  request: ExtractRequest,
): Generator<void, Extracted> {
  const open: WeightSource[] = [];
  try {
    const pairs = chosen(base, tuned, request.save_keys).flatMap((name) => pairsOf(name, base, tuned, open));
    const made: Made[] = [];
    let others = 0;
    for (const [i, pair] of pairs.entries()) {
      const one = noGrad(() => scope(() => extracted(pair, request)));
      if (one && pair.isLayer) made.push(one);
      else if (one) others++;
      trimMemory(request.device);
      request.onProgress?.({ done: i + 1, total: pairs.length });
      yield;
    }
    if (made.length === 0)
      throw new UserError(
        `no linear layer or convolution of ${tuned.path} differs from ${base.path}'s; give two models that do`,
      );
    writeLora(inMemory(out, made), out, format, targetsIn(base));
    return { layers: made.length, ...summed(made), others };
  } finally {
    for (const weights of open) weights.close();
  }
}

/** @throws UserError for what is no part of a LoRA, or of one of the models */
function chosen(base: ModelSource, tuned: ModelSource, keys: readonly string[]): readonly string[] {
  for (const key of keys.filter((name) => name !== 'all')) {
    if (!components.includes(key))
      throw new UserError(`--save-keys: a LoRA is of ${components.join(', ')}, not ${key}`);
    for (const source of [base, tuned])
      if (!source.has(key)) throw new UserError(`--save-keys: ${source.path} has no ${key}`);
  }
  const both = components.filter((name) => base.has(name) && tuned.has(name));
  return keys.length === 0 || keys.includes('all') ? both : both.filter((name) => keys.includes(name));
}

function pairsOf(component: string, base: ModelSource, tuned: ModelSource, open: WeightSource[]): Pair[] {
  const built = (source: ModelSource): AnyModule => {
    const found = buildComponent(source.config(component));
    if (!found) throw new UserError(`${source.path}: ${component} is of a class that SDXL has not`);
    return found.module;
  };
  const [ours, theirs] = [built(base), built(tuned)];
  refuseOtherShapes(component, [base, ours], [tuned, theirs]);
  const [from, to] = [base, tuned].map((source) => {
    const weights = source.weights(component);
    open.push(weights);
    const { stored, problems } = matchParameters(ours, weights);
    if (problems.length) throw misfit(weights, problems);
    return (key: string): Stored => ({ weights, name: stored.get(key) as string });
  });
  const layers = new Set(layersOf(ours).map(({ path }) => `${path}.weight`));
  return [...namedParameters(ours).keys()].map((key) => ({
    path: `${component}.${key.replace(/\.weight$/, '')}`,
    base: from(key),
    tuned: to(key),
    isLayer: layers.has(key),
  }));
}

function refuseOtherShapes(
  component: string,
  ...[[base, ours], [tuned, theirs]]: (readonly [ModelSource, AnyModule])[]
): void {
  const [differs] = otherShapes(ours, theirs);
  if (differs)
    throw new UserError(
      `${component}.${differs.key} is ${shown(differs.other)} in ${tuned.path} and ${shown(differs.own)} in ${base.path}; give as --base the model that it was tuned from`,
    );
}

interface Matrix {
  part: 'lora_A' | 'lora_B';
  shape: readonly number[];
  bytes: Uint8Array;
}

/** A layer's two matrices as they will be stored, and squares of Frobenius norms. */
interface Made {
  path: string;
  dtype: FloatDType;
  matrices: readonly Matrix[];
  whole: number;
  rest: number;
}

/**
 * Undefined where a weight is the same in both; without matrices where it is no layer's.
 * @throws UserError for numbers that are not finite, and those that the type cannot hold
 */
function extracted(
  { path, base, tuned, isLayer }: Pair,
  { device, rank, conv_rank, dtype: wanted }: ExtractRequest,
): Made | undefined {
  const [from, to] = [base, tuned].map(({ weights, name }) => storedTensor(weights, name, device));
  const difference = sub(cast(to, 'float32'), cast(from, 'float32'));
  const whole = squares(difference);
  if (!Number.isFinite(whole))
    for (const [{ weights, name }, each] of [[base, from] as const, [tuned, to] as const])
      if (!Number.isFinite(squares(cast(each, 'float32')))) throw notFinite(weights, name, 'float32');
  if (whole === 0 || isRounded(from, to) || isRounded(to, from)) return undefined;
  const dtype = wanted ?? (to.dtype as FloatDType);
  if (!isLayer) return { path, dtype, matrices: [], whole, rest: whole };
  const [o, ...inputs] = to.shape;
  const matrix = difference.reshape(o, -1);
  const [, c] = matrix.shape;
  const most = isLarge(to.shape) ? (conv_rank ?? rank) : rank;
  const r = Math.min(most, o, c);
  const { up, down } = lowRank(matrix, r);
  const stored = (part: Matrix['part'], values: Float32Array, shape: readonly number[]): Matrix => ({
    ...{ part, shape },
    bytes: encodeWeight({ where: 'the LoRA' }, path, values, dtype),
  });
  const lora_A = stored('lora_A', down, [r, ...inputs]);
  const lora_B = stored('lora_B', up, [o, r, ...inputs.slice(1).map(() => 1)]);
  const loaded = ({ bytes }: Matrix, rows: number, columns: number): Tensor =>
    tensor(decodeFloats(bytes, dtype), [rows, columns], { device });
  const product = matmul(loaded(lora_B, o, r), loaded(lora_A, r, c));
  return { path, dtype, matrices: [lora_A, lora_B], whole, rest: squares(sub(matrix, product)) };
}

/** Whether one is the other in fewer bits: a tuned model may be stored in another type than its base. */
const isRounded = (from: Tensor, to: Tensor): boolean =>
  from.dtype !== to.dtype && squares(sub(cast(cast(from, to.dtype), 'float32'), cast(to, 'float32'))) === 0;

/** The sum of squares. */
const squares = (x: Tensor): number =>
  sum(square(x.reshape(x.shape[0], -1)), 1)
    .floats()
    .reduce((total, each) => total + each, 0);

function summed(made: readonly Made[]): Pick<Extracted, 'retained' | 'worst'> {
  const share = (whole: number, rest: number) => Math.sqrt(Math.max(0, 1 - rest / whole));
  const total = (of: 'whole' | 'rest') => made.reduce((sum, each) => sum + each[of], 0);
  const [worst] = made
    .map(({ path, whole, rest }) => ({ layer: path, retained: share(whole, rest) }))
    .sort((a, b) => a.retained - b.retained);
  return { retained: share(total('whole'), total('rest')), worst };
}

/** The matrices as a LoRA's file under peft's names, which is nowhere yet. */
function inMemory(path: string, made: readonly Made[]): TensorFile {
  const tensors = new Map<string, TensorInfo>();
  const contents = new Map<string, Uint8Array>();
  for (const { path: layer, dtype, matrices } of made)
    for (const { part, shape, bytes } of matrices) {
      const name = `${layer}.${part}.weight`;
      tensors.set(name, { name, dtype, storedAs: dtype, shape, offset: 0, bytes: bytes.byteLength });
      contents.set(name, bytes);
    }
  const stored = (name: string): Uint8Array => contents.get(name) as Uint8Array;
  return {
    path,
    tensors,
    metadata: {},
    stamp: '',
    read: stored,
    readInto: (name, target) => target.set(stored(name)),
    stored,
    close() {},
  };
}
