// Whole models merged into one, as A1111's Checkpoint Merger and ComfyUI's ModelMerge nodes do: each weight of the UNet and the text
// encoders is A (1 - sum of r) + sum of r B ("Weighted sum"), or beside a base C it is A + sum of r (B - C) ("Add difference"); several B
// count at once, in any order. The VAE stays A's, and so do the channels of an inpainting A that a plain B has not. Sums are made when a
// weight is asked for, in float64, and rounded once to the type it will be stored in, so that of each model one weight is held.
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { type AnyModule, namedParameters } from '../../engine/module.ts';
import { combine, type Term } from '../../engine/ops/combine.ts';
import { concat, slice } from '../../engine/ops/move.ts';
import { cast } from '../../engine/ops/unary.ts';
import { scope } from '../../engine/scope.ts';
import type { Tensor } from '../../engine/tensor.ts';
import { type FloatDType, isFloat } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { loading, type ModelSource } from '../checkpoint/checkpoint.ts';
import {
  allFinite,
  matchParameters,
  misfit,
  notFinite,
  reusedRoom,
  storedTensor,
  trimMemory,
  type WeightSource,
} from '../checkpoint/weights.ts';
import { kindOf, latentChannelsOf } from '../control/inpainting.ts';
import { isEDM } from '../samplers/config.ts';
import { parseUNetConfig } from '../unet/unet.ts';
import { buildComponent } from './components.ts';
import { encodeWeight, hasComponent } from './export.ts';
import { mergedBlockCount, mergedBlockOf } from './unet_blocks.ts';

/** A model that is merged into another. */
export interface Ingredient {
  model: ModelSource;
  /**
   * How much of it: one number; two, of the text encoders and of the UNet; or as supermerger lists blocks (MBW), of the base 20: BASE,
   * which is the text encoders, IN00 to IN08, M00, OUT00 to OUT08.
   */
  ratios: readonly number[];
}

export interface MergeOptions {
  /** The model whose difference from each ingredient is added. */
  base?: ModelSource;
  /** Where the sums are made. */
  device: Device;
  /** The type that what is merged will be stored in; that of A's weight if absent. */
  dtype?: FloatDType;
}

export interface MergedModels extends ModelSource {
  /** Whether the component is one that is merged. */
  merges(component: string): boolean;
}

const components: readonly string[] = ['unet', 'text_encoder', 'text_encoder_2'];

/** @throws UserError for models of different shapes, or that predict different things, and a wrong number of ratios */
export function mergedModels(
  model: ModelSource,
  ingredients: readonly Ingredient[],
  options: MergeOptions,
): MergedModels {
  const { base } = options;
  for (const { model: other } of ingredients) checkNoise(other, base ?? model);
  const used = new Map(
    components
      .filter((component) => model.has(component))
      .map((component) => [component, partsOf(component, model, ingredients, base)]),
  );
  const weights = (component: string): WeightSource => {
    const [own, parts] = [model.weights(component), used.get(component) ?? []];
    try {
      return parts.length > 0 ? merging(own, moduleOf(model, component), component, parts, options) : own;
    } catch (error) {
      own.close();
      throw error;
    }
  };
  return loading({ ...model, weights, merges: (component: string) => used.has(component) });
}

/** Weights of one model that count in a component's, by what at each key. */
interface Part {
  model: ModelSource;
  module: AnyModule;
  weightAt(key: string): number;
}

/** Those that count at all; the base takes away what the others add. @throws UserError */
function partsOf(
  component: string,
  model: ModelSource,
  ingredients: readonly Ingredient[],
  base: ModelSource | undefined,
): Part[] {
  const own = moduleOf(model, component);
  const parts = ingredients.flatMap(({ model: other, ratios }): Part[] => {
    const weightAt = ratioAt(component, model, other, ratios);
    if (!ratiosIn(component, ratios).some(Boolean)) return [];
    const module = moduleOf(other, component);
    refuseOtherShapes(component, [model, own], [other, module]);
    const [differs] = base ? otherShapes(moduleOf(base, component), module) : [];
    if (base && differs) throw otherShape(component, differs, base, other);
    return [{ model: other, module, weightAt }];
  });
  if (!base || parts.length === 0) return parts;
  const taken = (key: string) => -parts.reduce((sum, { weightAt }) => sum + weightAt(key), 0);
  return [...parts, { model: base, module: moduleOf(base, component), weightAt: taken }];
}

function moduleOf(source: ModelSource, component: string): AnyModule {
  if (!source.has(component))
    throw new UserError(
      `${source.path} has no ${component} to be merged; leave text encoders as they are by a ratio of 0 before the UNet's, as in 0,0.3`,
    );
  const built = buildComponent(source.config(component));
  if (!built) throw new UserError(`${source.path}: ${component} is of a class that SDXL has not`);
  return built.module;
}

/** The ratios that a component goes by. */
function ratiosIn(component: string, ratios: readonly number[]): readonly number[] {
  if (ratios.length === 1) return ratios;
  return component === 'unet' ? ratios.slice(1) : ratios.slice(0, 1);
}

/** The ratio at each of a component's keys. @throws UserError where there are more than one, and other than the UNet has blocks */
function ratioAt(
  component: string,
  model: ModelSource,
  other: ModelSource,
  ratios: readonly number[],
): (key: string) => number {
  const [one, ...more] = ratiosIn(component, ratios);
  if (component !== 'unet' || more.length === 0) return () => one;
  const config = parseUNetConfig(model.config('unet'));
  const count = mergedBlockCount(config);
  if (ratios.length !== count)
    throw new UserError(
      `${other.path} has ${ratios.length} ratios: give one, two (of the text encoders and of the UNet), or ${count} (BASE, IN00 to OUT${String(count / 2 - 2).padStart(2, '0')})`,
    );
  return (key) => ratios[mergedBlockOf(key, config)];
}

/** How a model's noise is told, where it is. */
function noiseOf(source: ModelSource): string | undefined {
  if (!hasComponent(source, 'scheduler')) return undefined;
  const { _class_name, prediction_type = 'epsilon' } = source.config('scheduler');
  return isEDM(_class_name) ? `${prediction_type} under EDM's noise` : String(prediction_type);
}

/** A weighted sum of what predicts the noise and what predicts something else predicts nothing. @throws UserError */
function checkNoise(other: ModelSource, model: ModelSource): void {
  const [theirs, ours] = [other, model].map(noiseOf);
  if (theirs !== undefined && ours !== undefined && theirs !== ours)
    throw new UserError(
      `${other.path} predicts ${theirs} and ${model.path} ${ours}: merge models that predict the same, or add the difference of two that do, one of them as --merge-base`,
    );
}

/** A weight that is not of one shape in two modules. */
export interface OtherShape {
  key: string;
  own?: readonly number[];
  other?: readonly number[];
}

/** Weights that two modules of a component have not, or not in one shape. */
export function otherShapes(ours: AnyModule, theirs: AnyModule): OtherShape[] {
  const [mine, its] = [ours, theirs].map((each) => namedParameters(each));
  return [...new Set([...mine.keys(), ...its.keys()])].flatMap((key) => {
    const [own, other] = [mine, its].map((all) => all.get(key)?.shape);
    return own?.join() === other?.join() ? [] : [{ key, own, other }];
  });
}

export const shown = (shape: readonly number[] | undefined): string => (shape ? `[${shape}]` : 'absent');

type Modelled = readonly [source: ModelSource, module: AnyModule];

/** Where A sees more than latents, the first of its channels are those of a model that does not. @throws UserError for other shapes */
function refuseOtherShapes(component: string, [model, own]: Modelled, [other, module]: Modelled): void {
  for (const differs of otherShapes(own, module)) {
    if (component !== 'unet' || differs.key !== 'conv_in.weight')
      throw otherShape(component, differs, model, other);
    const [ours, theirs] = [model, other].map((each) => parseUNetConfig(each.config('unet')));
    const [seen, more] = [latentChannelsOf(ours), kindOf(theirs)];
    if (kindOf(ours) && theirs.in_channels === seen) continue;
    if (!more || ours.in_channels !== seen) throw otherShape(component, differs, model, other);
    throw new UserError(
      `${other.path} is an ${more.name} and ${model.path} is none: give the former in the first place, and merge the other into it`,
    );
  }
}

const otherShape = (
  component: string,
  { key, own, other: its }: OtherShape,
  model: ModelSource,
  other: ModelSource,
): UserError =>
  new UserError(
    `${component}.${key} is ${shown(its)} in ${other.path} and ${shown(own)} in ${model.path}; merge models of one architecture`,
  );

/** A component's weights, merged when they are asked for. */
function merging(
  own: WeightSource,
  module: AnyModule,
  component: string,
  parts: readonly Part[],
  { device, dtype }: MergeOptions,
): WeightSource {
  const { countedAt, close } = openParts(component, parts);
  const room = reusedRoom();
  const laid = ({ weights, name }: Stored): Tensor =>
    cast(storedTensor(weights, name, device, room), 'float32');
  const keys = new Map([...matchParameters(module, own).stored].map(([key, name]) => [name, key]));
  const info: WeightSource['info'] = (name) => {
    const found = own.info(name);
    const isMerged = found && keys.has(name) && isFloat(found.dtype);
    return isMerged ? { ...found, dtype: dtype ?? found.dtype } : found;
  };
  /** What `read` takes of the sum. */
  const merged = <R>(name: string, key: string, read: (sum: Tensor) => R): R => {
    const terms = () => countedAt(key).map((each): Term => [each.by, laid(each)]);
    const made = noGrad(() => scope(() => read(summed(laid({ weights: own, name }), terms()))));
    trimMemory(device);
    return made;
  };
  const bytes: WeightSource['bytes'] = (name, room) => {
    const [key, to] = [keys.get(name), info(name)?.dtype];
    if (key === undefined || !to || !isFloat(to)) return own.bytes(name, room);
    return merged(name, key, (sum) => {
      const raw = cast(sum, to).bytes();
      if (allFinite(raw, to)) return raw;
      for (const { weights, name: stored } of [{ weights: own, name }, ...countedAt(key)])
        if (!weights.floats(stored).every(Number.isFinite)) throw notFinite(weights, stored, 'float32');
      return encodeWeight(own, name, sum.floats(), to);
    });
  };
  const floats = (name: string): Float32Array => {
    const key = keys.get(name);
    return key === undefined ? own.floats(name) : merged(name, key, (sum) => sum.floats());
  };
  const closeAll = (): void => {
    own.close();
    close();
  };
  return { ...own, stamp: undefined, inFile: undefined, info, bytes, floats, close: closeAll };
}

interface Stored {
  weights: WeightSource;
  name: string;
}

/** What counts at a key, and by how much. @throws UserError for weights that do not fit their model */
function openParts(component: string, parts: readonly Part[]) {
  const opened: WeightSource[] = [];
  const close = (): void => {
    for (const weights of opened) weights.close();
  };
  const open = ({ model, module, weightAt }: Part) => {
    const weights = model.weights(component);
    opened.push(weights);
    const { stored, problems } = matchParameters(module, weights);
    if (problems.length) throw misfit(weights, problems);
    return (key: string) => ({ by: weightAt(key), weights, name: stored.get(key) as string });
  };
  try {
    const each = parts.map(open);
    return { countedAt: (key: string) => each.map((at) => at(key)).filter(({ by }) => by !== 0), close };
  } catch (error) {
    close();
    throw error;
  }
}

/** What is left to A beside the terms, and these; where some have fewer channels, in these channels alone. */
function summed(own: Tensor, terms: readonly Term[]): Tensor {
  const narrow = terms.find(([, x]) => x.shape[1] !== own.shape[1]);
  if (!narrow) return mixed(own, terms);
  const [channels, all] = [narrow[1].shape[1], own.shape[1]];
  const part = (x: Tensor, start: number, end: number): Tensor =>
    start === 0 && end === x.shape[1] ? x : slice(x, 1, start, end - start);
  const between = (start: number, end: number): Tensor =>
    mixed(
      part(own, start, end),
      terms.filter(([, x]) => x.shape[1] >= end).map(([by, x]): Term => [by, part(x, start, end)]),
    );
  return concat([between(0, channels), between(channels, all)], 1);
}

/** One that counts wholly and alone stays bit for bit. */
function mixed(own: Tensor, terms: readonly Term[]): Tensor {
  const rest = 1 - terms.reduce((sum, [by]) => sum + by, 0);
  const used = ([[rest, own], ...terms] as Term[]).filter(([by]) => by !== 0);
  return used.length === 1 && used[0][0] === 1 ? used[0][1] : combine(...used);
}
