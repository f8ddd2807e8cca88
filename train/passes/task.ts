// What the loop trains, as the loop sees it: components with trained weights, a way to make one pass's inputs on the host,
// and a loss over them. The UNet with its text encoders is one task (diffusion.ts), the VAE another (autoencoder.ts).
import type { Device } from '../../engine/device.ts';
import { copyBetween } from '../../engine/exchange.ts';
import { noGrad } from '../../engine/grad.ts';
import { holding } from '../../engine/memory.ts';
import { type AnyModule, namedParameters, type Parameter } from '../../engine/module.ts';
import type { Tensors } from '../../engine/op.ts';
import { cast } from '../../engine/ops/unary.ts';
import { scope, unscoped } from '../../engine/scope.ts';
import { empty, type Tensor } from '../../engine/tensor.ts';
import type { Picture } from '../../io/pixels.ts';
import type { TensorEntry } from '../../io/safetensors.ts';
import type { Json } from '../../models/checkpoint/checkpoint.ts';
import { type SavedComponent, weightEntries } from '../../models/checkpoint/save.ts';
import type { MicroBatch } from '../data/order.ts';
import type { LogEntry } from '../log/log.ts';
import type { PassInputs } from '../objective/pass_inputs.ts';

/** Tells the user what happens. */
export interface Report {
  line(text: string): void;
  /** Something long is `done` of `total`; `note` is what else there is to say. */
  progress(label: string, done: number, total: number, note?: string): void;
  /** A line of the log has been written. */
  entry?(entry: LogEntry): void;
}

/** Whether the user wants to leave; looked at wherever something long may be left. */
export interface Stop {
  readonly asked: boolean;
}

export interface Component {
  /** Its folder in a diffusers model; `lora` for adapters, `textual_inversion` for a token's vectors. */
  name: string;
  config?: Json;
  /** Its weight file's name, where that is not every such component's. */
  file?: string;
  /** Of its weight file. */
  metadata?: Readonly<Record<string, string>>;
  /** All its weights by checkpoint key. */
  parameters: ReadonlyMap<string, Parameter>;
  /** The keys of those that are trained. */
  trained: readonly string[];
  /** The learning rate of a key that has another than the run's. */
  lr?(key: string): number | undefined;
  /** What its weight file has besides. */
  constants?: readonly TensorEntry[];
}

/** An adapter of a layer. */
export interface TrainedAdapter {
  /** Of the trained matrices that its difference is made of, `component.key`. */
  names: readonly string[];
  /** What such tensors make, of which the norm is bounded: mostly the difference [o, taps * i] of the layer's weight. */
  bounded(tensors: readonly Tensor[]): Tensor;
}

/** Other tensors in place of trained parameters, by `component.key`: the moving averages. */
export type Weights = ReadonlyMap<string, Tensor> | undefined;

/** Gives the tensor that a twin of the model has for a weight. */
export type Substitute = (name: string, own: Tensor) => Tensor;

/** What a pass on another device needs, with weights of its own. */
export interface Replica {
  /** By `component.key`: what is trained, and what its loss reads beside. */
  weights: ReadonlyMap<string, Parameter>;
  loss(inputs: Tensors): Tensor;
  release(): void;
}

export interface Task {
  components: readonly Component[];
  /** Where adapters are trained. */
  adapters?: readonly TrainedAdapter[];
  /** Everything random about a pass is drawn here, keyed by seed, epoch and sample. Pictures may be left unread once `signal` is aborted. */
  prepare(batch: MicroBatch, epoch: number, signal?: AbortSignal): Promise<PassInputs>;
  /** Inputs of the shapes that a pass has, without its numbers: to estimate memory. */
  blank(batch: MicroBatch): PassInputs;
  /**
   * The mean loss over the pass's samples, [1] float32, on the tape; or off it, with `weights` in place of what is trained. By ops
   * alone, the same ones for the same shapes of inputs, so that it can be recorded.
   */
  loss(inputs: Tensors, weights?: Weights): Tensor;
  /** Where a loss asks the moving averages: is given them, before the first pass. */
  follow?(averages: ReadonlyMap<string, Tensor>): void;
  /** The same loss on another device, over copies of the weights. */
  replicate(device: Device): Replica;
  /** What the model makes now, if the run wants to see it, with `weights` in place of what is trained. None once `stop.asked`. */
  preview(weights: Weights, stop: Stop): Promise<Picture[]>;
  /** The most memory that previews take, done once without numbers. */
  rehearsePreviews?(weights: Weights): void;
  /** The last word on configs, before the finished model is written. */
  finish?(weights: Weights): Promise<void>;
  release(): void;
}

export function component(
  name: string,
  config: Json | undefined,
  module: AnyModule,
  { isTrained = () => true, lr }: { isTrained?(key: string): boolean; lr?: Component['lr'] } = {},
): Component {
  const parameters = namedParameters(module);
  return { name, config, parameters, trained: [...parameters.keys()].filter(isTrained), lr };
}

/** The trained parameters of all components by `component.key`: the names that optimizer and averages know. */
export const trainedParameters = (components: readonly Component[]): Map<string, Parameter> =>
  new Map(
    components.flatMap(({ name, parameters, trained }) =>
      trained.map((key) => [`${name}.${key}`, parameters.get(key) as Parameter] as const),
    ),
  );

/** A component as it is saved, with `weights` in place of what is trained. */
export const saved = (
  { name, config, file, metadata, parameters, constants = [] }: Component,
  weights?: Weights,
): SavedComponent => ({
  name,
  config,
  file,
  metadata,
  weights: [
    ...constants,
    ...weightEntries(parameters, (key, own) => weights?.get(`${name}.${key}`) ?? own.tensor),
  ],
});

/**
 * Gives the parameters of a fresh module tree of the same shape a tensor for each weight of `from`, and names them by
 * `component.key`. Unload the tree when done.
 */
export const twin = (
  { name: component, parameters }: Pick<Component, 'name' | 'parameters'>,
  to: ReadonlyMap<string, Parameter>,
  substitute: Substitute,
): [name: string, Parameter][] =>
  holding(component, () =>
    [...to].map(([key, parameter]) => {
      const name = `${component}.${key}`;
      const own = parameters.get(key) as Parameter;
      unscoped(() => {
        if (own.q8) {
          const { bytes, scale } = own.q8;
          parameter.q8 = { bytes: substitute(name, bytes), scale: substitute(name, scale) };
        } else parameter.tensor = substitute(name, own.tensor);
      });
      return [name, parameter];
    }),
  );

/** The weights themselves, with `weights` in place of what is trained: only those of another type or on another device are copied. */
export const lent =
  (weights: Weights): Substitute =>
  (name, own) => {
    const tensor = weights?.get(name) ?? own;
    if (tensor.dtype === own.dtype) return onDevice(tensor, own.device);
    return noGrad(() => scope(() => onDevice(cast(tensor, own.dtype), own.device)));
  };

/** Copies of the weights on another device. */
export const copied =
  (device: Device): Substitute =>
  (_, own) =>
    onDevice(own, device);

/** A handle on the tensor where it is on the device, else a copy there. */
export function onDevice(tensor: Tensor, device: Device): Tensor {
  if (tensor.device === device) return tensor.handle(tensor.shape);
  const copy = empty(tensor.shape, { device, dtype: tensor.dtype });
  copyBetween([[copy, tensor]]);
  return copy;
}
