// A model with adapters merged into it, as a model to be exported: each weight is changed when it is asked for, in float32 and rounded
// once to the type it will be stored in, so that none but one is held.
import type { Device } from '../../engine/device.ts';
import { noGrad } from '../../engine/grad.ts';
import { namedParameters, type Parameter } from '../../engine/module.ts';
import { scope } from '../../engine/scope.ts';
import { tensor } from '../../engine/tensor.ts';
import { decodeFloats, type FloatDType } from '../../io/dtype.ts';
import { UserError } from '../../io/errors.ts';
import { type Json, loading, type ModelSource } from '../checkpoint/checkpoint.ts';
import { matchParameters, toMemoryLayout, toStoredLayout, type WeightSource } from '../checkpoint/weights.ts';
import { buildComponent } from '../formats/components.ts';
import { encodeWeight } from '../formats/export.ts';
import { parseUNetConfig } from '../unet/unet.ts';
import { type AdapterFile, type Change, openAdapters } from './lora.ts';
import type { LoraTargets } from './lora_file.ts';

export interface MergedOptions {
  /** Where the sums are made. */
  device: Device;
  /** The type that what is changed will be stored in; its own if absent. */
  dtype?: FloatDType;
}

/** To be closed when all is written. */
export interface Merged extends ModelSource {
  /** Whether a weight of the component is another one than it was. */
  changes(component: string): boolean;
  close(): void;
}

/** @throws UserError for an adapter that does not fit the model */
export function mergedModel(
  source: ModelSource,
  files: readonly AdapterFile[],
  options: MergedOptions,
): Merged {
  const targets = targetsIn(source);
  const { changes, close } = openAdapters(targets, files);
  const byParameter = new Map<Parameter, Change[]>();
  for (const [parameter, change] of changes)
    byParameter.set(parameter, [...(byParameter.get(parameter) ?? []), change]);
  const weights = (component: string): WeightSource => {
    const stored = source.weights(component);
    const module = targets[component as keyof Modules];
    return module ? merging(stored, module, byParameter, options) : stored;
  };
  return loading({
    ...source,
    weights,
    changes(component: string) {
      const module = targets[component as keyof Modules];
      return (
        module !== undefined && [...namedParameters(module).values()].some((own) => byParameter.has(own))
      );
    },
    close,
  });
}

type Modules = Omit<LoraTargets, 'unetConfig'>;

/** A model on shapes alone, by its configs. @throws UserError where it has no UNet */
export function targetsOf(where: string, config: (component: string) => Json | undefined): LoraTargets {
  const built = (name: string) => {
    const json = config(name);
    return json && buildComponent(json)?.module;
  };
  const [unet, unetJson] = [built('unet'), config('unet')];
  if (!unet || !unetJson)
    throw new UserError(`${where} has no unet, which adapters are for; give a model that has one`);
  return {
    unet,
    unetConfig: parseUNetConfig(unetJson),
    text_encoder: built('text_encoder'),
    text_encoder_2: built('text_encoder_2'),
  };
}

/** The same of a model. */
export const targetsIn = (source: ModelSource): LoraTargets =>
  targetsOf(source.path, (name) => (source.has(name) ? source.config(name) : undefined));

/** A component's weights, some of them changed. */
function merging(
  weights: WeightSource,
  module: LoraTargets['unet'],
  changes: ReadonlyMap<Parameter, readonly Change[]>,
  { device, dtype }: MergedOptions,
): WeightSource {
  const { stored } = matchParameters(module, weights);
  const changed = new Map<string, Parameter>();
  for (const [key, parameter] of namedParameters(module)) {
    const name = stored.get(key);
    if (name !== undefined && changes.has(parameter)) changed.set(name, parameter);
  }
  const info = (name: string) => {
    const found = weights.info(name);
    return found && changed.has(name) ? { ...found, dtype: dtype ?? found.dtype } : found;
  };
  const bytes: WeightSource['bytes'] = (name, room) => {
    const parameter = changed.get(name);
    if (!parameter) return weights.bytes(name, room);
    const made = changedBy(weights.floats(name), parameter, changes.get(parameter) ?? [], device);
    return encodeWeight(weights, name, made, info(name)?.dtype as FloatDType);
  };
  return {
    ...weights,
    stamp: undefined,
    info,
    bytes,
    inFile: (name) => (changed.has(name) ? undefined : weights.inFile?.(name)),
    floats: (name) =>
      changed.has(name) ? decodeFloats(bytes(name), info(name)?.dtype as FloatDType) : weights.floats(name),
  };
}

/** A weight in the file's layout, changed in memory's. */
function changedBy(
  values: Float32Array,
  { shape, memoryShape, layout }: Parameter,
  changes: readonly Change[],
  device: Device,
): Float32Array {
  const turned = (turn: typeof toMemoryLayout, floats: Float32Array): Float32Array => {
    if (layout !== 'conv') return floats;
    const { buffer, byteOffset, byteLength } = turn(
      new Uint8Array(floats.buffer, floats.byteOffset, floats.byteLength),
      shape,
      4,
    );
    return new Float32Array(buffer as ArrayBuffer, byteOffset, byteLength / 4);
  };
  return noGrad(() =>
    scope(() => {
      const laid = tensor(turned(toMemoryLayout, values), memoryShape, { device });
      return turned(toStoredLayout, changes.reduce((weight, change) => change(weight), laid).floats());
    }),
  );
}
