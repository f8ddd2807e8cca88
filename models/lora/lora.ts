// Adapters merged into loaded weights: W += scale * alpha / rank * D, in float32, where D is the difference that its kind makes
// (adapters/lora_kinds.ts) of the tensors that a file has for the layer (lora_file.ts), an OFT of the weight too (adapters/oft.ts). DoRA
// (Liu et al. 2024) then gives each row, or in files of LyCORIS each column, of W + alpha / rank * D the length that the file says.
import { statSync } from 'node:fs';
import { noGrad } from '../../engine/grad.ts';
import { type AnyModule, namedParameters, type Parameter } from '../../engine/module.ts';
import { add, mul, sub } from '../../engine/ops/binary.ts';
import { sum } from '../../engine/ops/reduce.ts';
import { cast, scale as scaled, square } from '../../engine/ops/unary.ts';
import { built, keep, scope } from '../../engine/scope.ts';
import { type Tensor, tensor } from '../../engine/tensor.ts';
import { UserError } from '../../io/errors.ts';
import type { TensorFile, TensorInfo } from '../../io/tensor_file.ts';
import { difference, kindOf, magnitudeAxis, magnitudeOf } from '../adapters/lora_kinds.ts';
import { rotated } from '../adapters/oft.ts';
import { openWeightsFile } from '../checkpoint/weights_file.ts';
import type { TextStack } from '../text/conditioning.ts';
import { floatsOf, type LoraTargets, type Update, updatesOf } from './lora_file.ts';

/** What an adapter makes of a weight, or of a bias, in float32. */
export type Change = (values: Tensor) => Tensor;

/** An adapter to be added `scale` times: once where it is not told. */
export interface AdapterFile {
  readonly path: string;
  readonly scale?: number;
  /** The same for the text encoders; `scale` where it is not told. */
  readonly textEncoderScale?: number;
}

/** An adapter's file, held against a model: what it changes there. */
interface OpenAdapter {
  readonly changes: readonly (readonly [Parameter, Change])[];
  /** How many layers that are. */
  readonly layers: number;
  close(): void;
}

/** @throws UserError if a name of the file matches no weight or a shape does not fit */
function openAdapter(
  targets: LoraTargets,
  { path, scale = 1, textEncoderScale = scale }: AdapterFile,
): OpenAdapter {
  for (const each of [scale, textEncoderScale])
    if (!Number.isFinite(each)) throw new UserError(`the scale of ${path} is ${each}: give a number`);
  const scaleOf = ({ target }: Update) => (target.path.startsWith('unet.') ? scale : textEncoderScale);
  const file = openWeightsFile(path);
  try {
    const updates = [...updatesOf(file, targets).values()];
    const changes = updates.flatMap((update) => changesOf(file, update, scaleOf(update)));
    return { changes, layers: updates.length, close: () => file.close() };
  } catch (error) {
    file.close();
    throw error;
  }
}

/** The text encoders of a pipeline by their names in a folder: the refiner's lone one is the second. */
const encodersOf = ({ encoders }: TextStack): Pick<LoraTargets, 'text_encoder' | 'text_encoder_2'> => {
  const names = ['text_encoder', 'text_encoder_2'].slice(-encoders.length);
  return Object.fromEntries(names.map((name, i) => [name, encoders[i].encoder]));
};

/**
 * Adds the adapter in `path`, times `scale`, to the loaded weights of a pipeline, or of models by name. Several adapters are merged one
 * after the other; merging with the negative scale takes one without DoRA and OFT out again up to rounding. Returns how many layers changed.
 * @throws UserError before anything is changed, if a name of the file matches no weight or a shape does not fit
 */
export function mergeLora(into: LoraTargets & { text?: TextStack }, path: string, scale = 1): number {
  const targets = into.text ? { ...into, ...encodersOf(into.text) } : into;
  const { changes, layers, close } = openAdapter(targets, { path, scale });
  try {
    if (!changes.every(([parameter]) => parameter.loaded))
      throw new UserError(`LoRA ${path} changes weights that are released by now: load the pipeline again`);
    if (changes.some(([parameter]) => parameter.fp8))
      throw new UserError(
        `LoRA ${path} changes weights that are in 8-bit floats: give it to loadPipeline as lora, or to setAdapters`,
      );
    noGrad(() => {
      for (const [parameter, change] of changes)
        parameter.tensor = keep(scope(() => changed(parameter.tensor, change)));
    });
    return layers;
  } finally {
    close();
  }
}

/** Several of them, whose changes come one after the other. @throws UserError if one does not fit, and then none is open */
export function openAdapters(
  targets: LoraTargets,
  files: readonly AdapterFile[],
): Pick<OpenAdapter, 'changes' | 'close'> {
  const opened: OpenAdapter[] = [];
  const close = () => {
    for (const each of opened) each.close();
  };
  try {
    for (const file of files) opened.push(openAdapter(targets, file));
  } catch (error) {
    close();
    throw error;
  }
  return { changes: opened.flatMap(({ changes }) => changes), close };
}

/**
 * What has adapters merged into a model in place of those that it merged before: `read` loads the parameters that it is given, at the
 * first call all, and each is changed as it comes, before it is kept in fewer bits. So weights are to the bit those of a model that is
 * loaded with these adapters, which subtracting the last ones would not give, and what no adapter touches is not read again. A call
 * with what is merged already, unchanged on the disk, does nothing.
 * @throws UserError before anything is changed, if an adapter does not fit or the weights are released by now. After another error what
 * was to be changed is not loaded, until a call succeeds.
 */
export function adapterSetter(
  targets: LoraTargets,
  read: (some?: ReadonlySet<Parameter>) => void,
): (files: readonly AdapterFile[]) => void {
  /** What is merged; undefined while nothing is loaded, or after an error. */
  let present: string | undefined;
  /** What is not as the model has it. */
  let changing: ReadonlySet<Parameter> = new Set();
  /** What was loaded at first: of some models only parts are. */
  let held: ReadonlySet<Parameter> | undefined;
  /** When each file was written, as of the last look at it: one that is gone by now has not changed. */
  const written = new Map<string, number>();
  return (files) => {
    for (const { path } of files) {
      const found = statSync(path, { throwIfNoEntry: false });
      if (found) written.set(path, found.mtimeMs);
    }
    const wanted = JSON.stringify(files.map((each) => [each, written.get(each.path)]));
    if (wanted === present) return;
    const { changes, close } = openAdapters(targets, files);
    const touched = new Set([...changing, ...changes.map(([parameter]) => parameter)]);
    try {
      if (!held) changingAsTheyCome(changes, read);
      else {
        const some = new Set([...touched].filter((each) => held?.has(each)));
        if (present !== undefined && [...some].some(({ loaded }) => !loaded))
          throw new UserError('adapters change weights that are released by now: load the pipeline again');
        present = undefined;
        replaceAll(some, () => changingAsTheyCome(changes, () => read(some)));
      }
    } finally {
      changing = touched;
      close();
    }
    present = wanted;
    changing = new Set(changes.map(([parameter]) => parameter));
    held ??= new Set(parametersOf(targets).filter(({ loaded }) => loaded));
  };
}

const parametersOf = ({ unet, text_encoder, text_encoder_2 }: LoraTargets): Parameter[] =>
  [unet, text_encoder, text_encoder_2]
    .filter((each): each is AnyModule => each !== undefined)
    .flatMap((each) => [...namedParameters(each).values()]);

/** Runs `load`, with each parameter changed as it gets its tensor. */
function changingAsTheyCome(changes: OpenAdapter['changes'], load: () => void): void {
  const changing = new Set(changes.map(([parameter]) => parameter));
  try {
    for (const [parameter, change] of changes) {
      const { incoming: before } = parameter;
      parameter.incoming = (given) => changed(before?.(given) ?? given, change);
    }
    load();
  } finally {
    for (const parameter of changing) parameter.incoming = undefined;
  }
}

/** Runs `load`, which loads loaded parameters anew; after an error none of them is, and nothing else is left of it. */
function replaceAll(parameters: ReadonlySet<Parameter>, load: () => void): void {
  try {
    built(load);
  } catch (error) {
    for (const each of parameters) each.unload();
    throw error;
  }
}

/** The sums in float32, rounded once to the weight's own type. */
const changed = (values: Tensor, change: Change): Tensor =>
  cast(change(cast(values, 'float32')), values.dtype);

function changesOf(file: TensorFile, update: Update, scale: number): [Parameter, Change][] {
  const { target, parts } = update;
  const changes: [Parameter, Change][] = [];
  if (kindOf(parts)) changes.push([target.weight, (weight) => merged(file, update, scale, weight)]);
  const { diff_b: shift } = parts;
  if (shift && target.bias) {
    const shifted = (bias: Tensor) => {
      const values = floatsOf(file, shift).map((x) => x * scale);
      return add(bias, tensor(values, bias.shape, { device: bias.device }));
    };
    changes.push([target.bias, shifted]);
  }
  return changes;
}

function merged(file: TensorFile, update: Update, scale: number, weight: Tensor): Tensor {
  const { target, parts, alpha, rank, config } = update;
  const read = floatsOf.bind(undefined, file);
  const made = kindOf(parts)?.turns
    ? rotated(parts, weight, read, config)
    : difference(parts, target.weight.shape, read, weight.device);
  const factor = (magnitudeOf(parts) ? 1 : scale) * (alpha / rank);
  const longer = add(weight, scaled(made, factor).reshape(...weight.shape));
  if (!magnitudeOf(parts)) return longer;
  // As A1111 and ComfyUI do, scale counts for the whole change, so that 0 is the model itself; diffusers scales D alone,
  // and lengthens W even at 0.
  return add(weight, scaled(sub(withMagnitude(file, update, longer), weight), scale));
}

/** The weight with its rows or columns made as long as the file says. */
function withMagnitude(file: TensorFile, { target, parts }: Update, weight: Tensor): Tensor {
  const [outputs, inputs] = target.weight.shape;
  const rows = magnitudeAxis(parts, target.weight.shape) === 'rows';
  const matrix = rows ? weight.reshape(outputs, -1) : weight.reshape(-1, inputs);
  const squares = sum(square(matrix), rows ? 1 : 0).floats();
  // What is zero stays zero.
  const factors = floatsOf(file, magnitudeOf(parts) as TensorInfo).map(
    (length, i) => length / (Math.sqrt(squares[i]) || 1),
  );
  const stretch = tensor(factors, rows ? [outputs, 1] : [1, inputs], { device: weight.device });
  return mul(matrix, stretch).reshape(...weight.shape);
}
